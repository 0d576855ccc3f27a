"""LoRA (arXiv 2106.09685), with a group of weights for each token domain as Context-PEFT has it (arXiv 2312.08900).

    y = W x + b + sum over groups of m (s B (A x) + c)        s = multiplier * alpha / R, or multiplier * alpha / sqrt(R)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import FixedLinear, Placement, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.targets import (
    Target,
    TokenDropout,
    added,
    at_outputs,
    checked_groups,
    dropouts,
    every_token,
    find_targets,
    for_group,
    per_group,
)
from adalink.tokens import Tokens

__all__ = ["LoRA", "LowRank", "joint"]


class LowRank(nn.Module):
    """h + scale * up(down(x)) + bias. It starts as the identity: up and bias are zero. down is A [R, D_in], up is B [D_out, R].

    fixed: the key of a down projection that is not trained, and the same in every adapter of that key; None: it is trained.
    """

    def __init__(self, target: Target, rank: int, scale: float, bias: bool, dropout: TokenDropout, fixed: str | None = None) -> None:
        super().__init__()
        self.target, self.scale, self.dropout = target, scale, dropout
        n_in = target.linear.n_in
        self.down = nn.Linear(n_in, rank, bias=False) if fixed is None else FixedLinear(fixed, n_in, rank)
        self.up = nn.Linear(rank, target.width, bias=False)
        self.bias = nn.Parameter(torch.zeros(target.width)) if bias else None  # not scaled
        if fixed is None:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        change = self.up(self.down(x)) * self.scale
        if self.bias is not None:
            change = change + self.bias
        return h + self.target.spread(self.dropout(change, tokens))

    @property
    def factor(self) -> float:
        """What A x is multiplied by."""
        return self.scale

    def joins(self, other: object) -> bool:
        """Whatever its rank, scale and target."""
        return isinstance(other, LowRank)

    def joint(self, edits: Sequence[LowRank], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """See `adalink.edit.Joint`."""
        return joint(edits, h, tokens, x, shares)


def joint(edits: Sequence[Any], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """h + sum over edits of share * (up(factor * down(x)) + bias), as one pair of matrices: shares are taken where a token has R numbers, not D.

    factor: of each edit a number, or one for each rank [R]. Edits drop tokens of their own. See `adalink.edit.Joint`.
    """
    shares = [edit.dropout(share, tokens) for edit, share in zip(edits, shares, strict=True)]
    downs = [edit.down.weight for edit in edits]
    middle = nn.functional.linear(x, downs[0] if len(edits) == 1 else torch.cat(downs))
    scaled = [(share * edit.factor).expand(-1, -1, len(down)) for edit, share, down in zip(edits, shares, downs, strict=True)]
    parts = [middle * (scaled[0] if len(edits) == 1 else torch.cat(scaled, -1))]
    rows = [edit.target.spread(edit.up.weight.T) for edit in edits]
    for edit, share in zip(edits, shares, strict=True):
        if edit.bias is not None:
            parts.append(share)
            rows.append(edit.target.spread(edit.bias[None]))
    return added(h, parts, rows)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank changes of the linears inside the layers; one set of weights for each group of token domains.

    rank, alpha, multiplier and dropout are one number for all groups, or one for each: {image: 8, text: 4}.
    """

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # domains of each: text (prompt, answer), image, all, answer, prompt, prefix
    rank: int | Mapping[str, int] = 8  # R; 1, 8 and 64 were published
    alpha: float | Mapping[str, float] = 16.0  # the change is scaled by alpha / R
    scaling: Literal["standard", "rank_stabilized"] = "standard"  # rank_stabilized: by alpha / sqrt(R) instead (rsLoRA, arXiv 2312.03732)
    multiplier: float | Mapping[str, float] = 1.0  # of the scale
    bias: Literal["none", "all", "auto"] = "none"  # a trained bias beside B A; auto: where the frozen linear has one
    targets: tuple[str, ...] = ("all",)  # all, last path components (q_proj, mlp.c_proj), or query, key, value, down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers
    frozen_down: bool = False  # L-LoRA: down is drawn once for all adapters and not trained, so that sums of adapters are exact; give a higher rate

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "LoRA's")
        object.__setattr__(self, "groups", checked_groups("LoRA", self.groups))
        for group, rank in per_group("LoRA", "rank", self.rank, self.groups).items():
            if rank < 1:
                raise ConfigError(f"LoRA's rank is {rank} for the group {group}: give 1 or more (1, 8 and 64 were published)")
        for setting, value in (("alpha", self.alpha), ("multiplier", self.multiplier)):
            for group, number in per_group("LoRA", setting, value, self.groups).items():
                if number <= 0:
                    raise ConfigError(f"LoRA's {setting} is {number} for the group {group}: give a positive number")
        dropouts("LoRA", self.dropout, self.groups)
        if self.scaling not in ("standard", "rank_stabilized"):
            raise ConfigError(f"LoRA's scaling is {self.scaling!r}: give standard or rank_stabilized")
        if self.bias not in ("none", "all", "auto"):
            raise ConfigError(f"LoRA's bias is {self.bias!r}: give none, all or auto")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One edit for each group and target, at the linear's output."""
        targets = find_targets(anatomy, self.targets, self.exclude, self.exclude_layers)
        by_group = dropouts("LoRA", self.dropout, self.groups)
        return at_outputs(self.groups, targets, lambda group, target: self._edit(group, target, by_group[group]))

    def _edit(self, group: str, target: Target, dropout: TokenDropout) -> LowRank:
        rank = for_group(self.rank, group)
        divisor = rank if self.scaling == "standard" else math.sqrt(rank)
        has_bias = self.bias == "all" or (self.bias == "auto" and target.linear.has_bias)
        scale = for_group(self.multiplier, group) * for_group(self.alpha, group) / divisor
        return LowRank(target, rank, scale, has_bias, dropout, f"lora.{group}.{target.role}" if self.frozen_down else None)
