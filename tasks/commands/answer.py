"""`adalink caption`, `adalink ask` and `adalink serve`: what saved adapters write of images, which are files, folders of them, and patterns."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError, DataError
from multimodal.generation.settings import GenerationChoice, saved_generation
from tasks.commands import Command
from tasks.data.reader import IMAGE_ENDINGS
from tasks.runs.help import comments_as_help
from tasks.serve.settings import Access, Batching, RequestLimits, ServeSettings

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from multimodal.model import VisionLanguageModel

__all__ = ["ASK", "CAPTION", "SERVE", "add_allow_other_base", "images_and_questions", "images_of", "named_adapters"]

LOADED = ("model", "encoder", "language_model", "allow_other_base")  # what a command may say of an adapter's frozen parts
CAPTIONED_AT_ONCE = 16  # images; thousands may be given


def images_of(given: Sequence[Path]) -> list[Path]:
    """The files that are meant, in the order given; those of a folder or pattern in that of their names.

    Raises DataError where a folder holds no image, or a pattern matches no file.
    """
    return [file for path in given for file in _files(path)]


def images_and_questions(given: Sequence[str], *, are_clips: bool = False) -> tuple[list[Path], list[str]]:
    """What `ask` is given: images first, then questions. The first is an image; so are those after it that are files or look like images.

    are_clips: a folder is one clip, of its frames. Raises DataError as `images_of` does.
    """
    n_images = next((i for i, text in enumerate(given) if i and not _is_image(text)), len(given))
    paths = [Path(text) for text in given[:n_images]]
    return paths if are_clips else images_of(paths), list(given[n_images:])


def _is_image(text: str) -> bool:
    path = Path(text)
    try:
        return path.suffix.lower() in IMAGE_ENDINGS or path.exists() or (_is_pattern(path) and bool(_matches(path)))
    except (OSError, ValueError):  # a question may be longer than a name can be
        return False


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _matches(path: Path) -> list[Path]:
    return sorted(file for found in glob.glob(str(path), recursive=True) if (file := Path(found)).is_file())


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
        if not found:
            raise DataError(f"the folder {path} holds no image: expected files that end in {', '.join(sorted(IMAGE_ENDINGS))}")
        return found
    if _is_pattern(path):
        if not (found := _matches(path)):
            raise DataError(f"no file matches {path}: check the pattern")
        return found
    return [path]  # one that is not there is named where it is read


def _reading(model: VisionLanguageModel) -> Callable[[Path], Any] | None:
    """What looks at a clip and gives its path, which the model reads itself; None for a model of images. Raises BadImage and ConfigError."""
    from multimodal.data.inputs import kind_of, prepared

    preprocess = model.tower.preprocess

    def read(path: Path) -> Path:
        prepared(path, preprocess)
        return path

    return None if kind_of(preprocess) == "image" else read


def _caption(values: Any, plain: Any) -> None:
    from multimodal.data.images.decode import decode_image
    from tasks.runs.compose import load_adapted

    model, saved = load_adapted(values.adapter, **{name: values[name] for name in LOADED})
    if saved["task"] != "captioning":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink ask`")
    settings = values.generation.over(saved_generation(saved))
    clips = _reading(model)
    images, read = (images_of(values.images), decode_image) if clips is None else (list(values.images), clips)
    for path in images:
        read(path)  # before the first is captioned: a wrong path ends the command at once
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        texts = model.generate([read(path) for path in paths], [""] * len(paths), settings=settings)
        for path, text in zip(paths, texts, strict=True):
            print(f"{path}\t{text}" if len(images) > 1 else text)


def _ask(values: Any, plain: Any) -> None:
    from multimodal.data.images.decode import decode_image
    from tasks.runs.compose import load_adapted

    images, questions = images_and_questions([values.image, *values.question])
    if not questions:
        raise ConfigError(f"no question is given after {images[-1]}: write one, such as 'what is on the table?'")
    model, saved = load_adapted(values.adapter, **{name: values[name] for name in LOADED})
    if saved["task"] != "vqa":
        raise ConfigError(f"the adapter in {values.adapter} was trained for {saved['task']}: use `adalink caption`")
    settings = values.generation.over(saved_generation(saved))
    clips = _reading(model)
    read = decode_image if clips is None else clips
    if clips is not None:
        images, questions = images_and_questions([values.image, *values.question], are_clips=True)
    for path in images:
        read(path)  # before the first question is answered
    for start in range(0, len(images), CAPTIONED_AT_ONCE):
        paths = images[start : start + CAPTIONED_AT_ONCE]
        displayed = [read(path) for path in paths]  # each once for all its questions, so it is read once
        asked = [(path, image, question) for path, image in zip(paths, displayed, strict=True) for question in questions]
        texts = model.generate([image for _, image, _ in asked], [question for _, _, question in asked], settings=settings)
        for (path, _, question), text in zip(asked, texts, strict=True):
            print("\t".join([*[str(path)] * (len(images) > 1), *[question] * (len(questions) > 1), text]))


def add_allow_other_base(parser: Any) -> None:
    """The option of every command that loads an adapter."""
    help = "load the adapter though a frozen part is not as it was when it was trained; what differs is a warning"
    parser.add_argument("--allow_other_base", action="store_true", help=help)


def _add_adapter(parser: Any) -> None:
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder that `adalink train` wrote")
    parser.add_argument("--model", type=str | None, default=None, help="where the model that saw already is, if not where the adapter says")
    parser.add_argument("--encoder", type=str | None, default=None, help="where the encoder is, if not where the adapter says")
    parser.add_argument("--language_model", type=str | None, default=None, help="where the language model is, if not where the adapter says")
    add_allow_other_base(parser)
    comments_as_help(GenerationChoice)
    parser.add_class_arguments(GenerationChoice, "generation")


def _add_caption(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images: files, folders of them, or patterns")


def _add_ask(parser: Any) -> None:
    _add_adapter(parser)
    parser.add_argument("image", type=str, metavar="IMAGE ...", help="images: files, folders of them, or patterns")
    parser.add_argument("question", type=str, nargs="+", metavar="QUESTION", help="what to ask about each of them; several are answered in one batch")


def _add_serve(parser: Any) -> None:
    for kind in (ServeSettings, GenerationChoice, Batching, RequestLimits, Access):
        comments_as_help(kind)
    parser.add_argument("--adapter", type=str, nargs="+", action="extend", default=[], metavar="NAME=DIR", help="adapters to serve, each under a name")
    parser.add_class_arguments(ServeSettings, None)


def _serve(values: Any, plain: Any) -> None:
    """Serve until the process is asked to end. Raises ConfigError where the extra `serve` is not installed."""
    try:
        from tasks.serve.server import run_server  # late: an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"`adalink serve` needs the package {error.name}: pip install 'adalink[serve]'") from None
    settings = ServeSettings(**{name: values[name] for name in ServeSettings.__dataclass_fields__})
    run_server(settings, named_adapters(values.adapter))


def named_adapters(given: Sequence[str], option: str = "--adapter") -> dict[str, Path]:
    """The folders, or files, of NAME=DIR by their names. Raises ConfigError for another form, and for a name that comes twice."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise ConfigError(f"{option} is {text!r}: expected NAME=DIR, such as caption=runs/flickr8k/adapter")
        if name in adapters:
            raise ConfigError(f"two adapters are called {name}: give each a name of its own")
        adapters[name] = Path(folder)
    return adapters


CAPTION = Command(
    _add_caption,
    _caption,
    ("adalink caption --adapter runs/first/adapter photograph.jpg", "adalink caption --adapter runs/first/adapter photographs > captions.tsv"),
)
ASK = Command(_add_ask, _ask, ('adalink ask --adapter runs/vqa/adapter photograph.jpg "what is on the table?" "how many chairs?"',))
SERVE = Command(
    _add_serve, _serve,
    first=(
        "adapter", "router", "host", "port", "base", "model", "encoder", "language_model", "allow_other_base", "generation.max_new_tokens",
        "generation.num_beams", "batching.size", "batching.tokens", "limits.in_flight", "limits.body_bytes", "limits.images", "limits.new_tokens",
        "access.api_keys", "access.hosts", "access.adapters_folder",
    ),
    examples=(
        "adalink serve --adapter caption=runs/first/adapter vqa=runs/vqa/adapter --port 8001",
        "adalink serve --adapter vqa=runs/qwen/adapter --model ./Qwen2.5-VL-3B-Instruct --limits.images 4",
    ),
)  # fmt: skip
