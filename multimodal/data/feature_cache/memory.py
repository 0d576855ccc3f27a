"""Every picture's features, kept in memory: a frozen encoder says the same thing in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from multimodal.bad_samples import BadSample
from multimodal.data.feature_cache.encode import GROUP, encoded_groups
from multimodal.data.feature_cache.format import StoredDtype, all_contents
from multimodal.data.images.decode import BadImage
from multimodal.data.inputs import read_pixels
from multimodal.data.shards.reader import DamagedSample
from multimodal.encoders.base import Preprocess
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import SampleSource

__all__ = ["PatchTable", "PixelTable", "encode_all", "pixel_table"]


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


# ----------------------------------------
# The pictures of a data set, decoded anew whenever they are shown: in the place of kept features where the encoder is trained.


@dataclass(frozen=True, kw_only=True)
class PixelTable:
    """Pixels by sample index, float32 [3, H, W] as an encoder takes them. A `multimodal.data.inputs.Kept`, though it keeps nothing.

    indices   of the samples in the source
    bad       the samples that cannot be shown, by their place among the indices
    """

    source: SampleSource
    preprocess: Preprocess
    indices: Sequence[int]
    bad: Mapping[int, BadSample]
    shape: tuple[int, ...]
    kind: Literal["pixels"] = "pixels"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        return self.bad[index] if index in self.bad else read_pixels(self.source[self.indices[index]], self.preprocess)

    def usable(self) -> list[int]:
        """The indices of the samples that can be shown."""
        return [index for index in range(len(self)) if index not in self.bad]

    def only(self, indices: Sequence[int]) -> PixelTable:
        """The table of these samples alone: index i is the i-th of them."""
        bad = {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad}
        return replace(self, indices=[self.indices[index] for index in indices], bad=bad)


def pixel_table(source: SampleSource, preprocess: Preprocess, *, label: str) -> PixelTable:
    """Every picture of a data set, each decoded once here, with a progress bar, to find those that cannot be shown."""
    bad: dict[int, BadSample] = {}
    shape: tuple[int, ...] = ()
    for index in progress(range(len(source)), label):
        try:
            sample = source[index]
            shape = tuple(read_pixels(sample, preprocess).shape)
        except DamagedSample as error:
            bad[index] = error.bad
        except BadImage as error:
            bad[index] = BadSample(key=sample.key, reason=error.reason, detail=str(error), file=sample.file)
    return PixelTable(source=source, preprocess=preprocess, indices=range(len(source)), bad=bad, shape=shape)
