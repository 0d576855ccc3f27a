"""Every picture's features, kept in memory: a frozen encoder says the same thing in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from multimodal.bad_samples import BadSample
from multimodal.feature_cache.contents import StoredDtype, all_contents
from multimodal.feature_cache.encoding import GROUP, encoded_groups
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import SampleSource

__all__ = ["PatchTable", "encode_all"]

_SHARED_AT_ONCE = 1024  # pictures; their features pass through the memory of the device


class PatchTable:
    """Features by sample index: [N + L, Dv] in the dtype that is kept, as `Features.joined` has them, or the bad sample that has none.

    float16 moves gradients by about 3e-4 of their size.
    """

    def __init__(self, patches: Tensor, bad: dict[int, BadSample]) -> None:
        self.patches, self.bad = patches, bad
        self.kind: Literal["patches", "taps"] = "patches"

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


def encode_all(
    model: VisionLanguageModel, source: SampleSource, *, workers: int = 0, label: str = "encoding", dtype: StoredDtype = "float16"
) -> PatchTable:
    """The features of every picture, each encoded once, with a progress bar. Memory: 2 (N + L) Dv bytes a picture (128 KB for 7 x 7 x 1280).

    Each of several processes encodes its share, and all get the whole. Raises DataError for a feature that the dtype cannot hold.
    """
    tower, state, contents = model.tower, process_state(), all_contents(model.tower, dtype)
    table = torch.zeros(len(source), *contents.shape, dtype=contents.torch_dtype)
    bad: dict[int, BadSample] = {}
    own = range(state.process_index, -(-len(source) // GROUP), state.num_processes)
    for pictures, features, found in progress(encoded_groups(tower, source, own, workers=workers), label, len(own)):
        if features is not None:
            table[pictures] = contents.of(features).cpu()
        bad.update(found)
    if state.num_processes > 1:
        bad = dict(sorted(((index, sample) for part in gather_object([bad]) for index, sample in part.items()), key=lambda pair: pair[0]))
        for chunk in table.split(_SHARED_AT_ONCE):  # what others encoded is zero here, so that a sum puts all together
            shared = chunk.to(state.device)
            torch.distributed.all_reduce(shared)
            chunk.copy_(shared)
    return PatchTable(table, bad)
