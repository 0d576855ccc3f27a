"""A folder of pictures with a text file beside each: `cat.jpg` and `cat.txt`, one caption a line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.sample import Sample
from tasks.file_source import FileSource
from tasks.image_folder import ImageFolder

__all__ = ["read_caption_folder"]

_PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


def read_caption_folder(*, images: Path) -> FileSource:
    """One sample per picture, in the order of their names, in folders below `images` too.

    The key is the path below `images` without its ending; the image id is the place in that order, counted from 0 over all pictures.
    Pictures without a text that can be read, and texts without a picture, are in `problems`. Raises DataError where two pictures have one key.
    """
    ImageFolder(images)  # says what is wrong with it
    samples: list[Sample] = []
    problems: list[BadSample] = []
    names = {path.relative_to(images).as_posix(): path for path in _files(images)}
    keys: dict[str, str] = {}
    for name, path in names.items():
        key, suffix = os.path.splitext(name)
        if suffix.lower() not in _PICTURES:
            continue
        if key in keys:
            raise DataError(f"the pictures {keys[key]!r} and {name!r} in {images} have one key, {key!r}; rename one of them")
        try:
            captions = _captions(path.with_suffix(".txt")) if f"{key}.txt" in names else ()
            if captions:
                samples.append(Sample(key=key, image_id=len(keys), image=path, captions=captions))
            else:
                problems.append(BadSample(key=key, reason="no text", detail=f"{path} has no caption in {path.with_suffix('.txt').name}"))
        except DataError as error:
            problems.append(BadSample(key=key, reason="damaged text", detail=str(error)))
        keys[key] = name
    for name, path in names.items():
        key, suffix = os.path.splitext(name)
        if suffix == ".txt" and key not in keys:
            problems.append(BadSample(key=key, reason="missing file", detail=f"{path} has no picture beside it"))
    return FileSource(samples, problems, read_from=images)


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, sorted by name within each folder; links to folders are not followed, since they may lead in circles."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            yield Path(root, name)


def _captions(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the captions {path} cannot be read: {error}; expected UTF-8 text, one caption a line") from error
    return tuple(line.strip() for line in lines if line.strip())
