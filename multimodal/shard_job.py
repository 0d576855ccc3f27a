"""One shard of a set that is being written: a tar file, its place in the manifest, and what was left out of it."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

import numpy as np
from PIL import Image

from adalink.errors import AdalinkError, DataError
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.images import BadImage, ImageLimits, check_header, read_image_bytes
from multimodal.manifest import ABSENT, Members, Shard, shard_as_json, shard_from_json
from multimodal.sample import Sample, SampleSource
from multimodal.shard_folder import shard_part
from multimodal.shard_index import ShardLimits
from multimodal.shard_record import encode_record, shard_key
from multimodal.tar_write import TarFile

_BUFFER = 2**20  # bytes

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
        if found is not None and found[0] == self._digest(indices):
            self._advance(len(indices), found[1].skipped)
            return found[1]
        made_of = _MadeOf()
        try:
            with path.open("wb", buffering=_BUFFER) as file:
                written = self._write(path.name, file, indices, made_of)
                os.fsync(file.fileno())
            _write_entry(path, made_of.digest(), written)
        except OSError as error:
            raise DataError(f"the shard {path} cannot be written: {error.strerror or error}; is the disk full?") from error
        return written

    def _digest(self, indices: range) -> str:
        made_of = _MadeOf()
        for index in indices:
            made_of.add(self.source[index])
        return made_of.digest()

    def _write(self, name: str, file: BinaryIO, indices: range, made_of: _MadeOf) -> WrittenShard:
        tar = TarFile(file)
        keys: dict[str, None] = {}
        places, skipped = [], []
        for index in indices:
            if self.stopped.is_set():
                raise Stopped
            sample = self.source[index]
            made_of.add(sample)
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
        return WrittenShard(shard=Shard(file=name, size=tar.size, sha256=tar.sha256, members=members), skipped=tuple(skipped))

    def _add(self, tar: TarFile, key: str, sample: Sample) -> tuple[tuple[int, int, int], ...]:
        """The places of image, json and txt in the tar file."""
        image = read_image_bytes(sample.image, limits=self.pictures)
        kind = check_header(image, limits=self.pictures, name=str(sample.image) if isinstance(sample.image, (str, Path)) else "its picture").kind
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


class _MadeOf:
    """What a shard is made of, without reading the pictures: texts, and each file's name, size and time."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, sample: Sample) -> None:
        stamp: object = None
        if isinstance(sample.image, Image.Image):
            sample = replace(sample, image=read_image_bytes(sample.image))
        if isinstance(sample.image, (str, Path)):
            with suppress(OSError, ValueError):
                status = os.stat(sample.image)
                stamp = status.st_size, status.st_mtime_ns
        self._sha256.update(repr((sample, stamp)).encode("utf-8", "backslashreplace"))

    def digest(self) -> str:
        return self._sha256.hexdigest()


def _entry(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_entry(path: Path, digest: str, written: WrittenShard) -> None:
    """Beside a shard that is whole; a shard without it is written again."""
    skipped = [bad.to_row() for bad in written.skipped]
    content = {"digest": digest, "shard": shard_as_json(written.shard), "skipped": skipped}
    # No fsync, unlike the shard's: an entry that a power cut spoils is not read, and its shard is written again.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="ascii")
    part.replace(_entry(path))


def _read_entry(path: Path) -> tuple[str, WrittenShard] | None:
    try:
        found = json.loads(_entry(path).read_bytes())
        shard = shard_from_json(found["shard"])
        skipped = tuple(map(BadSample.from_row, found["skipped"]))
        if path.stat().st_size != shard.size:
            return None
        return found["digest"], WrittenShard(shard=replace(shard, file=path.name), skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError):
        return None
