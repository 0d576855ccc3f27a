"""`adalink caption` and `adalink ask`: what a saved adapter writes of images, which are files, folders of them, and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError, DataError
from multimodal.data.images.decode import decode_image
from multimodal.generation.generate import GenerationChoice, saved_generation
from tasks.commands import Command
from tasks.commands.settings import add_allow_other_base
from tasks.runs.compose import load_adapted
from tasks.runs.config import comments_as_help

__all__ = ["ASK", "CAPTION", "images_and_questions", "images_of"]

CAPTIONED_AT_ONCE = 16  # images; thousands may be given
_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp"))


def images_of(given: Sequence[Path]) -> list[Path]:
    """The files that are meant, in the order given; those of a folder or pattern in that of their names.

    Raises DataError where a folder holds no image, or a pattern matches no file.
    """
    return [file for path in given for file in _files(path)]


def images_and_questions(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What `ask` is given: images first, then questions. The first is an image; so are those after it that are files or look like images.

    Raises DataError as `images_of` does.
    """
    n_images = next((i for i, text in enumerate(given) if i and not _is_image(text)), len(given))
    return images_of([Path(text) for text in given[:n_images]]), list(given[n_images:])


def _is_image(text: str) -> bool:
    path = Path(text)
    try:
        return path.suffix.lower() in _ENDINGS or path.exists() or (_is_pattern(path) and bool(_matches(path)))
    except (OSError, ValueError):  # a question may be longer than a name can be
        return False


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _matches(path: Path) -> list[Path]:
    return sorted(file for found in glob.glob(str(path), recursive=True) if (file := Path(found)).is_file())


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in _ENDINGS and file.is_file())
        if not found:
            raise DataError(f"the folder {path} holds no image: expected files that end in {', '.join(sorted(_ENDINGS))}")
        return found
    if _is_pattern(path):
        if not (found := _matches(path)):
            raise DataError(f"no file matches {path}: check the pattern")
        return found
    return [path]  # one that is not there is named where it is read


def _caption(values: Any, plain: Any) -> None:
    model, saved = load_adapted(values.adapter, encoder=values.encoder, language_model=values.language_model, allow_other_base=values.allow_other_base)
    if saved["task"] != "captioning":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink ask`")
    settings = values.generation.over(saved_generation(saved))
    images = images_of(values.images)
    for path in images:
        decode_image(path)  # before the first is captioned: a wrong path is told at once
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        texts = model.generate([decode_image(path) for path in paths], [""] * len(paths), settings=settings)
        for path, text in zip(paths, texts, strict=True):
            print(f"{path}\t{text}" if len(images) > 1 else text)


def _ask(values: Any, plain: Any) -> None:
    images, questions = images_and_questions([values.image, *values.question])
    if not questions:
        raise ConfigError(f"no question is given after {images[-1]}: write one, such as 'what is on the table?'")
    model, saved = load_adapted(values.adapter, encoder=values.encoder, language_model=values.language_model, allow_other_base=values.allow_other_base)
    if saved["task"] != "vqa":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink caption`")
    settings = values.generation.over(saved_generation(saved))
    for path in images:
        decode_image(path)  # before the first question is answered
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        shown = [decode_image(path) for path in paths]  # each once for all its questions, so it is read once
        asked = [(path, image, question) for path, image in zip(paths, shown, strict=True) for question in questions]
        texts = model.generate([image for _, image, _ in asked], [question for _, _, question in asked], settings=settings)
        for (path, _, question), text in zip(asked, texts, strict=True):
            print("\t".join([*[str(path)] * (len(images) > 1), *[question] * (len(questions) > 1), text]))


def _add_adapter(parser: Any) -> None:
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder that `adalink train` wrote")
    parser.add_argument("--encoder", type=str | None, default=None, help="where the encoder is, if not where the adapter says")
    parser.add_argument("--language_model", type=str | None, default=None, help="where the language model is, if not where the adapter says")
    add_allow_other_base(parser)
    comments_as_help(GenerationChoice)
    parser.add_class_arguments(GenerationChoice, "generation")


def _add_caption(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images: files (JPEG, PNG or WebP), folders of them, or patterns")


def _add_ask(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("image", type=str, metavar="IMAGE ...", help="images: files (JPEG, PNG or WebP), folders of them, or patterns")
    parser.add_argument("question", type=str, nargs="+", metavar="QUESTION", help="what to ask about each of them; several are answered in one batch")


CAPTION = Command(_add_caption, _caption)
ASK = Command(_add_ask, _ask)
