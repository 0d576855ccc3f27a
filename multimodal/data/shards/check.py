"""Whether a set of shards is what its manifest says, to the last bit; what is wrong is named, down to the samples."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from adalink.errors import DataError
from multimodal.data.shards.index import scan_tar
from multimodal.data.shards.manifest import UNKNOWN_CRC, Manifest, Members, Shard, find_twice, read_manifest, refuse_unfinished

__all__ = ["ShardFault", "checksummed", "verify_shards"]

_CHUNK = 2**22  # bytes
_NAMED = 5  # damaged samples that a message names


@dataclass(frozen=True, kw_only=True)
class ShardFault:
    """One thing that is wrong with a set.

    reason   short and stable: missing shard, other size, cut or damaged tar, damaged samples, damaged bytes, unlisted shard, key twice
    """

    file: str
    reason: str
    detail: str


def verify_shards(folder: Path) -> tuple[ShardFault, ...]:
    """Reads every byte of every shard that the manifest names; empty where all is well.

    Raises DataError where the manifest itself is missing or damaged, or the set is not finished.
    """
    refuse_unfinished(folder)
    manifest = read_manifest(folder)
    faults = list(_around(folder, manifest))
    for shard in tqdm(manifest.shards, unit="shard", desc="checking", disable=None, leave=False):
        faults += _of_shard(folder / shard.file, shard)
    return tuple(faults)


def checksummed(path: Path, shard: Shard) -> Shard:
    """The same shard with the sha256 of its file and the crc32 of each member, for a shard that was indexed by its headers alone."""
    table = shard.members.table.copy()
    with path.open("rb") as file:
        for place in table.reshape(-1, 3):
            if place[0] >= 0:
                place[2] = zlib.crc32(os.pread(file.fileno(), int(place[1]), int(place[0])))
    return replace(shard, sha256=_sha256(path), members=Members(shard.members.all_keys(), table))


def _around(folder: Path, manifest: Manifest) -> Iterator[ShardFault]:
    listed = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield ShardFault(file=path.name, reason="unlisted shard", detail=f"{path} is not in the manifest, so nothing reads it")
    twice = find_twice(manifest.shards)
    if twice is not None:
        key, one, other = twice
        files = manifest.shards[one].file, manifest.shards[other].file
        yield ShardFault(file=files[1], reason="key twice", detail=f"{folder / files[0]} and {files[1]} both have the key {key!r}")


def _of_shard(path: Path, shard: Shard) -> Iterator[ShardFault]:
    """The first of its faults that explains the others."""
    try:
        size, sha256 = path.stat().st_size, _sha256(path)
    except OSError as error:
        yield ShardFault(file=shard.file, reason="missing shard", detail=f"{path} cannot be read: {error.strerror}")
        return
    if size == shard.size and sha256 == shard.sha256:
        return
    damaged = [] if size != shard.size else list(_damaged_samples(path, shard))
    if damaged:
        named = ", ".join(damaged[:_NAMED]) + (", ..." if len(damaged) > _NAMED else "")
        yield ShardFault(file=shard.file, reason="damaged samples", detail=f"{path} has {len(damaged)} damaged samples: {named}")
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
