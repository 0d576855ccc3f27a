"""The samples of a tar file that somebody else wrote (img2dataset's layout, or any of webdataset's), found by one look at its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adalink.errors import ConfigError, DataError
from multimodal.bad_samples import BadSample
from multimodal.manifest import ABSENT, PARTS, UNKNOWN_CRC, Members, Part, Shard
from multimodal.tar_scan import TarMember, scan_tar

__all__ = ["IndexedShard", "ShardLimits", "index_shard", "split_name"]

SUFFIXES: Mapping[str, Part] = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "json": "json", "txt": "txt"}
"""The only members that are ever read. Everything else (.pyd, .pkl, .pth, .gz, ...) is counted and never opened."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """What a shard may ask of its reader; checked on sizes, before a byte is read."""

    max_image_bytes: int = 64 * 2**20
    max_text_bytes: int = 2**20  # of a json or txt member
    max_members: int = 2**20  # of one shard

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_text_bytes", "max_members"):
            if vars(self)[name] < 1:
                raise ConfigError(f"{name} is {vars(self)[name]}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """A shard's samples, those that cannot be used, and the members that no sample uses, counted by suffix."""

    shard: Shard
    skipped: tuple[BadSample, ...]
    ignored: Mapping[str, int]


def index_shard(path: Path, limits: ShardLimits) -> IndexedShard:
    """Samples in the order of their first member; members of one sample need not follow each other.

    Raises DataError where the tar file is not whole (see `scan_tar`), has more members than the limit, or one member twice.
    """
    samples: dict[str, dict[Part, TarMember]] = {}
    dotted: dict[str, list[TarMember]] = {}
    ignored: Counter[str] = Counter()
    skipped: dict[str, BadSample] = {}
    for count, member in enumerate(scan_tar(path), start=1):
        if count > limits.max_members:
            raise DataError(f"the shard {path} has more than {limits.max_members} members; write smaller shards")
        key, suffix = split_name(member.name)
        part = SUFFIXES.get(suffix)
        if part is None and suffix.rpartition(".")[2] in SUFFIXES:
            dotted.setdefault(_stem(key, suffix), []).append(member)
            continue
        if part is None:
            ignored[suffix] += 1
            continue
        sample = samples.setdefault(key, {})
        if part in sample:
            twice = f"{sample[part].name!r} and {member.name!r}"
            raise DataError(f"the shard {path} has the {part} of the sample {key!r} twice ({twice}); keys must be unique in a shard")
        sample[part] = member
    for stem, members in dotted.items():
        if (bad := _lost(stem, members, samples, path)) is not None:
            skipped[stem] = bad
        else:
            ignored.update(split_name(member.name)[1] for member in members)
    for key, sample in samples.items():
        bad = _bad(key, sample, limits, path)
        if bad is not None:
            skipped[key] = bad
    good = {key: sample for key, sample in samples.items() if key not in skipped}
    shard = Shard(file=path.name, size=path.stat().st_size, sha256="", members=_members(good))
    return IndexedShard(shard=shard, skipped=tuple(skipped.values()), ignored=ignored)


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> ("a/b", "seg.png"): the key ends at the first dot of the last component, as in webdataset.

    The key is data for logs: bytes that are not UTF-8 are shown as escapes.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    key = (folder + slash + stem).encode("utf-8", "backslashreplace").decode("utf-8")
    return key, suffix.lower().encode("utf-8", "backslashreplace").decode("utf-8")


def _stem(key: str, suffix: str) -> str:
    """What stands before the last dot: ("a/b", "2014.1.jpg") gives "a/b.2014.1"."""
    return f"{key}.{suffix.rpartition('.')[0]}"


def _lost(stem: str, members: Sequence[TarMember], samples: Mapping[str, Mapping[Part, TarMember]], path: Path) -> BadSample | None:
    """A sample whose members nobody finds because its key was given dots; None for further members of another (`cat.seg.png`)."""
    parts = {SUFFIXES[member.name.rpartition(".")[2].lower()]: member for member in members}
    key, _ = split_name(members[0].name)
    own = samples.get(key, {})
    if "image" not in parts or "image" in own or (own and len(parts) == 1):
        return None
    name = parts["image"].name
    better = stem.rpartition("/")[2].replace(".", "_") + "." + name.rpartition(".")[2]
    detail = f"{name!r} of {path} is the member {split_name(name)[1]!r} of a sample {key!r}, since a key ends at the first dot, as in webdataset"
    return BadSample(key=stem, reason="dots in the name", detail=f"{detail}: write names without dots, such as {better}")


def _bad(key: str, sample: Mapping[Part, TarMember], limits: ShardLimits, path: Path) -> BadSample | None:
    where = f"{key!r} of {path}"
    if "image" not in sample:
        return BadSample(key=key, reason="no image", detail=f"{where} has no jpg, png or webp member")
    if "json" not in sample and "txt" not in sample:
        return BadSample(key=key, reason="no text", detail=f"{where} has neither a json nor a txt member")
    for part, member in sample.items():
        limit = limits.max_image_bytes if part == "image" else limits.max_text_bytes
        if member.size > limit:
            reason = "too many bytes" if part == "image" else "too much text"
            return BadSample(key=key, reason=reason, detail=f"the {part} of {where} has {member.size} bytes, and the limit is {limit}")
    return None


def _members(samples: Mapping[str, Mapping[Part, TarMember]]) -> Members:
    return Members(samples, np.asarray([[_place(sample.get(part)) for part in PARTS] for sample in samples.values()], dtype=np.int64))


def _place(member: TarMember | None) -> tuple[int, int, int]:
    return ABSENT if member is None else (member.offset, member.size, UNKNOWN_CRC)
