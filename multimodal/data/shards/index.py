"""The samples of a tar file that somebody else wrote (img2dataset's layout, or any of webdataset's), found by one look at its headers."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adalink.errors import ConfigError, DataError
from multimodal.data.images.clips import CLIP_ENDINGS
from multimodal.data.images.format import ENDINGS
from multimodal.data.shards.members import ABSENT, PARTS, UNKNOWN_CRC, Members, Part, Shard
from multimodal.sample import BadSample

__all__ = [
    "IndexedShard", "ShardLimits", "TarMember", "index_shard", "scan_tar", "split_name",
]  # fmt: skip


# ----------------------------------------
# The members of a tar file, found from its headers alone, and every way in which the file is not whole.
#
# Python's tarfile stops without a word at a damaged header, and at the end of a file that was cut between two members; a training epoch
# would be short and nobody would know. Here each of these is an error with the byte at which it happened.


BLOCK = 512
_MAX_EXTENSION = 2**20  # bytes of a long name or of pax records; a name has a few hundred
_SIZE = re.compile("0*[0-9]{1,19}")  # bytes of a member; Python makes no number of more than 4,300 digits
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar file: where its data lies, in bytes; `name` is data, never a path to open."""

    name: str
    offset: int
    size: int


def scan_tar(path: Path) -> Iterator[TarMember]:
    """The regular files in the order of the tar file; folders, links and devices are passed over.

    Raises DataError, with the file and the byte, where the tar file is empty, compressed, cut, damaged, or goes on after its end.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DataError(f"the shard {path} cannot be opened: {getattr(error, 'strerror', None) or error}; is it there?") from error
    try:
        yield from _Scan(path, file).members()
    except OSError as error:
        raise DataError(f"the shard {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(file)


class _Scan:
    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file).st_size

    def members(self) -> Iterator[TarMember]:
        self._check_start()
        at = 0
        extended: dict[str, str] = {}  # what pax or GNU headers say about the next member
        while True:
            header = self._header(at)
            if header is None:
                return self._check_end(at)
            size = self._data_size(at, header, extended)
            data, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if data + size > self.size:
                raise self._cut(f"the data of {header.name!r}, from byte {data} on, needs {size} bytes")
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                extended |= self._extension(header, data, size)
            elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                    yield TarMember(extended.get("path", header.name), data, size)
                extended = {}

    def _data_size(self, at: int, header: tarfile.TarInfo, extended: Mapping[str, str]) -> int:
        """How many bytes follow the header; links, folders and devices have none, whatever their size field says."""
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise self._damaged(at, "a sparse member, which no reader of shards supports")
        if header.type in _WITHOUT_DATA:
            return 0
        size = extended.get("size", str(header.size))
        if not _SIZE.fullmatch(size):
            raise self._damaged(at, f"a member of {size[:40]} bytes")
        return int(size)

    def _check_start(self) -> None:
        if self.size == 0:
            raise DataError(f"the shard {self.path} holds 0 bytes; write or fetch it again")
        start = os.pread(self.file, 8, 0)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(f"the shard {self.path} is compressed ({name}), which allows no random access; unpack it to a plain tar")

    def _header(self, at: int) -> tarfile.TarInfo | None:
        """The header at a byte; None at the end mark."""
        block = os.pread(self.file, BLOCK, at)
        if not block:
            raise self._cut("it lacks the end mark")
        if len(block) < BLOCK:
            raise self._cut(f"the header at byte {at} needs {BLOCK} bytes")
        if block.count(0) == BLOCK:
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise self._damaged(at, f"no tar header there ({error})") from error

    def _check_end(self, at: int) -> None:
        """Zeros up to the end; joined tar files have more members there, which a reader would never reach."""
        while chunk := os.pread(self.file, 2**20, at):
            if chunk.count(0) != len(chunk):
                raise self._damaged(at, "it goes on after its end mark; are these several tar files in one?")
            at += len(chunk)

    def _extension(self, header: tarfile.TarInfo, data: int, size: int) -> dict[str, str]:
        if size > _MAX_EXTENSION:
            raise self._damaged(data, f"an extended header of {size} bytes")
        content = os.pread(self.file, size, data)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": _text(content.rstrip(b"\0"))}
        try:
            return _pax_records(content)
        except ValueError as error:
            raise self._damaged(data, "pax records that do not add up") from error

    def _cut(self, what: str) -> DataError:
        return DataError(f"the shard {self.path} is cut at byte {self.size}: {what}; write or fetch it again")

    def _damaged(self, at: int, what: str) -> DataError:
        return DataError(f"the shard {self.path} is damaged at byte {at}: {what}; write or fetch it again")


def _pax_records(content: bytes) -> dict[str, str]:
    """`28 path=a/very/long/name.jpg` and a line feed -> {"path": "a/very/long/name.jpg"}; the number counts the whole record."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not _SIZE.fullmatch(digits.decode("ascii")):
            raise ValueError
        length = int(digits)
        if not len(digits) < length <= len(content):
            raise ValueError
        record, content = content[len(digits) + 1 : length], content[length:]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError
        if key in (b"path", b"size"):
            records[key.decode()] = _text(value[:-1])
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


SUFFIXES: Mapping[str, Part] = {**dict.fromkeys((*ENDINGS, *CLIP_ENDINGS), "image"), "json": "json", "txt": "txt"}
"""The only members that are ever read. Everything else (.pyd, .pkl, .pth, .gz, ...) is counted and never opened."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """What a shard may ask of its reader; checked on sizes, before a byte is read."""

    max_image_bytes: int = 64 * 2**20
    max_clip_bytes: int = 256 * 2**20
    max_text_bytes: int = 2**20  # of a json or txt member
    max_members: int = 2**20  # of one shard

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_clip_bytes", "max_text_bytes", "max_members"):
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

    The key is data for logs: bytes that are not UTF-8 are printed as escapes.
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
        return BadSample(key=key, reason="no image", detail=f"{where} has no image member")
    if "json" not in sample and "txt" not in sample:
        return BadSample(key=key, reason="no text", detail=f"{where} has neither a json nor a txt member")
    for part, member in sample.items():
        is_clip = member.name.rpartition(".")[2].lower() in CLIP_ENDINGS
        limit = limits.max_text_bytes if part != "image" else limits.max_clip_bytes if is_clip else limits.max_image_bytes
        if member.size > limit:
            reason = "too many bytes" if part == "image" else "too much text"
            return BadSample(key=key, reason=reason, detail=f"the {part} of {where} has {member.size} bytes, and the limit is {limit}")
    return None


def _members(samples: Mapping[str, Mapping[Part, TarMember]]) -> Members:
    return Members(samples, np.asarray([[_place(sample.get(part)) for part in PARTS] for sample in samples.values()], dtype=np.int64))


def _place(member: TarMember | None) -> tuple[int, int, int]:
    return ABSENT if member is None else (member.offset, member.size, UNKNOWN_CRC)
