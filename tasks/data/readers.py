"""Every format that a data set may have, and which of them a path is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.data.shards.reader import ShardSource
from tasks.data import benchmarks, coco, conversations, folder, parquet, table, vqa
from tasks.data.reader import Found, Given, Reader, ReadSource
from tasks.data.rows import is_row_file

__all__ = ["READERS", "open_path"]

_SHARDS = Reader(
    "shards", "webdataset shards", lambda found: "manifest.json" in found.names or ".tar" in found.suffixes, lambda given: ShardSource(given.path)
)  # fmt: skip

READERS: tuple[Reader, ...] = (
    _SHARDS,
    coco.READER,
    coco.KARPATHY,
    coco.CLIPS,
    vqa.READER,
    *benchmarks.READERS,
    folder.IMAGEFOLDER,
    conversations.READER,
    folder.READER,
    parquet.READER,
    parquet.HUB,
    table.READER,
)


def open_path(given: Given, name: str | None = None) -> tuple[Reader, ReadSource]:
    """The reader of a path's format and the samples; name: of the format, where it is given.

    Raises ConfigError where there is no such format; DataError where the path is of no format that is known, or of two, and as readers do.
    """
    if not given.path.exists():
        if name == parquet.HUB.name or parquet.is_hub_name(given.path):
            return parquet.HUB, parquet.HUB.opened(given)
        raise DataError(f"{given.path} does not exist: check the path of the data set")
    if name is not None:
        named = _named(name)
        return named, named.opened(given)
    found = Found(given.path)
    reader = _recognised(found)
    if reader is None and (inside := _only_table(found)):
        return open_path(replace(given, path=inside, images=given.images or given.path))
    if reader is None:
        raise DataError(
            f"{given.path} is of no format that is known{_seen(found)}: give format, one of {', '.join(one.name for one in READERS)}"
        )
    return reader, reader.opened(given)


def _named(name: str) -> Reader:
    by_name = {reader.name: reader for reader in READERS}
    if name not in by_name:
        near = get_close_matches(name, by_name, n=1)
        nearest = f"; the nearest is {near[0]}" if near else ""
        raise ConfigError(f"there is no format {name!r}{nearest}: expected one of {', '.join(by_name)}")
    return by_name[name]


def _recognised(found: Found) -> Reader | None:
    """The one reader that recognises a path; a general one only where no other does. Raises DataError where there are two."""
    for is_general in (False, True):
        readers = [reader for reader in READERS if reader.is_general == is_general and reader.recognises(found)]
        if len(readers) > 1:
            one, other = readers[:2]
            raise DataError(f"{found.path} may be {one.about} or {other.about}: choose with format, {one.name} or {other.name}")
        if readers:
            return readers[0]
    return None


def _only_table(found: Found) -> Path | None:
    """The table in a folder that holds one. Raises DataError where it holds several."""
    tables: Sequence[str] = sorted(name for name in found.names if is_row_file(Path(name)) and not name.endswith(".txt"))
    if len(tables) > 1:
        raise DataError(
            f"{found.path} holds {len(tables)} files that may be the data set, such as {tables[0]} and {tables[1]}: give the path of one of them"
        )
    return found.path / tables[0] if tables else None


def _seen(found: Found) -> str:
    """What a person would see there."""
    if found.has_images:
        return " (it holds images without texts; expected a text file beside each, such as cat.txt of cat.jpg, or metadata.csv)"
    if found.is_folder:
        return f" (it holds {', '.join(sorted(found.names)[:4]) or 'nothing'})"
    if {"images", "annotations"} <= found.document.keys():
        return " (a JSON object with images and annotations, and no caption in the first annotation; is it the file of captions?)"
    if found.document:
        return f" (a JSON object with {', '.join(list(found.document)[:6])})"
    return f" (a file that ends in {found.path.suffix!r})"
