"""The bridge: features of a frozen encoder, projected into the language model's embedding space, fill the image slots."""

from __future__ import annotations

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


class Projection(nn.Module):
    """Writes the projected feature of a slot's ordinal, whatever the slot held: the first image slot gets the first feature."""

    def __init__(self, source: str, layers: nn.Sequential) -> None:
        super().__init__()
        self.source, self.layers = source, layers

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        features = tokens.inputs[self.source]
        value: Tensor = self.layers(features.to(h.dtype))  # [B, N, D]
        index = tokens.ordinal.clamp(max=value.shape[1] - 1)  # other domains' ordinals may be larger; they are not selected
        return torch.take_along_dim(value, index[..., None], dim=1)


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """A connector from the encoder's patch features to the embedding space.

    linear   norm -> Linear(Dv, D)
    mlp      norm -> Linear(Dv, hidden) -> GELU -> Linear(hidden, D), as LLaVA 1.5 and its successors have it

    The norm (LayerNorm, trained) makes encoders of any scale start alike.
    """

    kind: Literal["linear", "mlp"]
    hidden: int = 0  # width of the mlp's middle; 0: the language model's
    init_scale: float = 1.0  # the last linear starts at this times torch's default; near the word embeddings' norm trains best

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.kind not in ("linear", "mlp"):
            raise ConfigError(f"the bridge's kind is {self.kind!r}: give linear or mlp")
        if self.hidden < 0 or (self.hidden and self.kind == "linear"):
            raise ConfigError(f"the bridge's hidden width is {self.hidden} with kind {self.kind}: only an mlp has one, of 1 or more")
        if self.init_scale <= 0:
            raise ConfigError(f"the bridge's init_scale is {self.init_scale}: give a positive number")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each patch."""
        return (Slots(IMAGE, _image(anatomy).count),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One projection, at the embedding."""
        width_in, width = _image(anatomy).width, anatomy.width
        hidden = self.hidden or width
        layers = [nn.LayerNorm(width_in), nn.Linear(width_in, width)]
        if self.kind == "mlp":
            layers = [nn.LayerNorm(width_in), nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width)]
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.mul_(self.init_scale)
        return [Placement("image", EMBEDDING, Projection("image", nn.Sequential(*layers)), (IMAGE,))]


def _image(anatomy: Anatomy) -> InputSpec:
    if "image" not in anatomy.inputs:
        raise ConfigError("a bridge needs an encoder's features, and this model has none: compose it with a vision tower first")
    return anatomy.inputs["image"]
