"""Pictures through a frozen encoder, each once, in groups that only the data set decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal.bad_samples import BadSample
from multimodal.features import Features
from multimodal.images import BadImage
from multimodal.pixels import read_pixels
from multimodal.sample import SampleSource
from multimodal.shards import DamagedSample
from multimodal.vision import VisionTower

__all__ = ["GROUP", "encoded_groups"]

GROUP = 32  # pictures that are encoded together: always numbers 32 k to 32 k + 31, so that a device's rounding is the same each time

Encoded = tuple[list[int], Features | None, dict[int, BadSample]]
"""Pictures, their features (None where there are none), and those of the group that cannot be used."""


class _Pictures(Dataset["tuple[int, Tensor | BadSample]"]):
    def __init__(self, source: SampleSource, preprocess: Any) -> None:
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | BadSample]:
        try:
            sample = self.source[index]
        except DamagedSample as error:
            return index, error.bad
        try:
            return index, read_pixels(sample, self.preprocess)
        except BadImage as error:
            return index, BadSample(key=sample.key, reason=error.reason, detail=str(error))


def encoded_groups(tower: VisionTower, source: SampleSource, groups: Sequence[int], *, workers: int) -> Iterator[Encoded]:
    """The features of the pictures of each group, on the device of the encoder. Raises ConfigError where the encoder is adapted."""
    of_groups = [list(range(GROUP * group, min(GROUP * (group + 1), len(source)))) for group in groups]
    for items in DataLoader(_Pictures(source, tower.preprocess), batch_sampler=of_groups, num_workers=workers, collate_fn=list):
        good = {index: item for index, item in items if isinstance(item, Tensor)}
        bad = {index: item for index, item in items if isinstance(item, BadSample)}
        yield list(good), tower.encode(torch.stack(list(good.values()))) if good else None, bad
