"""A folder of images with metadata.csv, metadata.jsonl or metadata.parquet in it, a row for each image: Hugging Face's imagefolder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adalink.errors import ConfigError, DataError
from tasks.data.parquet import open_arrow
from tasks.data.reader import Found, Given, Reader, ReadSource
from tasks.data.table import open_table

__all__ = ["READER"]

_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def _open(given: Given) -> ReadSource:
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
    return [root / name for name in _NAMES if (root / name).is_file()]


def _splits(root: Path) -> str:
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _metadata(entry))
    return f"; it is in {', '.join(found)}: give split" if found else ""


def _recognises(found: Found) -> bool:
    return found.is_folder and (bool(_metadata(found.path)) or bool(_splits(found.path)))


READER = Reader("imagefolder", "a folder of images with metadata.csv, .jsonl or .parquet", _recognises, _open)
