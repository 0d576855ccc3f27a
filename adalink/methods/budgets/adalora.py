"""AdaLoRA (arXiv 2303.10512): LoRA in triplets, of which a budget over all groups and linears retains those that matter most.

    y = W x + b + sum over groups of m c B (E * (A x))        c = alpha / (R + 1e-5), with R the rank at the start, whatever is left of it

After each optimizer step every weight p with the gradient g has the sensitivity s = |p g|; I and U are running means of s and of |s - I|.
A triplet's score is that of its entry of E plus the means over its row of A and its column of B, where the score of a weight is I U.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Adapter, Placement, Slots, Written
from adalink.errors import ConfigError, check_tuples
from adalink.methods.budgets.schedule import Schedule
from adalink.methods.lora import LowRank, joint
from adalink.methods.targets import Target, TokenDropout, at_outputs, checked_groups, dropouts, every_token, find_targets
from adalink.tokens import Tokens

__all__ = ["AdaLoRA", "Allocator", "Triplet"]

START_STD = 0.02  # of A and B
EPSILON = 1e-5  # beside R, as published


class Triplet(nn.Module):
    """h + scale * up(value * down(x)). It starts as the identity: value, E [R], is zero. down is A [R, D_in], up is B [D_out, R]."""

    bias = None

    def __init__(self, target: Target, rank: int, scale: float, dropout: TokenDropout) -> None:
        super().__init__()
        self.target, self.scale, self.dropout = target, scale, dropout
        self.down = nn.Linear(target.linear.n_in, rank, bias=False)
        self.value = nn.Parameter(torch.zeros(rank))
        self.up = nn.Linear(rank, target.width, bias=False)
        for matrix in (self.down.weight, self.up.weight):
            nn.init.normal_(matrix, std=START_STD)

    @property
    def factor(self) -> Tensor:
        """[R]: what A x is multiplied by."""
        return self.value * self.scale

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.target.spread(self.dropout(self.up(self.down(x) * self.factor), tokens))

    def joins(self, other: object) -> bool:
        """Whatever its rank, scale and target."""
        return isinstance(other, Triplet)

    def joint(self, edits: Sequence[Triplet], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """As LoRA's. See `adalink.edit.Joint`."""
        return joint(edits, h, tokens, x, shares)

    def as_lora(self) -> LowRank:
        """The same change as an edit of LoRA, whose up is B with its columns times E."""
        made = LowRank(self.target, len(self.value), self.scale, bias=False, dropout=self.dropout).to(self.value)
        with torch.no_grad():
            made.down.weight.copy_(self.down.weight)
            made.up.weight.copy_(self.up.weight * self.value)
        return made


@dataclass(frozen=True, kw_only=True)
class AdaLoRA:
    """LoRA whose rank moves in training to where it matters: from init_rank everywhere to target_rank in the mean.

    Groups of token domains and linears compete for one budget. After the last step a folder has the triplets that are left, and no more; what is
    loaded from it trains on at these ranks.
    """

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # group name -> its token domains: image, text (prompt and answer), ...
    init_rank: int = 12  # R: triplets of each group and linear at the start; half as many again as target_rank is usual
    target_rank: int = 8  # triplets of each group and linear that are left, in the mean
    alpha: float = 16.0  # the change is scaled by alpha / init_rank, also where fewer triplets are left; 0: by 1
    budget: Literal["shared", "each_group"] = "shared"  # over all groups, or of each group its own
    tinit: float = 0.1  # optimizer steps before the budget shrinks; below 1: a share of the run's
    tfinal: float = 0.3  # optimizer steps at the end at the target; below 1: a share of the run's
    total: int = 0  # optimizer steps of the run, checked where given; 0: as many as it has
    interval: int = 10  # optimizer steps between two choices while the budget shrinks; what is left out learns again in between
    beta1: float = 0.85  # of the running mean of sensitivities
    beta2: float = 0.85  # of the running mean of their spread
    orthogonality: float = 0.1  # weight of how far rows of A and columns of B are from orthonormal, in the loss; 0.5 in peft
    targets: tuple[str, ...] = ("all",)  # all, last path components (q_proj, mlp.c_proj), or query, key, value, down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers
    ranks: Mapping[str, int] | None = None  # of a saved adapter: how many triplets are left where; other places have none

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "AdaLoRA's")
        object.__setattr__(self, "groups", checked_groups("AdaLoRA", self.groups))
        dropouts("AdaLoRA", self.dropout, self.groups)
        if self.init_rank < 1 or (self.ranks is None and not 1 <= self.target_rank < self.init_rank):
            raise ConfigError(
                f"AdaLoRA goes from init_rank {self.init_rank} to target_rank {self.target_rank}: give a target of 1 or more, and a larger start, such as "
                "12 and 8"
            )
        if self.budget not in ("shared", "each_group"):
            raise ConfigError(f"AdaLoRA's budget is {self.budget!r}: give shared or each_group")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError(f"AdaLoRA's beta1 is {self.beta1} and beta2 {self.beta2}: both are between 0 and 1, such as 0.85")
        if self.interval < 1 or self.orthogonality < 0 or self.total < 0:
            raise ConfigError(
                f"AdaLoRA's interval is {self.interval}, orthogonality {self.orthogonality} and total {self.total}: give an interval of 1 or more, and no "
                "negative numbers"
            )
        for name, value in (("tinit", self.tinit), ("tfinal", self.tfinal)):
            if not value >= 0 or (value > 1 and value != int(value)):
                raise ConfigError(f"AdaLoRA's {name} is {value}: give a whole number of steps, or a share below 1")
        if self.total:
            self.phases(self.total)

    def phases(self, total: int) -> tuple[int, int]:
        """tinit and tfinal as steps of a run of `total`. Raises ConfigError where they leave the budget no time to shrink."""
        tinit, tfinal = (int(value * total if value < 1 else value) for value in (self.tinit, self.tfinal))
        if tinit + tfinal >= total:
            raise ConfigError(f"AdaLoRA's tinit is {tinit} and tfinal {tfinal} of {total} steps, which leave none to shrink the budget in: give fewer")
        if self.interval > total - tfinal - tinit:
            n_left = total - tfinal - tinit
            raise ConfigError(f"AdaLoRA's interval is {self.interval} steps, and its budget shrinks in {n_left} of {total}: give a smaller one, or more steps")
        return tinit, tfinal

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One edit for each group and target, at the linear's output; none where a saved adapter has no triplet."""
        targets, by_group = find_targets(anatomy, self.targets, self.exclude, self.exclude_layers), dropouts("AdaLoRA", self.dropout, self.groups)
        scale = (self.alpha if self.alpha > 0 else self.init_rank) / (self.init_rank + EPSILON)
        ranks = dict.fromkeys((f"{group}.{target.role}" for group in self.groups for target in targets), self.init_rank) if self.ranks is None else self.ranks
        placed = [
            one
            for group, domains in self.groups.items()
            for one in at_outputs(
                {group: domains}, [target for target in targets if ranks.get(f"{group}.{target.role}")],
                lambda group, target: Triplet(target, ranks[f"{group}.{target.role}"], scale, by_group[group]),
            )
        ]  # fmt: skip
        if unknown := sorted({role for role, rank in ranks.items() if rank} - {one.role for one in placed}):
            raise ConfigError(f"AdaLoRA's ranks name {unknown[0]}, and its groups and targets give no such place: leave ranks as the folder has them")
        return placed

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """What moves the budget; nothing where the ranks are those of a saved adapter, or where the method is not trained."""
        edits = {role.removeprefix(f"{name}."): edit for role, edit in triplets(name, adapter).items() if edit.value.requires_grad}
        return Allocator(self, edits) if edits and self.ranks is None else Schedule()

    def written(self, name: str, adapter: Adapter) -> Written:
        """The triplets whose value is not zero. Warns where they are more than the target, as between two choices of a training."""
        left = {role: edit.value.detach().nonzero()[:, 0] for role, edit in triplets(name, adapter).items()}
        n, most = sum(map(len, left.values())), self.target_rank * len(left)
        if self.ranks is None and n > most:
            warnings.warn(f"AdaLoRA is saved with {n} triplets, and its target is {most}: a training that has ended leaves no more than that", stacklevel=2)
        tensors: dict[str, Tensor] = {}
        for role, edit in triplets(name, adapter).items():
            if len(rows := left[role]):
                parts = {"down.weight": edit.down.weight[rows], "value": edit.value[rows], "up.weight": edit.up.weight[:, rows]}
                tensors |= {f"{role}.{part}": tensor.detach() for part, tensor in parts.items()}
        ranks = {role.removeprefix(f"{name}."): len(rows) for role, rows in left.items() if len(rows)}
        return Written(dataclasses.replace(self, ranks=ranks), tensors)


def triplets(name: str, adapter: Adapter) -> dict[str, Triplet]:
    """role -> edit, of the adapter's method of this name."""
    placed = {one.role: one.edit for one in adapter.placements if one.role.startswith(f"{name}.")}
    return {role: edit for role, edit in placed.items() if isinstance(edit, Triplet)}


class Allocator(Schedule):
    """Scores triplets after each step, and sets the values of those over the budget to zero.

    Nothing is drawn, and scores are of weights and averaged gradients, so that all processes retain the same triplets.
    """

    def __init__(self, method: AdaLoRA, edits: Mapping[str, Triplet]) -> None:
        self.method, self.edits = method, dict(edits)
        groups = dict.fromkeys(role.split(".")[0] for role in edits)
        self.pools = [[role for role in edits if role.split(".")[0] == group] for group in groups] if method.budget == "each_group" else [list(edits)]
        self.weights = {f"{role}.{name}": weight for role, edit in edits.items() for name, weight in edit.named_parameters()}
        self.sensitivity = {name: torch.zeros_like(weight, dtype=_exact(weight)) for name, weight in self.weights.items()}
        self.uncertainty = {name: torch.zeros_like(start) for name, start in self.sensitivity.items()}
        self.total, self.tinit, self.tfinal = method.total, 0, 0

    def begin(self, n_steps: int, seed: int) -> None:
        """Raises ConfigError where the run has another number of steps than the method's total."""
        if self.method.total not in (0, n_steps):
            raise ConfigError(f"AdaLoRA's total is {self.method.total} steps, and the run has {n_steps}: give the same number, or leave total out")
        self.total, (self.tinit, self.tfinal) = n_steps, self.method.phases(n_steps)

    def loss(self, step: int) -> Tensor | None:
        """The mean over all A and B of the Frobenius norm of A A^T - 1 and B^T B - 1, times its weight."""
        if not self.method.orthogonality:
            return None
        matrices = [matrix for edit in self.edits.values() for matrix in (edit.down.weight, edit.up.weight.T)]
        return self.method.orthogonality * torch.stack([_off_orthonormal(matrix.to(_exact(matrix))) for matrix in matrices]).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Score by the step's gradients and the new weights, up to the last phase; mask where it is due."""
        if step < self.total - self.tfinal:
            self._score()
        if self._is_last(step) or (step > self.tinit and step % self.method.interval == 0):
            for pool in self.pools:
                self._mask(pool, self.budget(step, len(pool)))

    def budget(self, step: int, n_places: int) -> int:
        """How many triplets of so many places stay after a step."""
        most, least = n_places * self.method.init_rank, n_places * self.method.target_rank
        if self._is_last(step):
            return least
        if step <= self.tinit:
            return most
        left: float = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int(least + (most - least) * left**3)

    def report(self) -> dict[str, float]:
        """triplets: those whose value is not zero."""
        return {"triplets": sum(int((edit.value != 0).sum()) for edit in self.edits.values())}

    def scores(self, pool: Sequence[str]) -> list[Tensor]:
        """[R] of each place."""
        found = []
        for role in pool:
            value, down, up = (self.sensitivity[key] * self.uncertainty[key] for key in (f"{role}.{name}" for name in ("value", "down.weight", "up.weight")))
            found.append(value + down.mean(1) + up.mean(0))
        return found

    def state(self) -> dict[str, Tensor]:
        """The two running means of each weight."""
        return {f"{kind}.{name}": mean for kind in ("sensitivity", "uncertainty") for name, mean in getattr(self, kind).items()}

    def _is_last(self, step: int) -> bool:
        """Whether a step is of the last phase. The run's last step is, also where tfinal is so small that the published rule has no such phase."""
        return step > self.total - self.tfinal or step == self.total - 1

    def _score(self) -> None:
        """A weight without a gradient, as those of a group that the batch has no token of, has the sensitivity 0."""
        method, means, spreads = self.method, list(self.sensitivity.values()), list(self.uncertainty.values())
        sensitivity = [
            torch.zeros_like(mean) if weight.grad is None else (weight.to(mean) * weight.grad.to(mean)).abs_()
            for weight, mean in zip(self.weights.values(), means, strict=True)
        ]
        torch._foreach_mul_(means, method.beta1)
        torch._foreach_add_(means, sensitivity, alpha=1 - method.beta1)
        torch._foreach_mul_(spreads, method.beta2)
        off = torch._foreach_abs(torch._foreach_sub(sensitivity, means))
        torch._foreach_add_(spreads, off, alpha=1 - method.beta2)

    def _mask(self, pool: Sequence[str], budget: int) -> None:
        """Triplets with the threshold's score go too, all of them, as published. No value is read on the host."""
        scores = self.scores(pool)
        every = torch.cat([score.to(scores[0].device) for score in scores])
        if len(every) > budget:
            threshold = every.kthvalue(len(every) - budget).values
            for role, score in zip(pool, scores, strict=True):
                self.edits[role].value.masked_fill_(score <= threshold.to(score.device), 0)


def _exact(weight: Tensor) -> torch.dtype:
    """float32, or the weight's where that is more."""
    return torch.promote_types(weight.dtype, torch.float32)


def _off_orthonormal(rows: Tensor) -> Tensor:
    """The Frobenius norm of M M^T - 1, M [R, D]."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
