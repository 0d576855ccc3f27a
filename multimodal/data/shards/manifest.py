"""What a set of shards holds: each shard's size, sha256 and samples, and where in the file each sample's members lie.

On disk it is `manifest.json` beside the shards. In memory the offsets are arrays and the keys one block of bytes, so that a set of millions
of samples is cheap to hold and to send to worker processes. A manifest is input like any other: what it says is checked, and it can only
name files in its own folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.files import locked, write_whole
from multimodal.sample import BadSample

__all__ = [
    "MANIFEST", "WRITING", "Manifest", "Members", "Part", "Shard", "find_shards", "find_twice", "parse_manifest", "publish",
    "read_manifest", "refuse_unfinished", "shard_part", "workplace", "write_manifest",
]  # fmt: skip


MANIFEST = "manifest.json"
_FORMAT = "adalink shards 1"

Part = Literal["image", "json", "txt"]
PARTS: tuple[Part, ...] = ("image", "json", "txt")

ABSENT = (-1, -1, -1)
"""Offset, size and crc32 of a member that a sample does not have."""
UNKNOWN_CRC = -1


class Members:
    """The samples of one shard, in order: a key each, and the place of each part.

    table   int64[n, 3 parts, 3]: offset of the part's data in the shard in bytes, its size in bytes, its crc32 or -1 where it is not known
    """

    def __init__(self, keys: Iterable[str], table: NDArray[np.int64]) -> None:
        encoded = [key.encode("utf-8", "backslashreplace") for key in keys]
        self.packed_keys = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded)))  # its elements are read one by one, for which NumPy is slow
        self.table = table.reshape(len(encoded), len(PARTS), 3)

    def only(self, retained: NDArray[np.bool_]) -> Members:
        """The samples at which `retained` is true."""
        return Members([self.key(index) for index in np.flatnonzero(retained).tolist()], self.table[retained])

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, index: int) -> str:
        """The key under which the shard's file holds sample `index`."""
        start = self._ends[index - 1] if index else 0
        return self.packed_keys[start : self._ends[index]].decode("utf-8")

    def all_keys(self) -> Iterator[str]:
        """All of them, in order."""
        return (self.key(index) for index in range(len(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One tar file of a set."""

    file: str  # a name in the manifest's folder, never a path
    size: int  # bytes
    sha256: str  # empty where the file was indexed without reading it
    members: Members


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A set of shards.

    skipped   what was found when the set was written or indexed and is not in it
    ignored   members that no sample uses, counted by suffix
    """

    shards: tuple[Shard, ...]
    skipped: tuple[BadSample, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(shard.members) for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A sha256 over keys, places and, where they are known, the shards' own: sets that share it hold the same samples in one order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.size} {shard.sha256} {len(shard.members)}\n".encode())
            digest.update(shard.members.packed_keys)
            digest.update(shard.members.table.tobytes())
        return digest.hexdigest()


def find_twice(shards: Sequence[Shard]) -> tuple[str, int, int] | None:
    """A key that stands in two shards, and their numbers; None where each key is in one."""
    seen: dict[str, int] = {}
    for number, shard in enumerate(shards):
        for key in shard.members.all_keys():
            if seen.setdefault(key, number) != number:
                return key, seen[key], number
    return None


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `manifest.json` into the folder, whole or not at all; one line per shard."""
    head = {
        "format": _FORMAT,
        "samples": len(manifest),
        "skipped": [bad.to_row() for bad in manifest.skipped],
        "ignored": dict(manifest.ignored),
    }
    lines = ",\n".join(json.dumps(shard_as_json(shard)) for shard in manifest.shards)
    write_whole(folder / MANIFEST, f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n'.encode("ascii"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises DataError where it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the manifest {path} cannot be read: {error.strerror}; write or index the shards with `adalink shards`") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, name: str) -> Manifest:
    """The manifest that a file holds; raises DataError where it is damaged or of another version."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the manifest {name} is not JSON: {error}; index the shards again") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        answered = str(found.get("format") if isinstance(found, dict) else found)[:60]
        raise DataError(f"{name} is not a manifest of this version: its format is {answered!r}, expected {_FORMAT!r}; index the shards again")
    try:
        manifest = Manifest(
            shards=tuple(shard_from_json(shard) for shard in found["shards"]),
            skipped=tuple(map(BadSample.from_row, found["skipped"])),
            ignored={str(suffix): int(count) for suffix, count in found["ignored"].items()},
        )
        _check_all(manifest, found["samples"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"the manifest {name} is damaged: {type(error).__name__} {error}; index the shards again") from error
    return manifest


def shard_as_json(shard: Shard) -> dict[str, object]:
    """The shard as `manifest.json` holds it: `image` is offset, size, crc32, offset, size, crc32, ...; an absent part has no list."""
    entry: dict[str, object] = {"file": shard.file, "bytes": shard.size, "sha256": shard.sha256, "samples": len(shard.members)}
    entry["keys"] = list(shard.members.all_keys())
    for index, part in enumerate(PARTS):
        column = shard.members.table[:, index]
        if (column[:, 0] >= 0).any():
            entry[part] = column.ravel().tolist()
    return entry


def shard_from_json(entry: Mapping[str, object]) -> Shard:
    """The inverse of `shard_as_json`; raises ValueError, KeyError or TypeError where something does not fit."""
    keys, size, file = entry["keys"], entry["bytes"], entry["file"]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or entry["samples"] != len(keys):
        raise ValueError(f"the keys of {file!r} do not match its {entry['samples']} samples")
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\0" in file:
        raise ValueError(f"{file!r} is not a file name")
    if not isinstance(size, int) or not isinstance(entry["sha256"], str):
        raise ValueError(f"bytes or sha256 of {file!r} is of another type")
    table = np.full((len(keys), len(PARTS), 3), -1, dtype=np.int64)
    for index, part in enumerate(PARTS):
        if part in entry:
            column = np.asarray(entry[part])
            if column.dtype != np.int64:
                raise ValueError(f"the list {part!r} of {file!r} holds other than whole numbers")
            table[:, index] = column.reshape(len(keys), 3)
    _check_places(table, size, file)
    return Shard(file=file, size=size, sha256=entry["sha256"], members=Members(keys, table))


def _check_places(table: NDArray[np.int64], size: int, file: str) -> None:
    offset, length = table[..., 0], table[..., 1]
    if not np.where(offset < 0, length < 0, (offset >= 512) & (length >= 0) & (offset <= size - np.maximum(length, 0))).all():
        raise ValueError(f"an offset of {file!r} lies outside its {size} bytes")
    present = offset >= 0
    if not present[:, 0].all():
        raise ValueError(f"a sample of {file!r} has no image")
    if not present[:, 1:].any(axis=1).all():
        raise ValueError(f"a sample of {file!r} has no text")


def _check_all(manifest: Manifest, samples: object) -> None:
    names = [shard.file for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ValueError("it names a shard twice")
    if len(manifest) != samples:
        raise ValueError(f"it says {samples} samples and lists {len(manifest)}")


# ----------------------------------------
# The folder into which shards are written: under `.writing` until all are there, then moved up, the manifest last.
#
# So a reader finds all shards or none, and a writing that was killed can go on: whole shards under `.writing` are used again.


WRITING = ".writing"
_LOCK = "lock"
_PLAN = "publish.json"  # which file is about to get which name; written before the first is moved


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """The folder `out/.writing`, locked against a second writer; what a killed writing left in it is there again.

    It is removed, and `out` too where it is new and empty, when an error ends the writing that the caller can mend; after a kill or
    Ctrl-C it stays. Raises ConfigError where `out` holds anything else, or somebody writes there now; DataError where it cannot be made.
    """
    new = not out.exists()
    _check_only_ours(out)
    lock = _locked(out)
    try:
        _take_back(out)
        yield out / WRITING
    except AdalinkError:
        shutil.rmtree(out / WRITING, ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
    finally:
        os.close(lock)


def publish(out: Path, manifest: Manifest, prefix: str) -> Manifest:
    """Moves the manifest's shards from `out/.writing` to `out/PREFIX-000000.tar` and so on, then writes the manifest.

    Raises DataError where the disk refuses it.
    """
    names = [(shard.file, f"{prefix}-{number:06d}.tar") for number, shard in enumerate(manifest.shards)]
    named = replace(manifest, shards=tuple(replace(shard, file=name) for shard, (_, name) in zip(manifest.shards, names, strict=True)))
    write_whole(out / WRITING / _PLAN, json.dumps(names).encode())
    try:
        for part, name in names:
            (out / WRITING / part).replace(out / name)
    except OSError as error:
        raise DataError(f"the shards cannot be moved to {out}: {error.strerror}") from error
    write_manifest(named, out)
    shutil.rmtree(out / WRITING, ignore_errors=True)
    return named


def refuse_unfinished(folder: Path) -> None:
    """Raises DataError where a writing to this folder has not ended."""
    if (folder / WRITING).exists() and not (folder / MANIFEST).exists():
        raise DataError(f"the shards in {folder} are not finished: a writing was interrupted or still goes on; run the same command again")


def find_shards(folder: Path) -> Sequence[Path]:
    """The tar files of a folder by name; raises DataError where there are none."""
    refuse_unfinished(folder)
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".tar")
    except OSError as error:
        raise DataError(f"the shards folder {folder} cannot be listed: {error.strerror}") from error
    packed = sorted(path.name for path in folder.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", path.name))
    if packed:
        raise DataError(f"{folder / packed[0]} is compressed, which allows no random access; unpack it to a plain .tar")
    if not found:
        raise DataError(f"there are no shards in {folder}; expected files that end in .tar")
    return found


def shard_part(work: Path, number: int) -> Path:
    """Where shard `number` is written before it has its name."""
    return work / f"{number:06d}.tar"


def _check_only_ours(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder, new or empty, for the shards")
    ours = {WRITING, *(name for _, name in _plan(out))} if (out / WRITING / _LOCK).exists() else set()
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise ConfigError(f"the folder {out} is not empty: it holds {others[0]!r} ({len(others)} files); give a new folder, or empty it")


def _locked(out: Path) -> int:
    """An open file in `out/.writing` with a lock that ends with the process."""
    try:
        (out / WRITING).mkdir(parents=True, exist_ok=True)
        return locked(out / WRITING / _LOCK, f"another process writes shards to {out} now; wait for it, or give another folder")
    except OSError as error:
        raise DataError(f"shards cannot be written to {out}: {error.strerror}; is it writable?") from error


def _take_back(out: Path) -> None:
    """Undoes a publishing that was killed between two moves."""
    for part, name in _plan(out):
        if (out / name).exists():
            (out / name).replace(out / WRITING / part)
    (out / WRITING / _PLAN).unlink(missing_ok=True)


def _plan(out: Path) -> list[tuple[str, str]]:
    try:
        return [(Path(part).name, Path(name).name) for part, name in json.loads((out / WRITING / _PLAN).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []
