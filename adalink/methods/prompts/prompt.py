"""Prompt tuning (Lester et al., arXiv 2104.08691): trained vectors in slots of their own, before everything else in the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.attachment.slots import without_positions
from adalink.edit import EMBEDDING, Placement, Slots
from adalink.errors import ConfigError
from adalink.tokens import PROMPT, Tokens

__all__ = ["Prompt"]


class Table(nn.Module):
    """Writes the vector of a slot's ordinal, whatever the slot held. layers: what the vectors pass first, None for nothing."""

    def __init__(self, length: int, width: int, std: float, layers: nn.Sequential | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * std)
        self.layers = layers

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        vectors: Tensor = self.table if self.layers is None else self.layers(self.table)
        return tokens.looked_up(vectors)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Soft tokens at the start of every row, where the word embeddings are: before `project_in` in a model that has one (OPT-350M).

    form        table   the vectors themselves (ePALM_pt-L)
                mlp     table -> Linear(D, D) -> tanh -> Linear(D, D), trained with it (ePALM)
    positions   counted   the slots are tokens like others, and the text after them starts at position S
                none      as released with eP-ALM: the text starts at 0, and the slots have no position (see EPALM for each kind of model)
    """

    length: int  # S; 10 in eP-ALM, 20 to 100 elsewhere
    init_std: float = 0.02  # of the normal start: 1.0 in eP-ALM, about 0.02 (the word embeddings' own) elsewhere
    form: Literal["table", "mlp"] = "table"
    positions: Literal["counted", "none"] = "counted"

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.length < 1:
            raise ConfigError(f"the prompt's length is {self.length}: give 1 or more")
        if self.init_std < 0:
            raise ConfigError(f"the prompt's init_std is {self.init_std}: give 0 or more")
        if self.form not in ("table", "mlp"):
            raise ConfigError(f"the prompt's form is {self.form!r}: give table or mlp")
        if self.positions not in ("counted", "none"):
            raise ConfigError(f"the prompt's positions are {self.positions!r}: give counted or none")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector."""
        return (Slots(PROMPT, self.length),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One table, at the embedding."""
        width = anatomy.width
        layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) if self.form == "mlp" else None
        soft = Placement("soft", EMBEDDING, Table(self.length, width, self.init_std, layers), (PROMPT,))
        return [soft, *(without_positions(anatomy, (PROMPT,)) if self.positions == "none" else ())]
