"""What a set of shards holds: each shard's name, size, sha256, number of samples, and the sha256 of its index.

On disk it is `manifest.json` beside the shards, one line for each: opening a set reads that alone, and the index of a shard when the shard is
first read. A manifest of the first form holds all places itself and is read whole. A manifest is input like any other: what it says is checked,
and it can only name files in its own folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.files import locked, write_whole
from multimodal.data.shards.members import (
    PARTS,
    LocalFolder,
    Members,
    Row,
    Shard,
    ShardFolder,
    ShardTable,
    StoredMembers,
    check_places,
    index_name,
    row_of,
    store_index,
    text_sizes,
)
from multimodal.sample import BadSample

__all__ = [
    "MANIFEST", "WRITING", "Known", "Manifest", "find_shards", "known_of", "parse_manifest", "publish", "read_manifest", "refuse_unfinished",
    "row_as_json", "row_from_json", "shard_part", "workplace", "write_manifest",
]  # fmt: skip


MANIFEST = "manifest.json"
_FORMAT, _FIRST_FORMAT = "adalink shards 2", "adalink shards 1"


@dataclass(frozen=True)
class Known:
    """What the writer of a whole set found by reading all of its places, so that opening the set need not.

    fingerprint   the set's, as that of the first form
    lengths       sha256 of `text_sizes` of all samples
    """

    fingerprint: str
    lengths: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A set of shards.

    skipped   what was found when the set was written or indexed and is not in it
    ignored   members that no sample uses, counted by suffix
    known     of a whole set whose indexes are on disk; that its keys are unique was found with it
    """

    shards: Sequence[Shard]
    skipped: tuple[BadSample, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    known: Known | None = None

    @cached_property
    def table(self) -> ShardTable:
        """The shards as columns."""
        return self.shards if isinstance(self.shards, ShardTable) else ShardTable.of(self.shards, LocalFolder(Path()))

    def __len__(self) -> int:
        return int(self.table.rows["samples"].sum())

    @property
    def fingerprint(self) -> str:
        """A sha256 over keys, places and, where they are known, the shards' own: sets that share it hold the same samples in one order.

        Of shards that are only some of a set, it is over the check sums of their indexes.
        """
        if self.known is not None:
            return self.known.fingerprint
        digest = hashlib.sha256()
        for shard in self.shards:
            _add_to(digest, shard, shard.members)
        return digest.hexdigest()


def _add_to(digest: hashlib._Hash, shard: Shard, members: Members) -> None:
    digest.update(f"{shard.size} {shard.sha256} {len(members)}\n".encode())
    if isinstance(members, StoredMembers):
        digest.update(members.digest.encode())
    else:
        digest.update(members.packed_keys)
        digest.update(members.table.tobytes())


def known_of(shards: Sequence[Shard]) -> Known:
    """By reading all places, one shard after the other. Raises DataError where an index cannot be read."""
    content, lengths = hashlib.sha256(), hashlib.sha256()
    for shard in shards:
        members = shard.members.load() if isinstance(shard.members, StoredMembers) else shard.members
        _add_to(content, shard, members)
        lengths.update(text_sizes(members.table).tobytes())
    return Known(content.hexdigest(), lengths.hexdigest())


def write_manifest(manifest: Manifest, folder: Path) -> Manifest:
    """Writes `manifest.json` into the folder, whole or not at all, after the indexes of the shards whose members are in memory.

    Keys must be unique (`find_twice`). Gives the manifest as it was written. Raises DataError.
    """
    rows = [row_of(shard if isinstance(shard.members, StoredMembers) else store_index(shard, folder)) for shard in manifest.shards]
    shards = ShardTable.of_rows(rows, LocalFolder(folder))
    known = manifest.known or known_of(shards)
    head = {
        "format": _FORMAT,
        "samples": len(manifest),
        "fingerprint": known.fingerprint,
        "lengths": known.lengths,
        "checksum": _checksum(shards, known),
        "skipped": [bad.to_row() for bad in manifest.skipped],
        "ignored": dict(manifest.ignored),
    }
    lines = ",\n".join(json.dumps(row_as_json(row)) for row in rows)
    write_whole(folder / MANIFEST, f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n'.encode("ascii"))
    return Manifest(shards=shards, skipped=manifest.skipped, ignored=manifest.ignored, known=known)


def _checksum(shards: ShardTable, known: Known) -> str:
    digest = hashlib.sha256(f"{known.fingerprint} {known.lengths} {shards.rows.dtype.itemsize}\n".encode())
    digest.update(shards.rows.view(np.uint8).data)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises DataError where it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the manifest {path} cannot be read: {error.strerror}; write or index the shards with `adalink shards`") from error
    return parse_manifest(data, str(path), LocalFolder(folder))


def parse_manifest(data: bytes, name: str, folder: ShardFolder) -> Manifest:
    """The manifest that a file holds; raises DataError where it is damaged or of another version. folder: where its shards are."""
    try:
        found = _document(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the manifest {name} is not JSON: {error}; index the shards again") from error
    stated = found.get("format") if isinstance(found, dict) else found
    if stated not in (_FORMAT, _FIRST_FORMAT):
        if isinstance(stated, str) and re.fullmatch(r"adalink shards [1-9][0-9]*", stated):
            raise DataError(f"the manifest {name} is of a newer version: its format is {stated!r}, and this one reads up to {_FORMAT!r}; update adalink")
        raise DataError(
            f"{name} is not a manifest of this version: its format is {str(stated)[:60]!r}, expected {_FORMAT!r}; index the shards again"
        )
    try:
        shards, known = _table(found, folder) if stated == _FORMAT else (ShardTable.of(map(_with_members, found["shards"]), folder), None)
        manifest = Manifest(
            shards=shards,
            skipped=tuple(map(BadSample.from_row, found["skipped"])),
            ignored={str(suffix): int(count) for suffix, count in found["ignored"].items()},
            known=known,
        )
        if len(set(shards.rows["file"].tolist())) != len(shards):
            raise ValueError("it names a shard twice")
        if len(manifest) != found["samples"]:
            raise ValueError(f"it says {found['samples']} samples and lists {len(manifest)}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"the manifest {name} is damaged: {type(error).__name__} {error}; index the shards again") from error
    return manifest


_LINES, _END, _AT_ONCE = b'"shards": [\n', b"]}\n", 2**18  # bytes of lines that are read together


def _document(data: bytes) -> Any:
    """The JSON. Where lines of the present form stand as they were written, `shards` gives them some at a time: as objects they take thrice the memory."""
    start = data.find(_LINES)
    if start >= 0 and data.endswith(b"\n" + _END):
        head = json.loads(data[:start] + b'"shards": []}')
        if head.get("format") == _FORMAT:
            return head | {"shards": _entries(data, start + len(_LINES))}
    return json.loads(data)


def _entries(data: bytes, start: int) -> Iterator[list[Any]]:
    file = io.BytesIO(data)
    file.seek(start)
    while lines := file.readlines(_AT_ONCE):
        if lines[-1] == _END:
            lines.pop()
        yield json.loads(b"[" + b"".join(lines).strip().removesuffix(b",") + b"]")


def _table(found: Mapping[str, Any], folder: ShardFolder) -> tuple[ShardTable, Known]:
    entries, known = found["shards"], Known(str(found["fingerprint"]), str(found["lengths"]))
    if not isinstance(entries, (list, Iterator)):
        raise TypeError(f"its shards are a {type(entries).__name__}")
    some = [ShardTable.of_rows(list(map(row_from_json, each)), folder).rows for each in ([entries] if isinstance(entries, list) else entries)]
    shards = ShardTable(np.concatenate(some), [folder], {})
    if _checksum(shards, known) != found["checksum"]:
        raise ValueError("its lines are not those that were written, by its check sum")
    return shards, known


def row_as_json(row: Row) -> dict[str, object]:
    """A shard with its index, as `manifest.json` holds it. `largest`: bytes of its largest image, and of its largest text."""
    return dict(zip(("file", "bytes", "sha256", "samples", "index", "largest"), row, strict=True))


def row_from_json(entry: Mapping[str, object]) -> Row:
    """The inverse of `row_as_json`; raises ValueError, KeyError or TypeError where something does not fit."""
    file, size, sha256, samples, index = _file_of(entry), entry["bytes"], entry["sha256"], entry["samples"], entry["index"]
    largest = entry["largest"]
    if not (type(size) is type(samples) is int and isinstance(sha256, str) and isinstance(index, str) and isinstance(largest, list)):
        raise ValueError(f"bytes, sha256, samples, index or largest of {file!r} is of another type")
    image, text = largest
    if not (type(image) is type(text) is int and min(size, samples, image, text) >= 0 and len(sha256) <= 64 and len(index) == 64):
        raise ValueError(f"bytes, sha256, samples, index or largest of {file!r} has another value")
    return file, size, sha256, samples, index, (image, text)


def _file_of(entry: Mapping[str, object]) -> str:
    file = entry["file"]
    if not isinstance(file, str) or "/" in file or file in ("", ".", "..") or "\0" in file:
        raise ValueError(f"{file!r} is not a file name")
    return file


def _with_members(entry: Mapping[str, object]) -> Shard:
    """A shard of the first form: `image` is offset, size, crc32, offset, size, crc32, ...; an absent part has no list.

    Raises ValueError, KeyError or TypeError where something does not fit.
    """
    keys, size, file = entry["keys"], entry["bytes"], entry["file"]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or entry["samples"] != len(keys):
        raise ValueError(f"the keys of {file!r} do not match its {entry['samples']} samples")
    file = _file_of(entry)
    if not isinstance(size, int) or not isinstance(entry["sha256"], str):
        raise ValueError(f"bytes or sha256 of {file!r} is of another type")
    table = np.full((len(keys), len(PARTS), 3), -1, dtype=np.int64)
    for index, part in enumerate(PARTS):
        if part in entry:
            column = np.asarray(entry[part])
            if column.dtype != np.int64:
                raise ValueError(f"the list {part!r} of {file!r} holds other than whole numbers")
            table[:, index] = column.reshape(len(keys), 3)
    check_places(table, size, file)
    return Shard(file=file, size=size, sha256=entry["sha256"], members=Members(keys, table))


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
        _take_back(out)  # shards that have their names already, where the disk is full before the manifest
        shutil.rmtree(out / WRITING, ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
    finally:
        os.close(lock)


def publish(out: Path, manifest: Manifest, prefix: str) -> Manifest:
    """Moves the manifest's shards and their indexes from `out/.writing` to `out/PREFIX-000000.tar` and so on, then writes the manifest.

    Raises DataError where the disk refuses it.
    """
    stems = [f"{prefix}-{number:06d}" for number in range(len(manifest.shards))]
    rows = [(f"{stem}.tar", *row_of(shard)[1:]) for stem, shard in zip(stems, manifest.shards, strict=True)]
    names = [pair for shard, row in zip(manifest.shards, rows, strict=True) for pair in ((index_name(shard.file), index_name(row[0])), (shard.file, row[0]))]
    write_whole(out / WRITING / _PLAN, json.dumps(names).encode())
    try:
        for part, name in names:
            (out / WRITING / part).replace(out / name)
    except OSError as error:
        raise DataError(f"the shards cannot be moved to {out}: {error.strerror}") from error
    shards = ShardTable.of_rows(rows, LocalFolder(out))
    written = write_manifest(Manifest(shards=shards, skipped=manifest.skipped, ignored=manifest.ignored), out)
    shutil.rmtree(out / WRITING, ignore_errors=True)
    return written


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
