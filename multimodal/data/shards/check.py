"""Whether a set of shards is what its manifest says, to the last bit; what is wrong is named, down to the samples."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from adalink.errors import DataError
from multimodal.data.shards.index import ShardLimits, index_shard, scan_tar, split_name
from multimodal.data.shards.manifest import MANIFEST, Manifest, find_shards, known_of, read_manifest, refuse_unfinished, write_manifest
from multimodal.data.shards.members import (
    UNKNOWN_CRC,
    LocalFolder,
    Members,
    Shard,
    ShardTable,
    StoredMembers,
    encode_index,
    find_twice,
    index_name,
    row_of,
    store_index,
)
from multimodal.sample import BadSample, BadSamples

__all__ = ["ShardFault", "checksummed", "index_folder", "verify_shards", "write_indexes"]

_CHUNK = 2**22  # bytes
_NAMED = 5  # damaged samples that a message names


@dataclass(frozen=True, kw_only=True)
class ShardFault:
    """One thing that is wrong with a set.

    reason   short and stable: missing shard, other size, cut or damaged tar, damaged samples, damaged bytes, unlisted shard, damaged index,
             wrong index, other fingerprint, key twice
    """

    file: str
    reason: str
    detail: str


def verify_shards(folder: Path) -> tuple[ShardFault, ...]:
    """Reads every byte of every shard that the manifest names, and of every index; empty where all is well.

    Raises DataError where the manifest itself is missing or damaged, or the set is not finished.
    """
    refuse_unfinished(folder)
    manifest = read_manifest(folder)
    faults = list(_unlisted(folder, manifest))
    for shard in tqdm(manifest.shards, unit="shard", desc="checking", disable=None, leave=False):
        faults += _of_shard(folder / shard.file, shard)
    if not any(fault.reason == "damaged index" for fault in faults):
        faults += _of_all(folder, manifest)
    return tuple(faults)


def index_folder(folder: Path, *, budget: int) -> Manifest:
    """Writes the indexes and the manifest of tar files that another program wrote, with the members of one of them in memory at a time.

    budget   how many samples may lack an image or a text, or be too large

    Raises DataError where the shards hold no sample, or one key twice, and BudgetError; nothing is then written.
    """
    paths, skipped, ignored, samples = find_shards(folder), list[BadSample](), Counter[str](), 0
    for path in tqdm(paths, unit="shard", desc="indexing", disable=None, leave=False):
        found = index_shard(path, ShardLimits())
        skipped += found.skipped
        ignored.update(found.ignored)
        samples += len(found.shard.members)
    if not samples:
        raise DataError(f"the shards in {folder} hold no sample: {skipped[0].detail if skipped else 'none has an image and a text'}")
    BadSamples(budget=budget, found=skipped).check()
    try:
        rows = [row_of(_indexed(path)) for path in tqdm(paths, unit="shard", desc="check sums", disable=None, leave=False)]
        table = ShardTable.of_rows(rows, LocalFolder(folder))
        if (twice := find_twice(table)) is not None:
            key, one, other = twice
            raise DataError(f"the shards {paths[one]} and {paths[other]} both have the key {key!r}; keys must be unique in a data set")
        return write_manifest(Manifest(shards=table, skipped=tuple(skipped), ignored=ignored), folder)
    except DataError:
        for path in paths:
            (folder / index_name(path.name)).unlink(missing_ok=True)
        raise


def _indexed(path: Path) -> Shard:
    """The tar file, read whole, with its index beside it."""
    return store_index(checksummed(path, index_shard(path, ShardLimits()).shard), path.parent)


def write_indexes(folder: Path) -> int:
    """Brings a set to the present form: the indexes of a manifest of the first form, or those of the present one that are missing or damaged.

    Gives how many were written. The fingerprint stays, so that runs go on. Raises DataError where two samples have one key, and where a shard
    is not the one whose index is missing.
    """
    refuse_unfinished(folder)
    manifest = read_manifest(folder)
    if manifest.known is None:
        if (twice := find_twice(manifest.table)) is not None:
            raise DataError(f"two samples of the shards in {folder} have the key {twice[0]!r}; a data set's keys must be unique")
        write_manifest(manifest, folder)
        return len(manifest.table)
    damaged = [shard for shard in tqdm(manifest.shards, unit="shard", desc="indexes", disable=None, leave=False) if _index_fault(shard)]
    for shard in damaged:
        path = folder / shard.file
        made = checksummed(path, index_shard(path, ShardLimits()).shard)
        assert isinstance(shard.members, StoredMembers)
        if hashlib.sha256(encode_index(made)).hexdigest() != shard.members.digest:
            raise DataError(f"the index of {path} cannot be made again: the shard is not the one that was written; write or fetch both again")
        store_index(made, folder)
    return len(damaged)


def checksummed(path: Path, shard: Shard) -> Shard:
    """The same shard with the sha256 of its file and the crc32 of each member, for a shard that was indexed by its headers alone."""
    table = shard.members.table.copy()
    with path.open("rb") as file:
        for place in table.reshape(-1, 3):
            if place[0] >= 0:
                place[2] = zlib.crc32(os.pread(file.fileno(), int(place[1]), int(place[0])))
    return replace(shard, sha256=_sha256(path), members=Members(shard.members.all_keys(), table))


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[ShardFault]:
    listed = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield ShardFault(file=path.name, reason="unlisted shard", detail=f"{path} is not in the manifest, so nothing reads it")


def _of_all(folder: Path, manifest: Manifest) -> Iterator[ShardFault]:
    twice = find_twice(manifest.table)
    if twice is not None:
        key, one, other = twice
        files = manifest.table[one].file, manifest.table[other].file
        yield ShardFault(file=files[1], reason="key twice", detail=f"{folder / files[0]} and {files[1]} both have the key {key!r}")
    if manifest.known is not None and manifest.known != known_of(manifest.table):
        detail = f"the indexes in {folder} do not give the fingerprint that the manifest says"
        yield ShardFault(file=MANIFEST, reason="other fingerprint", detail=detail)


def _index_fault(shard: Shard) -> str:
    """What is wrong with the shard's index; empty where nothing is."""
    try:
        len(shard.members.table)
    except DataError as error:
        return str(error)
    return ""


def _of_shard(path: Path, shard: Shard) -> Iterator[ShardFault]:
    """The first of its faults that explains the others."""
    if unread := _index_fault(shard):
        yield ShardFault(file=shard.file, reason="damaged index", detail=unread)
    try:
        size, sha256 = path.stat().st_size, _sha256(path)
    except OSError as error:
        yield ShardFault(file=shard.file, reason="missing shard", detail=f"{path} cannot be read: {error.strerror}")
        return
    if size == shard.size and sha256 == shard.sha256:
        wrong = [] if unread else list(_misplaced(path, shard.members))
        if wrong:
            detail = f"the index of {path} disagrees with its shard at {_named(wrong, 'sample')}"
            yield ShardFault(file=shard.file, reason="wrong index", detail=detail)
        return
    damaged = [] if size != shard.size or unread else list(_damaged_samples(path, shard))
    if damaged:
        yield ShardFault(file=shard.file, reason="damaged samples", detail=f"{path} has {_named(damaged, 'damaged sample')}")
    try:
        for _ in scan_tar(path):
            pass
    except DataError as error:
        yield ShardFault(file=shard.file, reason="cut or damaged tar", detail=str(error))
        return
    if size != shard.size:
        yield ShardFault(file=shard.file, reason="other size", detail=f"{path} has {size} bytes, and the manifest says {shard.size}")
    elif not damaged:
        yield ShardFault(file=shard.file, reason="damaged bytes", detail=f"{path} differs from its sha256 outside its samples, in a header")


def _named(keys: Sequence[str], what: str) -> str:
    return f"{len(keys)} {what}s: {', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''}"


def _misplaced(path: Path, members: Members) -> Iterator[str]:
    """Samples whose places are not those of members of the tar file under their keys."""
    found = {(member.offset, member.size): split_name(member.name)[0] for member in scan_tar(path)}
    for key, places in zip(members.all_keys(), members.table.tolist(), strict=True):
        if any(at >= 0 and found.get((at, size)) != key for at, size, _ in places):
            yield repr(key)


def _damaged_samples(path: Path, shard: Shard) -> Iterator[str]:
    with path.open("rb") as file:
        for index, places in enumerate(shard.members.table.tolist()):
            for at, size, crc in places:
                if at >= 0 and crc != UNKNOWN_CRC and zlib.crc32(os.pread(file.fileno(), size, at)) != crc:
                    yield repr(shard.members.key(index))
                    break


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()
