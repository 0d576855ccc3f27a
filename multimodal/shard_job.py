"""One shard of a set that is being written: a tar file, its place in the manifest, and what was left out of it."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

import numpy as np

from adalink.atomic import write_whole
from adalink.errors import AdalinkError, DataError
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.images import BadImage, ImageLimits, check_header, read_image_bytes
from multimodal.manifest import ABSENT, Members, Shard, shard_as_json, shard_from_json
from multimodal.sample import Sample, SampleSource
from multimodal.shard_folder import shard_part
from multimodal.shard_index import ShardLimits
from multimodal.shard_record import encode_record, shard_key
from multimodal.tar_write import TarFile

__all__ = ["ShardJob", "Stopped", "WrittenShard"]


class Stopped(AdalinkError):
    """This shard was given up because another one failed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenShard:
    """A shard under its temporary name."""

    shard: Shard
    skipped: tuple[BadSample, ...]


class ShardJob:
    """Writes any shard of one set; shards share nothing but the progress bar."""

    def __init__(self, source: SampleSource, work: Path, bad: BadSamples, progress: Callable[[int], object]) -> None:
        self.source, self.work, self.bad, self.progress = source, work, bad, progress
        self.stopped, self.lock = Event(), Lock()
        self.limits, self.pictures = ShardLimits(), ImageLimits()

    def write(self, number: int, indices: range) -> WrittenShard:
        """Shard `number`, which may be there already from a writing that was killed.

        Raises DataError and BudgetError, and Stopped where another shard failed.
        """
        path = shard_part(self.work, number)
        found = _read_entry(path)
        if found is not None and found[0] == _digest(self.source, indices):
            self._advance(len(indices), found[1].skipped)
            return found[1]
        try:
            with path.open("wb") as file:
                written = self._write(path.name, file, indices)
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"the shard {path} cannot be written: {error.strerror or error}; is the disk full?") from error
        _write_entry(path, _digest(self.source, indices), written)
        return written

    def _write(self, name: str, file: BinaryIO, indices: range) -> WrittenShard:
        tar = TarFile(file)
        keys: dict[str, None] = {}
        places, skipped = [], []
        for index in indices:
            if self.stopped.is_set():
                raise Stopped
            sample = self.source[index]
            key = shard_key(sample.key)
            if key in keys:
                raise DataError(f"two samples have the key {sample.key!r}; a data set's keys must be unique")
            try:
                places.append(self._add(tar, key, sample))
                keys[key] = None
                self._advance(1)
            except BadImage as error:
                skipped.append(BadSample(key=sample.key, reason=error.reason, detail=error.detail))
                self._advance(1, skipped[-1:])
        tar.end()
        members = Members(keys, np.asarray(places, dtype=np.int64))
        return WrittenShard(shard=Shard(file=name, size=tar.size, sha256=tar.sha256, members=members), skipped=tuple(skipped))

    def _add(self, tar: TarFile, key: str, sample: Sample) -> tuple[tuple[int, int, int], ...]:
        """The places of image, json and txt in the tar file."""
        image = read_image_bytes(sample.image, limits=self.pictures)
        kind = check_header(image, limits=self.pictures, name=str(sample.image) if isinstance(sample.image, Path) else "its picture").kind
        record = encode_record(sample)
        if len(record) > self.limits.max_text_bytes:
            raise BadImage("too much text", f"{sample.key} has {len(record)} bytes of text, and the limit is {self.limits.max_text_bytes}")
        at = {suffix: tar.add(f"{key}.{suffix}", data) for suffix, data in sorted(((kind, image), ("json", record)))}
        return (at[kind], len(image), zlib.crc32(image)), (at["json"], len(record), zlib.crc32(record)), ABSENT

    def _advance(self, count: int, skipped: Sequence[BadSample] = ()) -> None:
        with self.lock:
            self.progress(count)
            for bad in skipped:
                self.bad.add(bad)
            self.bad.check()


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


def _write_entry(path: Path, digest: str, written: WrittenShard) -> None:
    """Beside a shard that is whole; a shard without it is written again."""
    skipped = [[bad.key, bad.reason, bad.detail] for bad in written.skipped]
    content = {"digest": digest, "shard": shard_as_json(written.shard), "skipped": skipped}
    write_whole(_entry(path), json.dumps(content).encode("ascii"))


def _read_entry(path: Path) -> tuple[str, WrittenShard] | None:
    try:
        found = json.loads(_entry(path).read_bytes())
        shard = shard_from_json(found["shard"])
        skipped = tuple(BadSample(key=key, reason=reason, detail=detail) for key, reason, detail in found["skipped"])
        if path.stat().st_size != shard.size:
            return None
        return found["digest"], WrittenShard(shard=replace(shard, file=path.name), skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError):
        return None
