"""The pictures of a data set, decoded anew whenever they are shown: in the place of kept features where the encoder is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from multimodal.bad_samples import BadSample
from multimodal.encoders.stage import Preprocess
from multimodal.images import BadImage
from multimodal.pixels import read_pixels
from multimodal.progress import progress
from multimodal.sample import SampleSource
from multimodal.shards import DamagedSample

__all__ = ["PixelTable", "pixel_table"]


@dataclass(frozen=True, kw_only=True)
class PixelTable:
    """Pixels by sample index, float32 [3, H, W] as an encoder takes them. A `multimodal.kept.Kept`, though it keeps nothing.

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
