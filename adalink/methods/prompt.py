"""Prompt tuning (Lester et al., arXiv 2104.08691): trained vectors in slots of their own, before everything else in the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import EMBEDDING, Placement, Slots
from adalink.errors import ConfigError
from adalink.tokens import PROMPT, Tokens

__all__ = ["Prompt"]


class Table(nn.Module):
    """Writes the vector of a slot's ordinal, whatever the slot held."""

    def __init__(self, length: int, width: int, std: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * std)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return self.table[tokens.ordinal.clamp(max=len(self.table) - 1)]  # other domains' ordinals may be larger; they are not selected


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Soft tokens at the start of every row."""

    length: int  # S; 10 in eP-ALM, 20 to 100 elsewhere
    init_std: float  # of the normal start: 1.0 in eP-ALM, about 0.02 (the word embeddings' own) elsewhere

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.length < 1:
            raise ConfigError(f"the prompt's length is {self.length}: give 1 or more")
        if self.init_std < 0:
            raise ConfigError(f"the prompt's init_std is {self.init_std}: give 0 or more")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector."""
        return (Slots(PROMPT, self.length),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One table, at the embedding."""
        return [Placement("soft", EMBEDDING, Table(self.length, anatomy.width, self.init_std), (PROMPT,))]
