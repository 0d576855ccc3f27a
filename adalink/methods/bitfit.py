"""BitFit (arXiv 2106.10199), with a group of biases for each token domain as Context-PEFT has it (arXiv 2312.08900).

    y = W x + b + sum over groups of m beta
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Slots
from adalink.errors import AttachError, check_tuples
from adalink.methods.targets import Target, TokenDropout, added, at_outputs, checked_groups, dropouts, every_token, find_targets
from adalink.tokens import Tokens, without_autocast

__all__ = ["BitFit", "Shift"]


class Shift(nn.Module):
    """h + bias. It starts as the identity: the bias is zero, whatever the frozen one is."""

    def __init__(self, target: Target, dropout: TokenDropout) -> None:
        super().__init__()
        self.target, self.dropout = target, dropout
        self.bias = nn.Parameter(torch.zeros(target.width))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.target.spread(self.dropout(self.bias, tokens))

    def joins(self, other: object) -> bool:
        """Whatever its target."""
        return isinstance(other, Shift)

    def joint(self, edits: Sequence[Shift], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Each token's shares of all biases as one product. See `adalink.edit.Joint`."""
        shares = [edit.dropout(share, tokens) for edit, share in zip(edits, shares, strict=True)]
        with without_autocast(h.device):  # a sum, whatever it is computed with
            return added(h, shares, [edit.target.spread(edit.bias[None]) for edit in edits])


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Trained biases of the linears inside the layers; one set for each group of token domains."""

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # domains of each: text (prompt, answer), image, all, answer, prompt, prefix
    force_bias: bool = False  # also on linears whose frozen form has none; models like Llama have none at all
    targets: tuple[str, ...] = ("all",)  # all, last path components (q_proj, mlp.c_proj), or query, key, value, down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "BitFit's")
        object.__setattr__(self, "groups", checked_groups("BitFit", self.groups))
        dropouts("BitFit", self.dropout, self.groups)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One bias for each group and target, at the linear's output. Raises AttachError where no target has a bias to train."""
        found = find_targets(anatomy, self.targets, self.exclude, self.exclude_layers)
        targets = [target for target in found if self.force_bias or target.linear.has_bias]
        if not targets:
            names = sorted({target.linear.name.rsplit(".", 1)[-1] for target in found})
            raise AttachError(f"BitFit finds no bias: none of {', '.join(names)} has one in this model: set force_bias to give them one")
        by_group = dropouts("BitFit", self.dropout, self.groups)
        return at_outputs(self.groups, targets, lambda group, target: Shift(target, by_group[group]))
