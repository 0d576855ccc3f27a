"""A folder of images with their texts: a text file beside each (`cat.jpg` and `cat.txt`, one caption a line), or a table of metadata."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, Sample
from tasks.data.files import FileSource, ImageFolder, text_lines
from tasks.data.parquet import open_arrow
from tasks.data.reader import IMAGE_ENDINGS, Found, Given, Reader, ReadSource
from tasks.data.table import open_table

__all__ = ["IMAGEFOLDER", "READER", "read_caption_folder"]

_TEXTS = frozenset((".txt",))


def read_caption_folder(*, images: Path) -> FileSource:
    """One sample per image, in the order of their names, in folders below `images` too.

    The key is the path below `images` without its ending; the image id is the place in that order, counted from 0 over all images.
    Endings may be written in capital letters. Images without a text that can be read, and texts without an image, are in `problems`.
    Raises DataError where two images, or two texts, have one key.
    """
    ImageFolder(images)  # says what is wrong with it
    samples: list[Sample] = []
    problems: list[BadSample] = []
    names = {path.relative_to(images).as_posix(): path for path in _files(images)}
    image_files, texts = _by_key(names, IMAGE_ENDINGS, "images", images), _by_key(names, _TEXTS, "texts", images)
    for number, (key, path) in enumerate(image_files.items()):
        text = texts.get(key)
        try:
            captions = _captions(text) if text is not None else ()
            if captions:
                samples.append(Sample(key=key, image_id=number, media=path, captions=captions))
            else:
                beside = (text or path.with_suffix(".txt")).name
                problems.append(BadSample(key=key, reason="no text", detail=f"{path} has no caption in {beside}"))
        except DataError as error:
            problems.append(BadSample(key=key, reason="damaged text", detail=str(error)))
    for key, path in texts.items():
        if key not in image_files:
            problems.append(BadSample(key=key, reason="missing file", detail=f"{path} has no image beside it"))
    return FileSource(samples, problems, read_from=images)


def _by_key(names: Mapping[str, Path], endings: Container[str], what: str, images: Path) -> dict[str, Path]:
    """The files with one of these endings, in the order of `names`."""
    found: dict[str, str] = {}
    for name in names:
        key, ending = os.path.splitext(name)
        if ending.lower() not in endings:
            continue
        if key in found:
            raise DataError(f"the {what} {found[key]!r} and {name!r} in {images} have one key, {key!r}; rename one of them")
        found[key] = name
    return {key: names[name] for key, name in found.items()}


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, sorted by name within each folder; links to folders are not followed, since they may lead in circles.

    Hidden files are left out: macOS puts a `._cat.jpg` beside `cat.jpg` on disks and in archives of other systems.
    """
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(root, name)


def _captions(path: Path) -> tuple[str, ...]:
    try:
        return tuple(text_lines(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the captions {path} cannot be read: {error}; expected UTF-8 text, one caption a line") from error


def _recognises(found: Found) -> bool:
    return found.has_images and ".txt" in found.suffixes


READER = Reader(
    "caption_folder", "a folder of images with a text file beside each", _recognises, lambda given: read_caption_folder(images=given.path)
)


# ----------------------------------------
# Hugging Face's imagefolder: metadata.csv, metadata.jsonl or metadata.parquet in the folder, with a row for each image.

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def _open_imagefolder(given: Given) -> ReadSource:
    """The rows of the metadata; with a split, those in the folder of that name. The names of images are those below the folder of the metadata."""
    root = given.path if given.split is None else given.path / given.split
    if not root.is_dir():
        raise ConfigError(f"{given.path} has no folder {given.split!r}: an imagefolder has one for each split")
    files = _metadata(root)
    if len(files) != 1:
        held = " and ".join(file.name for file in files) or "no metadata.csv, metadata.jsonl or metadata.parquet"
        advice = "" if files else _splits(given.path)
        raise DataError(f"{root} holds {held}; expected one of them{advice}")
    if files[0].suffix == ".parquet":
        return open_arrow(files[0], files, replace(given, images=root))
    return open_table(files[0], root, given.columns)


def _metadata(root: Path) -> list[Path]:
    return [root / name for name in _METADATA if (root / name).is_file()]


def _splits(root: Path) -> str:
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _metadata(entry))
    return f"; it is in {', '.join(found)}: give split" if found else ""


def _has_metadata(found: Found) -> bool:
    return found.is_folder and (bool(_metadata(found.path)) or bool(_splits(found.path)))


IMAGEFOLDER = Reader("imagefolder", "a folder of images with metadata.csv, .jsonl or .parquet", _has_metadata, _open_imagefolder, reads=("split", "columns"))
