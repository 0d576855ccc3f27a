"""The tar files of a data set and what is in them: from the manifest where there is one, else from the tar headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.manifest import MANIFEST, Manifest, Members, Shard, find_twice, parse_manifest, read_manifest
from multimodal.remote import RemoteFiles, beside, shown
from multimodal.shard_folder import find_shards, refuse_unfinished
from multimodal.shard_index import IndexedShard, ShardLimits, index_shard

__all__ = ["Place", "ShardSet", "index_shards", "open_remote_set", "open_shard_set"]

Place = Path | str
"""Where a shard is: a file, or the URL of one."""

_ASKED_AT_ONCE = 16  # servers are asked for the sizes of so many shards at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """`paths[i]` is the tar file of `manifest.shards[i]`."""

    paths: tuple[Place, ...]
    manifest: Manifest


def open_remote_set(folder: str, files: RemoteFiles, limits: ShardLimits) -> ShardSet:
    """The shards that the manifest in the folder of a URL names; a shard that is missing or of another size is told now.

    Raises DataError as `open_shard_set` does, and where there is no manifest.
    """
    name = beside(folder, MANIFEST)
    shards = parse_manifest(files.whole(name), shown(name)).shards
    urls = [beside(folder, quote(shard.file)) for shard in shards]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        sizes = list(tqdm(pool.map(files.size, urls), total=len(urls), unit="shard", desc="opening shards", disable=None, leave=False))
    found = [_whole(shown(url), size, shard, limits) for url, size, shard in zip(urls, sizes, shards, strict=True)]
    return _set(urls, found)


def open_shard_set(shards: Path | Sequence[Path], limits: ShardLimits) -> ShardSet:
    """A folder of shards, or tar files by name (which may lie in several folders, and may be part of a set with a manifest).

    `manifest.skipped` is what this opening left out; what was left out when the set was written counted then.
    Raises DataError where a shard is missing or of another size than its manifest says, is not whole, or shares a key with another.
    """
    paths: Sequence[Path]
    if isinstance(shards, Path):
        refuse_unfinished(shards)
        known = _known(shards)
        paths = tuple(known) or find_shards(shards)
    else:
        paths = shards
        known = {path: shard for folder in dict.fromkeys(path.parent for path in paths) for path, shard in _known(folder).items()}
    if not paths:
        raise DataError("the list of shards is empty; give at least one tar file")
    found = [
        _listed(path, known[path], limits) if path in known else index_shard(path, limits)
        for path in tqdm(paths, unit="shard", desc="opening shards", disable=None, leave=False)
    ]
    return _set(paths, found)


def index_shards(folder: Path, limits: ShardLimits) -> ShardSet:
    """The tar files of a folder by their headers alone, whatever a manifest says. Raises DataError as `open_shard_set` does."""
    paths = find_shards(folder)
    return _set(paths, [index_shard(path, limits) for path in tqdm(paths, unit="shard", desc="indexing", disable=None, leave=False)])


def _set(paths: Sequence[Place], found: Sequence[IndexedShard]) -> ShardSet:
    shards = tuple(each.shard for each in found)
    twice = find_twice(shards)
    if twice is not None:
        key, one, other = twice
        raise DataError(f"the shards {paths[one]} and {paths[other]} both have the key {key!r}; keys must be unique in a data set")
    ignored = Counter[str]()
    for each in found:
        ignored.update(each.ignored)
    manifest = Manifest(shards=shards, skipped=tuple(bad for each in found for bad in each.skipped), ignored=ignored)
    return ShardSet(paths=tuple(paths), manifest=manifest)


def _known(folder: Path) -> Mapping[Path, Shard]:
    """Path -> what the folder's manifest says, in its order; empty where there is no manifest."""
    if not (folder / MANIFEST).exists():
        return {}
    return {folder / shard.file: shard for shard in read_manifest(folder).shards}


def _listed(path: Path, shard: Shard, limits: ShardLimits) -> IndexedShard:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"the shard {path}, which {MANIFEST} names, cannot be opened: {error.strerror}; write or fetch it again") from error
    return _whole(str(path), size, shard, limits)


def _whole(name: str, size: int, shard: Shard, limits: ShardLimits) -> IndexedShard:
    """A shard that the manifest names, found with a size."""
    if size != shard.size:
        raise DataError(f"the shard {name} has {size} bytes, and {MANIFEST} says {shard.size}; write or fetch it again")
    members, skipped = _within(shard.members, name, limits)
    return IndexedShard(shard=replace(shard, members=members), skipped=skipped, ignored={})


def _within(members: Members, name: str, limits: ShardLimits) -> tuple[Members, tuple[BadSample, ...]]:
    """The samples whose members keep the limits, and the others."""
    sizes = members.table[..., 1]
    image, text = sizes[:, 0], sizes[:, 1:].max(axis=1, initial=0)
    over = (image > limits.max_image_bytes) | (text > limits.max_text_bytes)
    if not over.any():
        return members, ()
    bad = []
    for index in np.flatnonzero(over).tolist():
        reason = "too many bytes" if image[index] > limits.max_image_bytes else "too much text"
        detail = f"{members.key(index)!r} of {name} has members of {image[index]} and {text[index]} bytes"
        bad.append(BadSample(key=members.key(index), reason=reason, detail=detail))
    return members.only(~over), tuple(bad)
