"""Shards as a data set with random access: one read at the manifest's offsets per sample, no scanning, nothing decoded."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.manifest import PARTS, UNKNOWN_CRC
from multimodal.sample import Sample
from multimodal.shard_index import ShardLimits
from multimodal.shard_record import Record, decode_caption, decode_record, shard_key
from multimodal.shard_set import open_shard_set

__all__ = ["DamagedSample", "ShardSource"]

LIMITS = ShardLimits()
_OPEN_FILES = 64  # per process; a set may have more shards than a process may have open files
_GAP = 2**16  # bytes between two members up to which one read is cheaper than two


class DamagedSample(DataError):
    """A sample whose bytes in the shard are not those that were written; `bad` can be counted, and the next sample may be whole."""

    def __init__(self, bad: BadSample) -> None:
        super().__init__(bad)
        self.bad = bad

    def __str__(self) -> str:
        return self.bad.detail


class ShardSource:
    """The samples of a folder of shards, or of a list of tar files, in the manifest's order.

    With a manifest, opening compares each file's size with it, and each read is compared with its crc32. Tar files without one
    (img2dataset's, or any that webdataset reads) are indexed by one look at their headers; `adalink shards img2dataset` writes the
    manifest once and for all.

    problems   samples of foreign shards that cannot be used (no image, no text), and those over the limits
    ignored    members that no sample uses, counted by suffix: what is not jpg, jpeg, png, webp, txt or json is never opened
    """

    def __init__(self, shards: Path | Sequence[Path], *, limits: ShardLimits = LIMITS) -> None:
        """Raises DataError where a shard is missing, cut or damaged, where two have one key, and where no sample is left."""
        found = open_shard_set(shards, limits)
        self._paths = found.paths
        self._members = tuple(shard.members for shard in found.manifest.shards)
        self._ends = np.cumsum([len(members) for members in self._members])
        self.problems = found.manifest.skipped
        self.ignored = found.manifest.ignored
        self.fingerprint = found.manifest.fingerprint
        self._files = _OpenFiles()
        if len(self) == 0:
            first = f"; {len(self.problems)} cannot be used, the first because {self.problems[0].detail}" if self.problems else ""
            raise DataError(f"the shards in {self._paths[0].parent} hold no sample{first}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Raises DamagedSample, and DataError where the shard is missing or cut since it was opened."""
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, at, side="right"))
        members, path = self._members[number], self._paths[number]
        row = at - (int(self._ends[number - 1]) if number else 0)
        key = members.key(row)
        parts = self._read(path, members.table[row], key)
        try:
            return _sample(key, at, parts)
        except DataError as error:
            raise DamagedSample(BadSample(key=key, reason="damaged text", detail=f"{key!r} of {path}: {error}")) from error

    def _read(self, path: Path, places: NDArray[np.int64], key: str) -> dict[str, bytes]:
        """The sample's parts; members that lie together in one read."""
        wanted = [(part, *place) for part, place in zip(PARTS, places.tolist(), strict=True) if place[0] >= 0]
        start, end = min(at for _, at, _, _ in wanted), max(at + size for _, at, size, _ in wanted)
        if end - start <= sum(size for _, _, size, _ in wanted) + _GAP:
            block = self._files.read(path, start, end - start)
            parts = {part: block[at - start : at - start + size] for part, at, size, _ in wanted}
        else:
            parts = {part: self._files.read(path, at, size) for part, at, size, _ in wanted}
        for part, at, _, crc in wanted:
            if crc != UNKNOWN_CRC and zlib.crc32(parts[part]) != crc:
                detail = f"the {part} of {key!r} in {path}, from byte {at} on, is not what was written; fetch or write the shard again"
                raise DamagedSample(BadSample(key=key, reason="damaged bytes", detail=detail))
        return parts


def _sample(key: str, index: int, parts: Mapping[str, bytes]) -> Sample:
    """What was written, with the key it had before it became a member's name; img2dataset's JSON and text likewise.

    An image id is the JSON's, and where it has none, as in foreign shards, the sample's place in the set.
    """
    record = decode_record(parts["json"]) if "json" in parts else Record()
    captions = record.captions
    if not captions and "txt" in parts:
        captions = decode_caption(parts["txt"])
    return Sample(
        key=record.key if record.key is not None and shard_key(record.key) == key else key,
        image_id=index if record.image_id is None else record.image_id,
        image=parts["image"],
        captions=captions,
        questions=record.questions,
    )


class _OpenFiles:
    """Files open for reading at an offset, the least recently used closed first; safe between threads and after a fork."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # a worker process opens its own

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises DataError where the file ends before."""
        try:
            with self._lock:
                file = self._open.pop(path, None) or _OpenFile(path)
                self._open[path] = file
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            data = os.pread(file.number, size, offset)
            while 0 < len(data) < size and (more := os.pread(file.number, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read: {error.strerror}; is it still there?") from error
        if len(data) < size:
            end = os.fstat(file.number).st_size
            raise DataError(f"the shard {path} was cut at byte {end} since it was opened; write or fetch it again")
        return data


class _OpenFile:
    """Closed when nobody reads from it any more, so that another thread may still be reading when it leaves the table."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # AttributeError: it was never opened
            os.close(self.number)
