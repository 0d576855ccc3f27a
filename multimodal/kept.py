"""Features that are kept, in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from multimodal.bad_samples import BadSample

__all__ = ["Kept"]


class Kept(Protocol):
    """Features by sample index."""

    @property
    def bad(self) -> Mapping[int, BadSample]:
        """The samples that have none, and why."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's features."""

    @property
    def kind(self) -> Literal["patches", "taps", "pixels"]:
        """patches: as `Features.joined` has them; taps: pooled vectors alone, of the last blocks; pixels: nothing is kept (an adapted encoder)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor | BadSample: ...

    def usable(self) -> list[int]:
        """The indices of the samples that have features."""

    def only(self, indices: Sequence[int]) -> Kept:
        """The features of these samples alone: index i is the i-th of them."""
