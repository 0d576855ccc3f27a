"""Samples into webdataset tar files with a manifest: images as they are, not encoded again, and all texts of an image as JSON.

Each shard holds a fixed range of the source, so that shards can be written side by side, and a killed writing can go on with the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from adalink.errors import AdalinkError, ConfigError, DataError
from multimodal.data.images.clips import CLIP_ENDINGS, ClipLimits, clip_ending, read_clip_bytes
from multimodal.data.images.decode import BadImage, ImageLimits, ImageOrFile, check_header, read_image_bytes
from multimodal.data.shards.index import ShardLimits
from multimodal.data.shards.manifest import Manifest, publish, row_as_json, row_from_json, shard_part, workplace
from multimodal.data.shards.members import ABSENT, LocalFolder, Members, Row, Shard, ShardTable, find_twice, row_of, store_index
from multimodal.data.shards.reader import Span, encode_record, shard_key
from multimodal.sample import BadSample, BadSamples, DamagedSample, Sample, SampleSource

__all__ = ["ShardJob", "Stopped", "TarFile", "WrittenShard", "write_shards"]


# ----------------------------------------
# Plain tar files of small members, byte for byte those of webdataset's TarWriter, at half its time: a header is a template and a sum.


_BLOCK = 512
_LARGEST = 8**11 - 1  # bytes; what the size field holds

_TEMPLATE = tarfile.TarInfo("")
_TEMPLATE.mode = 0o444
_TEMPLATE.uname = _TEMPLATE.gname = "bigdata"  # TarWriter's own
_HEADER = _TEMPLATE.tobuf(tarfile.USTAR_FORMAT)
# Name, size and sum differ between members: bytes 0..99, 124..135 and 148..155 (POSIX.1-1988).
_BEFORE_SIZE, _BEFORE_SUM, _REST = _HEADER[100:124], _HEADER[136:148], _HEADER[156:]
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_BEFORE_SUM) + sum(_REST) + 8 * ord(" ")


class TarFile:
    """A tar file that is written from start to end; `size` and `sha256` are those of what is written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Writes a member and gives the offset of its data. name: ASCII, at most 99 letters."""
        offset = self.size + _BLOCK
        for piece in (_header(name, len(data)), data, bytes(-len(data) % _BLOCK)):  # joined they would be one more copy
            self._write(piece)
        return offset

    def end(self) -> None:
        """Writes the end mark: two blocks of zeros, and more up to a whole record."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    @property
    def sha256(self) -> str:
        """Of all bytes written so far."""
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._sha256.update(data)
        self.size += len(data)
        self._file.write(data)


def _header(name: str, size: int) -> bytes:
    encoded = name.encode("ascii")
    assert len(encoded) < 100
    assert size <= _LARGEST
    size_field = b"%011o\0" % size
    check_sum = _FIXED_SUM + sum(encoded) + sum(size_field)
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, size_field, _BEFORE_SUM, b"%06o\0 " % check_sum, _REST))


# ----------------------------------------
# One shard of a set that is being written: a tar file, its place in the manifest, and what was left out of it.


_BUFFER = 2**20  # bytes


class Stopped(AdalinkError):
    """This shard was given up because another one failed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenShard:
    """A shard under its temporary name, with its index beside it."""

    row: Row
    skipped: tuple[BadSample, ...]


class ShardJob:
    """Writes any shard of one set; shards share nothing but the progress bar."""

    def __init__(self, source: SampleSource, work: Path, bad: BadSamples, progress: Callable[[int], object]) -> None:
        self.source, self.work, self.bad, self.progress = source, work, bad, progress
        self.stopped, self.lock = Event(), Lock()
        self.limits, self.images = ShardLimits(), ImageLimits()

    def write(self, number: int, indices: range) -> WrittenShard:
        """Shard `number`, which may be there already from a writing that was killed.

        Raises DataError and BudgetError, and Stopped where another shard failed.
        """
        path = shard_part(self.work, number)
        found = _read_entry(path)
        if found is not None and found[0] == self._digest(indices):
            self._advance(len(indices), found[1].skipped)
            return found[1]
        made_of = _MadeOf()
        try:
            with path.open("wb", buffering=_BUFFER) as file:
                shard, skipped = self._write(path.name, file, indices, made_of)
                file.flush()
                os.fsync(file.fileno())
            written = WrittenShard(row=row_of(store_index(shard, self.work)), skipped=skipped)
            _write_entry(path, made_of.digest(), written)
        except OSError as error:
            raise DataError(f"the shard {path} cannot be written: {error.strerror or error}; is the disk full?") from error
        return written

    def _digest(self, indices: range) -> str:
        made_of = _MadeOf()
        for index in indices:
            made_of.add(self._sample(index))
        return made_of.digest()

    def _sample(self, index: int) -> Sample | BadSample:
        try:
            return self.source[index]
        except DamagedSample as error:
            return error.bad

    def _write(self, name: str, file: BinaryIO, indices: range, made_of: _MadeOf) -> tuple[Shard, tuple[BadSample, ...]]:
        tar = TarFile(file)
        keys: dict[str, None] = {}
        places, skipped = [], []
        for index in indices:
            if self.stopped.is_set():
                raise Stopped
            sample = self._sample(index)
            made_of.add(sample)
            if isinstance(sample, BadSample):
                skipped.append(sample)
                self._advance(1, skipped[-1:])
                continue
            key = shard_key(sample.key)
            if key in keys:
                raise DataError(f"two samples have the key {sample.key!r}; a data set's keys must be unique")
            try:
                places.append(self._add(tar, key, sample))
                keys[key] = None
                self._advance(1)
            except BadImage as error:
                skipped.append(BadSample(key=sample.key, reason=error.reason, detail=error.detail, file=sample.file))
                self._advance(1, skipped[-1:])
        tar.end()
        members = Members(keys, np.asarray(places, dtype=np.int64))
        return Shard(file=name, size=tar.size, sha256=tar.sha256, members=members), tuple(skipped)

    def _add(self, tar: TarFile, key: str, sample: Sample) -> tuple[tuple[int, int, int], ...]:
        """The places of image, json and txt in the tar file. The json says where further images lie, which are written before it."""
        if sample.media is None:
            raise BadImage("no image", f"sample {sample.key!r} has no image, and shards hold images with their texts: train from its file")
        image, kind = self._image(sample.media) if sample.kind == "image" else self._clip(sample)
        further = [self._image(one) for one in sample.further]
        places = [Span(tar.add(f"{key}.{n}.{kind}", data), len(data), zlib.crc32(data)) for n, (data, kind) in enumerate(further, 1)]
        record = encode_record(sample, places)
        if len(record) > self.limits.max_text_bytes:
            raise BadImage("too much text", f"{sample.key} has {len(record)} bytes of text, and the limit is {self.limits.max_text_bytes}")
        at = {suffix: tar.add(f"{key}.{suffix}", data) for suffix, data in sorted(((kind, image), ("json", record)))}
        return (at[kind], len(image), zlib.crc32(image)), (at["json"], len(record), zlib.crc32(record)), ABSENT

    def _image(self, image: ImageOrFile) -> tuple[bytes, str]:
        """Its bytes, and what they are. Raises BadImage."""
        data = read_image_bytes(image, limits=self.images)
        return data, check_header(data, limits=self.images, name=str(image) if isinstance(image, (str, Path)) else "its image").kind

    def _clip(self, sample: Sample) -> tuple[bytes, str]:
        """The same of a clip. Raises BadImage for one of a format that shards do not hold."""
        assert isinstance(sample.media, (bytes, str, Path))
        data = read_clip_bytes(sample.media, limits=ClipLimits(max_bytes=self.limits.max_clip_bytes))
        ending = clip_ending(data)
        if ending is None or CLIP_ENDINGS[ending] != sample.kind:
            known = " or ".join(one for one, kind in CLIP_ENDINGS.items() if kind == sample.kind)
            raise BadImage("no clip", f"the {sample.kind} of sample {sample.key!r} begins with {data[:8]!r}, and shards hold {known}: convert it")
        return data, ending

    def _advance(self, count: int, skipped: Sequence[BadSample] = ()) -> None:
        with self.lock:
            self.progress(count)
            for bad in skipped:
                self.bad.add(bad)
            self.bad.check()


class _MadeOf:
    """What a shard is made of, without reading the images: texts, and each file's name, size and time."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, sample: Sample | BadSample) -> None:
        stamp: object = None
        if isinstance(sample, Sample) and isinstance(sample.media, Image.Image):
            sample = replace(sample, media=read_image_bytes(sample.media))
        if isinstance(sample, Sample) and isinstance(sample.media, (str, Path)):
            with suppress(OSError, ValueError):
                status = os.stat(sample.media)
                stamp = status.st_size, status.st_mtime_ns
        self._sha256.update(repr((sample, stamp)).encode("utf-8", "backslashreplace"))

    def digest(self) -> str:
        return self._sha256.hexdigest()


def _entry(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_entry(path: Path, digest: str, written: WrittenShard) -> None:
    """Beside a shard that is whole; a shard without it is written again."""
    skipped = [bad.to_row() for bad in written.skipped]
    content = {"digest": digest, "shard": row_as_json(written.row), "skipped": skipped}
    # No fsync, unlike the shard's: an entry that a power cut spoils is not read, and its shard is written again.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="ascii")
    part.replace(_entry(path))


def _read_entry(path: Path) -> tuple[str, WrittenShard] | None:
    try:
        found = json.loads(_entry(path).read_bytes())
        row = path.name, *row_from_json(found["shard"])[1:]
        skipped = tuple(map(BadSample.from_row, found["skipped"]))
        shard = ShardTable.of_rows([row], LocalFolder(path.parent))[0]
        if path.stat().st_size != shard.size or len(shard.members.table) != len(shard.members):
            return None
        return found["digest"], WrittenShard(row=row, skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def write_shards(
    source: SampleSource,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    budget: int = 0,
    skipped: Sequence[BadSample] = (),
    workers: int = 4,
) -> Manifest:
    """Writes `out/PREFIX-000000.tar` and so on, and `out/manifest.json`; the same source gives the same bytes.

    samples_per_shard   images in a shard, less those that are bad
    budget              how many images may be unusable (missing, no image by content, over the limits) before the writing stops.
                        Images are not decoded here: damage inside one shows when it is read
    skipped             what the source itself left out; it counts against the budget and stands in the manifest with the rest
    workers             threads that write shards side by side: check sums and disk are waited for together

    Raises ConfigError on an argument, and where `out` holds anything but a writing of ours that was killed, which goes on where it ended;
    BudgetError, and DataError where two samples have one key or the disk is full: nothing is then left in `out`.
    """
    if samples_per_shard < 1 or workers < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard} and workers {workers}; both must be at least 1")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", prefix):
        raise ConfigError(f"the prefix {prefix!r} cannot begin the shards' file names; use letters, digits, '-' and '_'")
    bad = BadSamples(budget=budget, found=skipped)
    ranges = [range(at, min(at + samples_per_shard, len(source))) for at in range(0, len(source), samples_per_shard)]
    with workplace(out) as work, tqdm(total=len(source), unit="image", desc="shards", disable=None) as bar:
        bad.check()
        written = _write_all(ShardJob(source, work, bad, bar.update), ranges, workers)
        shards = ShardTable.of_rows([one.row for one in written if one.row[3]], LocalFolder(work))
        _check_keys(shards, out)
        left_out = (*skipped, *(sample for one in written for sample in one.skipped))
        return publish(out, Manifest(shards=shards, skipped=left_out), prefix)


def _write_all(job: ShardJob, ranges: Sequence[range], workers: int) -> list[WrittenShard]:
    """The shards in order; the first that fails stops the others at their next sample, and its error is raised."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(job.write, number, indices) for number, indices in enumerate(ranges)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            job.stopped.set()
            pool.shutdown(cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, Stopped)):  # those that failed of themselves first
        raise error
    return [future.result() for future in futures]


def _check_keys(shards: ShardTable, out: Path) -> None:
    if not len(shards):
        raise DataError(f"there is no sample to write to {out}")
    twice = find_twice(shards)
    if twice is not None:
        raise DataError(f"two samples have the key {twice[0]!r}; a data set's keys must be unique")
