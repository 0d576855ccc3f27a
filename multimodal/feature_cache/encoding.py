"""Pictures through a frozen encoder, each once, in groups that only the data set decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multimodal.bad_samples import BadSample
from multimodal.features import Features
from multimodal.images import BadImage
from multimodal.pixels import read_pixels
from multimodal.sample import SampleSource
from multimodal.shards import DamagedSample
from multimodal.vision import VisionTower
from multimodal.workers import dead_workers_told, made_in_order

__all__ = ["GROUP", "encoded_groups"]

GROUP = 32  # pictures that are encoded together: always numbers 32 k to 32 k + 31, so that a device's rounding is the same each time

Encoded = tuple[list[int], Features | None, dict[int, BadSample]]
"""Pictures, their features (None where there are none), and those of the group that cannot be used."""


def encoded_groups(tower: VisionTower, source: SampleSource, groups: Sequence[int], *, workers: int) -> Iterator[Encoded]:
    """The features of the pictures of each group, on the device of the encoder. Raises ConfigError where the encoder is adapted."""
    of_groups = (range(GROUP * group, min(GROUP * (group + 1), len(source))) for group in groups)
    with dead_workers_told():  # while a group is encoded too
        for items in made_in_order(partial(_read, source, tower.preprocess), of_groups, workers=workers):
            good = {index: item for index, item in items if isinstance(item, Tensor)}
            bad = {index: item for index, item in items if isinstance(item, BadSample)}
            yield list(good), tower.encode(torch.stack(list(good.values()))) if good else None, bad


def _read(source: SampleSource, preprocess: Any, indices: range) -> list[tuple[int, Tensor | BadSample]]:
    return [(index, _read_one(source, preprocess, index)) for index in indices]


def _read_one(source: SampleSource, preprocess: Any, index: int) -> Tensor | BadSample:
    try:
        sample = source[index]
    except DamagedSample as error:
        return error.bad
    try:
        return read_pixels(sample, preprocess)
    except BadImage as error:
        return BadSample(key=sample.key, reason=error.reason, detail=str(error), file=sample.file)
