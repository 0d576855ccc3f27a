"""Samples into webdataset tar files with a manifest: pictures as they are, not encoded again, and all texts of a picture as JSON.

Each shard holds a fixed range of the source, so that shards can be written side by side, and a killed writing can go on with the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

import numpy as np
import webdataset
from tqdm import tqdm

from adalink.errors import ConfigError, DataError
from multimodal.atomic import write_whole
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.images import BadImage, ImageLimits, check_header, read_image_bytes
from multimodal.manifest import ABSENT, Manifest, Members, Shard, find_twice, shard_as_json, shard_from_json
from multimodal.sample import Sample, SampleSource
from multimodal.shard_folder import publish, shard_part, workplace
from multimodal.shard_index import ShardLimits
from multimodal.shard_record import encode_record, shard_key

__all__ = ["write_shards"]


def write_shards(
    source: SampleSource,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    budget: int = 0,
    skipped: Sequence[BadSample] = (),
    workers: int = 1,
) -> Manifest:
    """Writes `out/PREFIX-000000.tar` and so on, and `out/manifest.json`; the same source gives the same bytes.

    samples_per_shard   images in a shard, less those that are bad
    budget              how many pictures may be unusable (missing, no picture by content, over the limits) before the writing stops.
                        Pictures are not decoded here: damage inside one shows when it is read
    skipped             what the source itself left out; it counts against the budget and stands in the manifest with the rest
    workers             threads that write shards side by side; pays where the pictures come over a network

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
        job = _Job(source, work, bar.update)
        written: list[_Written] = []
        for one in _in_order(job, ranges, workers):
            written.append(one)
            for sample in one.skipped:
                bad.add(sample)
            bad.check()
        shards = tuple(one.shard for one in written if len(one.shard.members))
        _check_keys(shards, out)
        left_out = (*skipped, *(sample for one in written for sample in one.skipped))
        return publish(out, Manifest(shards=shards, skipped=left_out), prefix)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    shard: Shard
    skipped: tuple[BadSample, ...]


def _in_order(job: _Job, ranges: list[range], workers: int) -> Iterator[_Written]:
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            yield from pool.map(job.shard, range(len(ranges)), ranges)
        finally:
            job.stopped.set()  # where the consumer raised: do not write the other shards to their ends first
            pool.shutdown(cancel_futures=True)


def _check_keys(shards: tuple[Shard, ...], out: Path) -> None:
    if not shards:
        raise DataError(f"there is no sample to write to {out}")
    twice = find_twice(shards)
    if twice is not None:
        raise DataError(f"two samples have the key {twice[0]!r}; a data set's keys must be unique")


class _Job:
    """Writes any shard of one set; shards share nothing but the progress bar."""

    def __init__(self, source: SampleSource, work: Path, progress: Callable[[int], object]) -> None:
        self.source, self.work, self.progress = source, work, progress
        self.stopped, self.lock = Event(), Lock()
        self.limits, self.pictures = ShardLimits(), ImageLimits()

    def shard(self, number: int, indices: range) -> _Written:
        """Shard `number`, which may be there already from a writing that was killed."""
        path = shard_part(self.work, number)
        found = _read_entry(path)
        if found is not None and found[0] == _digest(self.source, indices):
            self._advance(len(indices))
            return found[1]
        try:
            with path.open("wb") as file:
                written = self._write(path.name, file, indices)
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"the shard {path} cannot be written: {error.strerror or error}; is the disk full?") from error
        _write_entry(path, _digest(self.source, indices), written)
        return written

    def _write(self, name: str, file: BinaryIO, indices: range) -> _Written:
        hashed = _HashedFile(file)
        keys: dict[str, None] = {}
        places, skipped = [], []
        with webdataset.TarWriter(hashed, encoder=False, compress=False, mtime=0) as tar:
            for index in indices:
                if self.stopped.is_set():
                    raise DataError("the writing of shards was stopped")
                sample = self.source[index]
                key = shard_key(sample.key)
                if key in keys:
                    raise DataError(f"two samples have the key {sample.key!r}; a data set's keys must be unique")
                try:
                    places.append(self._add(tar, key, sample))
                    keys[key] = None
                except BadImage as error:
                    skipped.append(BadSample(key=sample.key, reason=error.reason, detail=error.detail))
                self._advance(1)
        members = Members(keys, np.asarray(places, dtype=np.int64))
        return _Written(shard=Shard(file=name, size=hashed.size, sha256=hashed.hexdigest(), members=members), skipped=tuple(skipped))

    def _add(self, tar: webdataset.TarWriter, key: str, sample: Sample) -> tuple[tuple[int, int, int], ...]:
        """The places of image, json and txt in the tar file."""
        image = read_image_bytes(sample.image, limits=self.pictures)
        kind = check_header(image, limits=self.pictures, name=str(sample.image) if isinstance(sample.image, Path) else "its picture").kind
        record = encode_record(sample)
        if len(record) > self.limits.max_text_bytes:
            raise BadImage("too much text", f"{sample.key} has {len(record)} bytes of text, and the limit is {self.limits.max_text_bytes}")
        places = {}
        at = tar.tarstream.offset
        for suffix, data in sorted({kind: image, "json": record}.items()):  # the order in which TarWriter writes
            places[suffix] = (at + 512, len(data), zlib.crc32(data))
            at += 512 + -(-len(data) // 512) * 512
        tar.write({"__key__": key, kind: image, "json": record})
        return places[kind], places["json"], ABSENT

    def _advance(self, count: int) -> None:
        with self.lock:
            self.progress(count)


class _HashedFile:
    """A file that is only written to, and its size and sha256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def _digest(source: SampleSource, indices: range) -> str:
    """What a shard is made of, without reading the pictures: texts, and each file's name, size and time."""
    digest = hashlib.sha256()
    for index in indices:
        sample = source[index]
        stamp: object = None
        if isinstance(sample.image, Path) and sample.image.exists():
            status = sample.image.stat()
            stamp = status.st_size, status.st_mtime_ns
        digest.update(repr((sample, stamp)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _entry(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_entry(path: Path, digest: str, written: _Written) -> None:
    """Beside a shard that is whole; a shard without it is written again."""
    skipped = [[bad.key, bad.reason, bad.detail] for bad in written.skipped]
    content = {"digest": digest, "shard": shard_as_json(written.shard), "skipped": skipped}
    write_whole(_entry(path), json.dumps(content).encode("ascii"))


def _read_entry(path: Path) -> tuple[str, _Written] | None:
    try:
        found = json.loads(_entry(path).read_bytes())
        shard = shard_from_json(found["shard"])
        skipped = tuple(BadSample(key=key, reason=reason, detail=detail) for key, reason, detail in found["skipped"])
        if path.stat().st_size != shard.size:
            return None
        return found["digest"], _Written(shard=replace(shard, file=path.name), skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError):
        return None
