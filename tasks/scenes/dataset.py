"""The data set of scenes: every sample is a function of (seed, split, index), drawn when it is asked for; the last few thousand stay in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.sample import Measure, Sample, measured
from tasks.scenes.scene import Scene, make_scene, png
from tasks.scenes.texts import captions, questions

__all__ = ["Scenes"]

Split = Literal["train", "val"]
FIRST_ID: dict[str, int] = {"train": 0, "val": 1_000_000}  # so that an image id is of one split only


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Drawn images, each with five captions and five questions of ten answers. A `multimodal.sample.SampleSource`.

    One sample costs about 2 ms of one core, most of it for the PNG; one that stays in memory, nothing, and about 15 KB.
    The index decides the sample, whatever the size.
    """

    split: Split
    size: int  # samples, 1..1,000,000
    seed: int = 0  # another seed, other scenes; the frozen parts learned from scenes of lots of their own, which no seed here draws

    def __post_init__(self) -> None:
        if self.split not in FIRST_ID:
            raise ConfigError(f"Scenes has no split {self.split!r}: the splits are 'train' and 'val'")
        if not 1 <= self.size <= 1_000_000:
            raise ConfigError(f"the size of Scenes is {self.size}: give a number of images from 1 to 1,000,000")

    @property
    def fingerprint(self) -> str:
        """Of what decides the samples, and of the first image, which another version of this package may draw otherwise."""
        return hashlib.sha256(f"{self.split} {self.size} {self.seed} ".encode() + png(self.scene(0), self._lot(0, "picture"))).hexdigest()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        """The sample at this index. Raises IndexError outside 0..size-1, as sequences do."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside of these {self.size} scenes")
        return _drawn(self.split, self.seed, index)

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.sample.TextLengths`: texts are made without drawing, 0.3 ms a sample."""
        return measured(map(self._texts, range(len(self))), len(self), measure)

    def _texts(self, index: int) -> Sample:
        """The sample without its image."""
        scene, image_id = self.scene(index), FIRST_ID[self.split] + index
        return Sample(
            key=f"{self.split}/{index:06d}",
            image_id=image_id,
            media=b"",
            captions=captions(scene, self._lot(index, "captions")),
            questions=questions(scene, self._lot(index, "questions"), image_id=image_id),
        )

    def scene(self, index: int) -> Scene:
        """What is truly in the image at this index. Raises IndexError outside of the size."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside of these {self.size} scenes")
        return make_scene(self._lot(index, "scene"))

    def _lot(self, index: int, what: str) -> Random:
        return Random(f"{self.seed}/{self.split}/{index}/{what}")


@lru_cache(maxsize=4096)  # epochs, evaluations and tasks ask for the same samples
def _drawn(split: Split, seed: int, index: int) -> Sample:
    scenes = Scenes(split=split, size=index + 1, seed=seed)
    return replace(scenes._texts(index), media=png(scenes.scene(index), scenes._lot(index, "picture")))
