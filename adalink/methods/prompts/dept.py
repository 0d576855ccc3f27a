"""DePT, decomposed prompt tuning (arXiv 2309.05173): a short prompt, and a low-rank change of the word embeddings by place.

    [P; E(ids) + c A B]        P [S, D]; A [M, R]; B [R, D]; c = alpha / sqrt(R)

Row p of A B belongs to the p-th token of its modality, whatever the word. S D + (M + D) R weights are as many as those of a longer prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import EMBEDDING, Placement, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.prompts.prompt import Table, check_words
from adalink.tokens import IMAGE, PROMPT, TEXT, Tokens, without_autocast

__all__ = ["ByPlace", "DePT"]


class ByPlace(nn.Module):
    """h + scale * (down @ up)[ordinal]; tokens whose ordinal is M or more stay as they are. It starts as the identity: up is zero.

    down is A [M, R], up is B [R, D]. Places are counted in the row, from the first token of the domain: padding, slots and images before it
    do not move them.
    """

    def __init__(self, max_length: int, rank: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(max_length, rank))
        self.up = nn.Parameter(torch.zeros(rank, width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        with without_autocast(h.device):
            return h + self.scale * (tokens.looked_up(self.down) @ self.up)


@dataclass(frozen=True, kw_only=True)
class DePT:
    """A short prompt, and changes of the prompt's embeddings by their place: fewer tokens than a prompt of as many weights has.

    Generated tokens have no change. The prompt's table learns at far higher rates than the two matrices (3e-1 and 1e-4 to 5e-3 were published):
    `train.learning_rates` gives each its own.
    """

    length: int  # S: vectors of the prompt; 40 and 60 were published, for a budget of 100
    rank: int  # R; 45 with 40 vectors, 30 with 60, for 256 places and width 768
    max_length: int = 256  # M: places that have a change; later tokens have none
    alpha: float = 8.0  # the change is alpha / sqrt(rank) A B
    modalities: tuple[Literal["text", "image"], ...] = ("text",)  # one pair of matrices each: words of the prompt, patches of the image
    init_std: float = 0.02  # of the prompt's normal start
    words: tuple[str, ...] | str = ()  # what the prompt starts as in its place, as in `prompt`
    ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)  # likewise

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_words(self, "DePT's")
        check_tuples(self, "DePT's")
        for name in ("length", "rank", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"DePT's {name} is {getattr(self, name)}: give 1 or more")
        if self.rank > self.max_length:
            raise ConfigError(f"DePT's rank is {self.rank} with max_length {self.max_length}, and the product has rank {self.max_length} at most: give less")
        if self.alpha <= 0 or self.init_std < 0:
            raise ConfigError(f"DePT's alpha is {self.alpha} and its init_std {self.init_std}: give a positive number, and 0 or more")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities) or set(self.modalities) - {"text", "image"}:
            raise ConfigError(f"DePT's modalities are {list(self.modalities)}: name text, image or both, each once")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector of the prompt."""
        return (Slots(PROMPT, self.length),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """The prompt, and one pair of matrices per modality, all at the embedding."""
        domains = {"text": (TEXT,), "image": (IMAGE,)}
        scale = self.alpha / math.sqrt(self.rank)
        return [
            Placement("soft", EMBEDDING, Table(self.length, anatomy.width, self.init_std).from_words(self, anatomy), (PROMPT,)),
            *(
                Placement(modality, EMBEDDING, ByPlace(self.max_length, self.rank, anatomy.width, scale), domains[modality])
                for modality in self.modalities
            ),
        ]
