"""Every picture's features, kept in memory: a frozen encoder says the same thing in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from multimodal.bad_samples import BadSample
from multimodal.images import BadImage, decode_image
from multimodal.model import VisionLanguageModel
from multimodal.progress import progress
from multimodal.sample import SampleSource
from multimodal.shards import DamagedSample

__all__ = ["PatchTable", "encode_all"]

_SHARED_AT_ONCE = 1024  # pictures; their features pass through the memory of the device


class PatchTable:
    """Features by sample index: float16 [N + L, Dv], as `Features.joined` has them, or the bad sample that has none.

    float16 moves gradients by about 3e-4 of their size.
    """

    def __init__(self, patches: Tensor, bad: dict[int, BadSample]) -> None:
        self.patches, self.bad = patches, bad

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def shape(self) -> tuple[int, int]:
        """N + L, Dv"""
        return self.patches.shape[1], self.patches.shape[2]

    def __getitem__(self, index: int) -> Tensor | BadSample:
        return self.bad[index] if index in self.bad else self.patches[index].float()

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> PatchTable:
        """The table of these samples alone: index i is the i-th of them."""
        return PatchTable(self.patches[list(indices)], {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad})


class _Pictures(Dataset["Tensor | BadSample"]):
    def __init__(self, source: SampleSource, preprocess: Any) -> None:
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        try:
            sample = self.source[index]
        except DamagedSample as error:
            return error.bad
        try:
            pixels: Tensor = self.preprocess(decode_image(sample.image))
            return pixels
        except BadImage as error:
            return BadSample(key=sample.key, reason=error.reason, detail=str(error))


def encode_all(model: VisionLanguageModel, source: SampleSource, *, workers: int = 0, batch_size: int = 32, label: str = "encoding") -> PatchTable:
    """The features of every picture, each encoded once, with a progress bar. Memory: 2 (N + L) Dv bytes a picture (128 KB for 7 x 7 x 1280).

    Each of several processes encodes its share, and all get the whole.
    """
    tower, state = model.tower, PartialState()
    table = torch.zeros(len(source), tower.n_kept, tower.width, dtype=torch.float16)
    bad: dict[int, BadSample] = {}
    own = range(state.process_index, len(source), state.num_processes)
    loader = DataLoader(Subset(_Pictures(source, tower.preprocess), own), batch_size=batch_size, num_workers=workers, collate_fn=list)
    first = 0
    for items in progress(loader, label):
        good = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
        bad.update({own[first + i]: item for i, item in enumerate(items) if isinstance(item, BadSample)})
        if good:
            pixels = torch.stack([items[i] for i in good]).to(model.device)
            table[[own[first + i] for i in good]] = model.encode(pixels).to("cpu", torch.float16)
        first += len(items)
    if state.num_processes > 1:
        bad = dict(sorted(((index, sample) for part in gather_object([bad]) for index, sample in part.items()), key=lambda pair: pair[0]))
        for chunk in table.split(_SHARED_AT_ONCE):  # what others encoded is zero here, so that a sum puts all together
            shared = chunk.to(state.device)
            torch.distributed.all_reduce(shared)
            chunk.copy_(shared)
    return PatchTable(table, bad)
