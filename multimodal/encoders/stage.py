"""What an encoder yields at one depth, and what every encoder can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

__all__ = ["Encoder", "Loaded", "Preprocess", "Stage", "from_map"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The picture at one depth of an encoder.

    patches  float[B, N, D]    registers and the CLS token dropped
    cls      float[B, D]       None where the encoder has no CLS token at this depth
    """

    patches: Tensor
    cls: Tensor | None = None


def from_map(feature_map: Tensor) -> Stage:
    """The stage of a feature map [B, C, h, w]: its places in reading order are the patches [B, h * w, C]."""
    return Stage(patches=feature_map.flatten(2).transpose(1, 2))


class Encoder(Protocol):
    """A frozen image model of any library. An implementation is an nn.Module, so that the tower holds its weights."""

    def whole(self, pixels: Tensor) -> object:
        """Runs everything the model has, its own pooling included: what the search for the final norm listens to."""
        ...

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        """The output of every block, before any final norm."""
        ...

    def last(self, pixels: Tensor) -> Stage:
        """What the model itself gives as its final features; keeps nothing of the depths below."""
        ...


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """An encoder's own preprocessing, without its weights: small to pickle, so worker processes can hold it."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """float32[3, H, W] of a picture of any mode and size."""
        return self.transform(image.convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a loader of one library returns."""

    encoder: nn.Module
    preprocess: Preprocess
