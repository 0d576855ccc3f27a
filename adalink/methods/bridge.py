"""The bridge: features of a frozen encoder, projected into the language model's embedding space, fill the image slots."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, InputSpec
from adalink.edit import EMBEDDING, Placement, Slots
from adalink.errors import ConfigError
from adalink.tokens import IMAGE, Tokens

__all__ = ["Bridge"]


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Projection(nn.Module):
    """Writes the projected feature of a slot's ordinal, whatever the slot held: the first image slot gets the first feature.

    boundary   float [2, D]: vectors before and after the features, or None
    """

    def __init__(self, source: str, layers: nn.Sequential, boundary: Tensor | None = None) -> None:
        super().__init__()
        self.source, self.layers = source, layers
        self.boundary = None if boundary is None else nn.Parameter(boundary)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        features = tokens.inputs[self.source]
        value: Tensor = self.layers(features.to(h.dtype))  # [B, N, D]
        if self.boundary is not None:
            before, after = self.boundary.expand(len(value), -1, -1).split(1, dim=1)
            value = torch.cat([before, value, after], dim=1)  # [B, N + 2, D]
        return tokens.given(value)


class GridPool(nn.Module):
    """[B, n * n, D] -> [B, m * m, D]: the mean of each of m x m regions of a square grid of patches."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m

    def forward(self, patches: Tensor) -> Tensor:
        grid = patches.unflatten(1, (self.n, self.n)).permute(0, 3, 1, 2)
        return nn.functional.adaptive_avg_pool2d(grid, self.m).flatten(2).transpose(1, 2)


class FramePool(nn.Module):
    """[B, N, D] -> [B, T, D]: the mean over the places of each of a clip's T moments."""

    def __init__(self, times: int, is_time_first: bool) -> None:
        super().__init__()
        self.times, self.is_time_first = times, is_time_first

    def forward(self, patches: Tensor) -> Tensor:
        return patches.unflatten(1, (self.times, -1)).mean(2) if self.is_time_first else patches.unflatten(1, (-1, self.times)).mean(1)


class StridePool(nn.Module):
    """[B, N, D] -> [B, ceil(N / k), D]: every k-th patch, from the first on."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, patches: Tensor) -> Tensor:
        return patches[:, :: self.stride]


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """A connector from the encoder's patch features to the embedding space.

    linear   [pool ->] norm -> dropouts -> Linear(Dv, D)
    mlp      [pool ->] norm -> feature dropout -> Linear(Dv, hidden) -> activation -> dropout -> Linear(hidden, D)

    The mlp is the connector of LLaVA 1.5 and its successors. The norm (LayerNorm, trained) makes encoders of any scale start alike.
    Context-PEFT's released connector is an mlp with bias False and a learned boundary; its paper's is linear with norm none and dropout 0.1.
    """

    kind: Literal["linear", "mlp"]
    hidden: int = 0  # width of the mlp's middle; 0: the language model's
    init_scale: float = 1.0  # the last linear starts at this times torch's default; near the word embeddings' norm trains best
    norm: Literal["layer", "none"] = "layer"  # of the features, before everything else
    norm_eps: float = 1e-5  # added to the norm's variance
    activation: Literal["gelu", "relu", "silu"] = "gelu"  # of the mlp; gelu is the exact one
    bias: bool = True  # of the linears
    dropout: float = 0.0  # before the last linear
    feature_dropout: float = 0.0  # of the normed features; what few images need most
    pool: int | Literal["frames", "stride"] = (
        0  # rows and columns to average a square grid of patches to, for fewer slots; frames: one mean a moment of a clip; stride: see there; 0: all patches
    )
    stride: int = 0  # with pool: stride, every so many-th patch has a slot
    boundary: Literal["none", "learned"] = "none"  # learned: a trained vector before the features and one after, two more slots

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.kind not in ("linear", "mlp"):
            raise ConfigError(f"the bridge's kind is {self.kind!r}: give linear or mlp")
        if self.hidden < 0 or (self.hidden and self.kind == "linear"):
            raise ConfigError(f"the bridge's hidden width is {self.hidden} with kind {self.kind}: only an mlp has one, of 1 or more")
        if self.init_scale <= 0:
            raise ConfigError(f"the bridge's init_scale is {self.init_scale}: give a positive number")
        if self.norm not in ("layer", "none") or self.norm_eps <= 0:
            raise ConfigError(f"the bridge's norm is {self.norm!r} with eps {self.norm_eps}: give layer or none, and an eps above 0")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"the bridge's activation is {self.activation!r}: give one of {', '.join(ACTIVATIONS)}")
        for name in ("dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"the bridge's {name} is {getattr(self, name)}: give 0 or more and less than 1")
        if self.boundary not in ("none", "learned"):
            raise ConfigError(f"the bridge's boundary is {self.boundary!r}: give none or learned")
        if (isinstance(self.pool, str) and self.pool not in ("frames", "stride")) or (isinstance(self.pool, int) and self.pool < 0):
            raise ConfigError(f"the bridge's pool is {self.pool!r}: give the rows and columns to keep, or 0 to keep every patch, or of clips frames or stride")
        if self.stride < 0 or (self.pool == "stride") != (self.stride > 1):
            raise ConfigError(f"the bridge's pool is {self.pool} and its stride {self.stride}: give pool: stride with a stride of 2 or more, or neither")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each patch or pooled region, and two for a boundary."""
        image = _image(anatomy)
        if self.pool == "stride":
            count = -(-image.count // self.stride)
        else:
            count = image.count if not self.pool else _times(image) if isinstance(self.pool, str) else self.pool**2
        return (Slots(IMAGE, count + (2 if self.boundary == "learned" else 0)),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One projection, at the embedding."""
        layers = self._layers(_image(anatomy), anatomy.width)
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.mul_(self.init_scale)
        boundary = torch.randn(2, anatomy.width) * 0.02 if self.boundary == "learned" else None
        return [Placement("image", EMBEDDING, Projection("image", layers, boundary), (IMAGE,))]

    def _pool(self, image: InputSpec) -> nn.Module:
        if isinstance(self.pool, int):
            return GridPool(_side(image.count, self.pool), self.pool)
        return StridePool(self.stride) if self.pool == "stride" else FramePool(_times(image), image.is_time_first)

    def _layers(self, image: InputSpec, width: int) -> nn.Sequential:
        """Named by their place in the whole chain, so that a tensor's name does not depend on what has no weights."""
        width_in, hidden = image.width, self.hidden or width
        chain: list[tuple[str, nn.Module]] = [("pool", self._pool(image))] if self.pool else []
        chain += [("0", nn.LayerNorm(width_in, eps=self.norm_eps))] if self.norm == "layer" else []
        chain += [("feature_dropout", nn.Dropout(self.feature_dropout))] if self.feature_dropout else []
        if self.kind == "mlp":
            chain += [("1", nn.Linear(width_in, hidden, bias=self.bias)), ("2", ACTIVATIONS[self.activation]())]
        chain += [("dropout", nn.Dropout(self.dropout))] if self.dropout else []
        name, n_in = ("3", hidden) if self.kind == "mlp" else ("1", width_in)
        return nn.Sequential(OrderedDict([*chain, (name, nn.Linear(n_in, width, bias=self.bias))]))


def _times(image: InputSpec) -> int:
    """The moments of a clip."""
    if not image.times:
        raise ConfigError(f"the bridge's pool is frames, and this encoder's {image.count} patches are of no moments of a clip: give stride, or leave it out")
    return image.times


def _side(count: int, pool: int) -> int:
    """Rows of a square grid of `count` patches, which can be pooled to `pool` rows."""
    side = math.isqrt(count)
    if side * side != count or pool > side:
        raise ConfigError(f"the bridge's pool is {pool}, and this encoder gives {count} patches: only a square grid of more rows can be pooled")
    return side


def _image(anatomy: Anatomy) -> InputSpec:
    if "image" not in anatomy.inputs:
        raise ConfigError(
            "a bridge needs an encoder's features, and this model has none: compose it with a vision tower, or leave the bridge out where the model "
            "sees already"
        )
    return anatomy.inputs["image"]
