"""AdaLink (arXiv 2310.12100): low-rank edits of input embeddings, one set of weights per modality.

    E' = E + up(act(down(E)))          for the tokens of one modality; down: R x D, up: D x R

It reads and writes the embeddings alone: after the word embedding (text) or the bridge (image), before any position embedding.
Identity activation and no bias are the form that the published parameter counts establish ("1.05 M trained for a 32 B model" is
two modules of 2 * 4096 * 64); a nonlinearity and a bias are options, because the body of the paper could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import EMBEDDING, FixedLinear, Placement, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.tokens import ANSWER, IMAGE, TEXT, Tokens

__all__ = ["AdaLink", "Bottleneck"]

ACTIVATIONS = {"identity": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """h + up(act(down(h))). It starts as the identity: up is zero. Parameters: 2 D R, and D + R with a bias.

    fixed: the key of a down projection that is not trained, and the same in every adapter of that key; None: it is trained.
    """

    def __init__(self, width: int, rank: int, activation: Literal["identity", "gelu", "relu"], bias: bool, fixed: str | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=bias) if fixed is None else FixedLinear(fixed, width, rank, bias=bias, std=0.02)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(rank, width, bias=bias)
        if fixed is None:
            nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)
        for linear in (self.down, self.up) if bias else ():
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]  # both have one

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.up(self.act(self.down(h)))

    @torch.no_grad()
    def lookup_table(self, embedding: Tensor) -> Tensor:
        """[V, D] -> [V, D]: the adapted embedding table. Equal to the module for every token, since the edit reads no context.

        Fold it into the model only where the head is untied: a tied head would change with it.
        """
        return embedding + self.up(self.act(self.down(embedding)))


@dataclass(frozen=True, kw_only=True)
class AdaLink:
    """AdaLink on the embeddings of one or two modalities."""

    rank: int  # R; 4 to 256 were published, with little between them
    modalities: tuple[Literal["text", "image"], ...]  # one set of weights each
    activation: Literal["identity", "gelu", "relu"] = "identity"
    bias: bool = False
    scope: Literal["prompt", "all"] = "all"  # prompt: generated tokens keep their raw embeddings, as serving engines need it
    frozen_down: bool = False  # L-LoRA: down is drawn once for all adapters and not trained, so that sums of adapters are exact; give a higher rate

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "AdaLink's")
        if self.rank < 1:
            raise ConfigError(f"AdaLink's rank is {self.rank}: give 1 or more (4, 16, 64 and 256 were published)")
        if unknown := set(self.modalities) - {"text", "image"}:
            raise ConfigError(f"AdaLink knows the modalities text and image, got {', '.join(sorted(unknown))}")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ConfigError(f"AdaLink's modalities are {list(self.modalities)}: name text, image or both, each once")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"AdaLink's activation is {self.activation!r}: give one of {', '.join(ACTIVATIONS)}")
        if self.scope not in ("prompt", "all"):
            raise ConfigError(f"AdaLink's scope is {self.scope!r}: give prompt or all")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One bottleneck per modality, at the embedding."""
        text = (TEXT, ANSWER) if self.scope == "all" else (TEXT,)
        domains = {"text": text, "image": (IMAGE,)}
        return [
            Placement(modality, EMBEDDING, self._edit(modality, anatomy.width), domains[modality])
            for modality in self.modalities
        ]

    def _edit(self, modality: str, width: int) -> Bottleneck:
        return Bottleneck(width, self.rank, self.activation, self.bias, f"adalink.{modality}" if self.frozen_down else None)
