"""HiRA, a Hadamard product with a low-rank factor (ICLR 2025; in peft as `HiraConfig`), with a group of weights for each token domain.

    y = W x + b + sum over groups of m (W * (B A)) x          * multiplies entry by entry; A [R, n_in], B [n_out, R]

The change has up to R times the rank of W, from as many weights as LoRA of rank R trains. Where an entry of W is zero, it stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalink.anatomy import Anatomy, FrozenModule, in_rows
from adalink.edit import Placement, Slots
from adalink.errors import AttachError, ConfigError, check_tuples
from adalink.methods.targets import (
    Target,
    TokenDropout,
    at_outputs,
    checked_groups,
    dropouts,
    every_token,
    find_targets,
    for_group,
    per_group,
)
from adalink.tokens import Tokens

__all__ = ["Hadamard", "HiRA"]


class Hadamard(nn.Module):
    """h + (W * (up @ down)) x, with W the frozen weight at its port. It starts as the identity: up is zero. down is A [R, n_in], up is B [n_out, R].

    The product with W has n_out n_in entries. It is made anew in the backward pass, so that A, B and x are all that is stored for it.
    """

    def __init__(self, target: Target, rank: int, dropout: TokenDropout) -> None:
        super().__init__()
        self.target, self.dropout = target, dropout
        self.down = nn.Linear(target.linear.n_in, rank, bias=False)
        self.up = nn.Linear(rank, target.width, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.frozen = FrozenModule()

    def read_frozen(self, module: nn.Module, name: str) -> None:
        """Raises AttachError where the linear's weight is not an ordinary matrix of its own."""
        weight = module.get_parameter("weight")
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            kind = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype).removeprefix("torch.")
            raise AttachError(f"the weight of {name} is {kind}, and HiRA multiplies the weight itself: load the model in full precision, or use LoRA")
        self.frozen.module = module

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [width, n_in] of the features that are the target's. Raises AttachError where nothing is attached."""
        if self.frozen.module is None:
            raise AttachError("HiRA multiplies a frozen weight, and this adapter is attached to no model: attach it first")
        return in_rows(self.frozen.module.get_parameter("weight").detach(), self.frozen.module)[self.target.start : self.target.stop].to(dtype)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            change: Tensor = checkpoint(self._change, x, self.down.weight, self.up.weight, use_reentrant=False, preserve_rng_state=False)
        else:
            change = self._change(x, self.down.weight, self.up.weight)
        return h + self.target.spread(self.dropout(change, tokens))

    def _change(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(up.dtype) * (up @ down))


@dataclass(frozen=True, kw_only=True)
class HiRA:
    """Changes of the linears inside the layers of high rank, from few weights; one set of weights for each group of token domains.

    A step multiplies B A out for each linear: rank / tokens times what the linear itself costs, also for one token in decoding.
    """

    rank: int | Mapping[str, int] = 32  # R: one number for all groups, or one for each; 32 in peft
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # group name -> its token domains: image, text (prompt and answer), ...
    targets: tuple[str, ...] = ("all",)  # all, last path components (q_proj, mlp.c_proj), or query, key, value, down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "HiRA's")
        object.__setattr__(self, "groups", checked_groups("HiRA", self.groups))
        for group, rank in per_group("HiRA", "rank", self.rank, self.groups).items():
            if rank < 1:
                raise ConfigError(f"HiRA's rank is {rank} for the group {group}: give 1 or more (32 is usual)")
        dropouts("HiRA", self.dropout, self.groups)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One edit for each group and target, at the linear's output."""
        targets = find_targets(anatomy, self.targets, self.exclude, self.exclude_layers)
        by_group = dropouts("HiRA", self.dropout, self.groups)
        return at_outputs(self.groups, targets, lambda group, target: Hadamard(target, for_group(self.rank, group), by_group[group]))
