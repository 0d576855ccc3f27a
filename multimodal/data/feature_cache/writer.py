"""A folder of features that is being filled, by one process or several, in one go or after interruptions; whole only at the very end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.files import locked
from multimodal.batches.prepared import Prepared
from multimodal.data.feature_cache.format import ABSENT, AnyContents, ShardFile, as_size, seal, trim
from multimodal.data.feature_cache.reader import (
    FINISHED,
    UNFINISHED,
    Binding,
    FeatureCache,
    FeatureManifest,
    read_manifest,
    refuse_other,
    write_manifest,
)
from multimodal.processes import done_by_main, process_state
from multimodal.progress import progress
from multimodal.sample import BadSample

__all__ = ["FeatureWriter", "found_images", "shard_files"]


# ----------------------------------------
# What an interrupted writing left: which images have features as they were written.


def shard_files(folder: Path) -> Sequence[Path]:
    """The files of features in a folder, by name."""
    return sorted(folder.glob("*.safetensors"))


def found_images(folder: Path, contents: AnyContents, n_images: int) -> NDArray[np.bool_]:
    """bool [n]: whose features are there. Every record is read; one that is damaged is taken out of its file, and a file without a head removed.

    Raises DataError where that is refused.
    """
    done = np.zeros(n_images, dtype=np.bool_)
    for path in progress(shard_files(folder), f"checking {folder}"):
        try:
            try:
                file = ShardFile(path, contents, is_written=True)
                images, checks = file.index()
            except DataError:
                path.unlink()
                continue
            for slot in np.flatnonzero(images != ABSENT).tolist():
                image = int(images[slot])
                if 0 <= image < n_images and _is_whole(file, slot, image, int(checks[slot])):
                    done[image] = True
                else:
                    file.erase(slot)
            trim(path, contents)  # of what a full disk or a kill left of a record
        except OSError as error:
            raise DataError(f"the features in {path} cannot be mended: {error.strerror}; can the folder be written?") from error
    return done


def _is_whole(file: ShardFile, slot: int, image: int, check: int) -> bool:
    try:
        file.read(slot, image, check)
    except DataError:
        return False
    return True


SHARD_BYTES = 2**28  # of a file, at least
MOST_SHARDS = 128  # open at a time by every reader
_LOCK = ".lock"


class FeatureWriter:
    """Takes the features of images in any order, and goes on where a writing was interrupted; every process of a run has one.

    Each process writes files of its own, so that processes on several machines do not write to one page of a shared disk. A record that a
    kill or a power cut left half-written is found by its check sum, and written again.

    is_whole  whether the folder was found finished, every record as it was written: nothing is to be done
    """

    def __init__(self, folder: Path, binding: Binding, contents: AnyContents) -> None:
        """All processes together. Raises ConfigError where the folder holds anything else, DataError where the disk is full or refuses it."""
        self.folder, self.binding, self.contents = folder, binding, contents
        self._file: ShardFile | None = None
        self._slot = self._number = 0
        self._lock: int | None = None
        self._done, self.is_whole = done_by_main(self._opened)

    def _opened(self) -> tuple[NDArray[np.bool_], bool]:
        """The images that are there, and whether that is all; what was made here is gone where it is refused."""
        is_new = not os.path.exists(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder / _LOCK, f"another process writes features to {self.folder} now: wait for it, or give another folder")
            return self._prepared()
        except OSError as error:
            raise DataError(f"features cannot be written to {self.folder}: {error.strerror}; is it a folder that can be written?") from error
        except AdalinkError:
            self.close()
            if is_new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _prepared(self) -> tuple[NDArray[np.bool_], bool]:
        name = next((name for name in (FINISHED, UNFINISHED) if (self.folder / name).exists()), None)
        if name is None:
            if others := sorted(path.name for path in self.folder.iterdir() if path.name != _LOCK):
                raise ConfigError(f"the folder {self.folder} holds {others[0]!r} and no features: give a new folder, or empty it")
            done, is_whole = np.zeros(self.binding.images, dtype=np.bool_), False
        else:
            found = read_manifest(self.folder, name)
            refuse_other(found.binding, self.binding, self.folder)
            if found.contents != self.contents:
                raise ConfigError(f"the features in {self.folder} are {found.contents}, and here they would be {self.contents}: give another folder")
            done = found_images(self.folder, self.contents, self.binding.images)
            is_whole = name == FINISHED and all(done[i] or i in found.bad for i in range(len(done)))
        if not is_whole:
            _check_room(self.folder, self.contents, int((~done).sum()))
            write_manifest(FeatureManifest(binding=self.binding, contents=self.contents), self.folder / UNFINISHED)
            (self.folder / FINISHED).unlink(missing_ok=True)  # of a set that was found damaged
        return done, is_whole

    def add(self, images: Sequence[int], records: Tensor | Sequence[Prepared]) -> None:
        """Write records, [B, N + L, Dv] or one for each, of these images, as far as they are not there. Raises DataError where the disk refuses it."""
        new = {image: i for i, image in enumerate(images) if not self._done[image]}
        chosen, retained = list(new), [records[i] for i in new.values()]
        try:
            while chosen:
                if self._file is None or self._slot == self._file.capacity:
                    self._file, self._slot = self._create(), 0
                room = self._file.capacity - self._slot
                self._file.write(self._slot, chosen[:room], retained[:room])  # type: ignore[arg-type]  # all of one kind
                self._done[chosen[:room]] = True
                self._slot += len(chosen[:room])
                chosen, retained = chosen[room:], retained[room:]
        except OSError as error:
            there = f"{int(self._done.sum()):,} of {len(self._done):,} images are there and stay"
            raise DataError(f"features cannot be written to {self.folder}: {error.strerror}; {there}: make room and run the same again") from error

    def missing(self) -> NDArray[np.int64]:
        """The images that no process has written; all processes ask together."""
        for packed in gather_object([np.packbits(self._done)]):
            self._done |= np.unpackbits(packed, count=len(self._done)).astype(np.bool_)
        return np.flatnonzero(~self._done)

    def finish(self, bad: Mapping[int, BadSample]) -> FeatureCache:
        """Make the folder whole, all processes together. bad: why every image that is missing is missing.

        Raises DataError where one is missing without a reason, or the disk refuses it; the folder is then not finished.
        """
        self._file = None
        lost = [index for index in self.missing().tolist() if index not in bad]
        if lost:
            raise DataError(f"{len(lost)} images have no features, the first number {lost[0]}: run `adalink features` with the same settings")
        done_by_main(lambda: self._finish(bad))
        return FeatureCache.open(self.folder)

    def close(self) -> None:
        """Let others write to the folder."""
        self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _finish(self, bad: Mapping[int, BadSample]) -> None:
        try:
            sealed = {path.name: seal(path, self.contents) for path in shard_files(self.folder)}
        except OSError as error:
            raise DataError(f"the features in {self.folder} cannot be finished: {error.strerror}; make room and run the same again") from error
        shards = {name: size for name, size in sealed.items() if size}
        manifest = FeatureManifest(binding=self.binding, contents=self.contents, shards=shards, bad=dict(sorted(bad.items())))
        FeatureCache.of(self.folder, manifest)  # finds every image
        write_manifest(manifest, self.folder / FINISHED)
        (self.folder / UNFINISHED).unlink()

    def _create(self) -> ShardFile:
        """The next file of this process that is not there yet. Raises OSError."""
        rank, images = process_state().process_index, self.binding.images
        capacity = min(images, max(SHARD_BYTES // self.contents.n_bytes, -(-images // MOST_SHARDS), 1))
        while True:
            path = self.folder / f"{rank:03d}-{self._number:05d}.safetensors"
            self._number += 1
            with suppress(FileExistsError):
                return ShardFile.create(path, self.contents, capacity)


def _check_room(folder: Path, contents: AnyContents, n_missing: int) -> None:
    free, needed = shutil.disk_usage(folder).free, n_missing * (contents.n_bytes + 8 * contents.columns)
    if needed > free:
        raise DataError(
            f"the features of {n_missing:,} images take {as_size(needed)} ({contents.size} each: {contents}), "
            f"and {folder} has {as_size(free)} left: give a folder on a larger disk"
        )
