"""Images on a command line: files, folders of them, and patterns that no shell has put in the place of."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from adalink.errors import DataError

__all__ = ["images_and_questions", "images_of"]

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
