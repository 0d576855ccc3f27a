"""Dynamic Subset Tuning (arXiv 2411.08610): all weights learn, and after each step those nearest to their start are set back to it.

In each silo, a tensor or all weights of a group of token domains, the k = max(1, round(e S)) of its S weights stay that are farthest from the start.
So at any time k weights differ, and which ones they are moves in training: a weight that is set back retains its momentum.
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
from adalink.edit import Adapter, Method, Placement, Slots, Written
from adalink.errors import CheckpointError, ConfigError, check_tuples
from adalink.methods.budgets.schedule import Schedule, Scheduled
from adalink.methods.targets import Target, TokenDropout, at_outputs, checked_groups, dropouts, every_token, find_targets
from adalink.tokens import Tokens

__all__ = ["Delta", "Sparse", "SparseDelta", "Subset"]

Silo = Literal["tensor", "group"]


class Subset(Schedule):
    """Sets weights back after each step. Everything is a function of the weights, so all processes, whose weights are equal, set back the same.

    start     of each weight; None: zero
    silos     the names of the weights that compete for a share
    dynamic   False: the set of the first step stays
    """

    def __init__(
        self, adapter: nn.Module, silos: Sequence[Sequence[str]], fraction: float, *, dynamic: bool = True, starts_at_zero: bool = False
    ) -> None:
        self.adapter, self.silos, self.fraction, self.dynamic = adapter, [list(silo) for silo in silos], fraction, dynamic
        self.weights = {name: adapter.get_parameter(name) for silo in silos for name in silo}
        self.start = None if starts_at_zero else {name: weight.detach().clone() for name, weight in self.weights.items()}
        # True at weights that differed when it was last reported (of a static subset: that may differ).
        self.chosen = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.n_steps = torch.zeros((), dtype=torch.int64)

    def begin(self, n_steps: int, seed: int) -> None:
        """Warns of silos whose share is less than one weight."""
        small = [silo for silo in self.silos if sum(self.weights[name].numel() for name in silo) * self.fraction < 1]
        if small:
            warnings.warn(
                f"{len(small)} of {len(self.silos)} silos have fewer than 1 / {self.fraction:g} weights, such as {small[0][0]}: one weight of each may differ",
                stacklevel=2,
            )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Raises ConfigError where the optimizer has put other parameters in the place of the weights."""
        if swapped := [name for name, weight in self.weights.items() if self.adapter.get_parameter(name) is not weight]:
            raise ConfigError(f"the optimizer has put another parameter in the place of {swapped[0]}, and a subset needs one that changes weights in place")
        self.n_steps += 1
        if self.fraction == 1:
            return
        for silo in self.silos:
            if self.dynamic or self.n_steps == 1:
                distances = torch.cat([self._distance(name).flatten() for name in silo])
                parts = farthest(distances, share_of(self.fraction, len(distances))).split([self.weights[name].numel() for name in silo])
                stays = {name: part.view_as(self.weights[name]) for name, part in zip(silo, parts, strict=True)}
                if not self.dynamic:
                    self.chosen |= stays
            else:
                stays = {name: self.chosen[name] for name in silo}
            for name, part in stays.items():
                self.weights[name].copy_(torch.where(part, self.weights[name], self._start(name)))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """changed: the weights that differ from the start; moved: how many of them did not when this was last asked for."""
        differs = {name: weight != self._start(name) for name, weight in self.weights.items()}
        moved = sum(int((now & ~self.chosen[name]).sum()) for name, now in differs.items())
        if self.dynamic:
            self.chosen = differs
        return {"changed": sum(int(now.sum()) for now in differs.values()), "moved": moved}

    def state(self) -> dict[str, Tensor]:
        """Which weights were chosen, and the sums of the start's, which tell it from another."""
        sums = [start.cpu().double().sum() for start in (self.start or {}).values()]
        return {"steps": self.n_steps, "start": torch.tensor(sums, dtype=torch.float64), **self.chosen}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError, also where the weights of this run started from others."""
        own = self.state()["start"]
        if "start" in state and not torch.equal(own, state["start"]):
            raise CheckpointError("the subset is of weights that started elsewhere: resume with the seed, and the adapter to start from, of the run")
        super().load_state(state)

    def _start(self, name: str) -> Tensor:
        return torch.zeros_like(self.weights[name]) if self.start is None else self.start[name]

    def _distance(self, name: str) -> Tensor:
        weight, exact = self.weights[name], torch.promote_types(self.weights[name].dtype, torch.float32)
        return weight.to(exact).abs() if self.start is None else (weight.to(exact) - self.start[name].to(exact)).abs()


def share_of(fraction: float, n: int) -> int:
    """k of n weights: one or more."""
    return max(1, round(fraction * n))


def farthest(distances: Tensor, k: int) -> Tensor:
    """bool [P]: the k largest of [P]; of equal ones the first. Zeros are never among them."""
    threshold = distances.kthvalue(len(distances) - k + 1).values
    above, equal = distances > threshold, distances == threshold
    return (above | (equal & (equal.cumsum(0) <= k - above.sum()))) & (distances > 0)


def _checked(owner: str, fraction: float, silo: str) -> None:
    if not 0 < fraction <= 1:
        raise ConfigError(f"{owner}'s fraction is {fraction}: give the share of the weights that may differ from their start, above 0 and up to 1")
    if silo not in ("tensor", "group"):
        raise ConfigError(f"{owner}'s silo is {silo!r}: give tensor or group")


def _silos(name: str, adapter: Adapter, silo: Silo) -> list[list[str]]:
    """The trained weights of the adapter's method of this name, by tensor, or by the token domains that they are for."""
    placed = [one for one in adapter.placements if one.role.startswith(f"{name}.")]
    domains = {role: one.domains for one in placed for role in (one.role, *one.shared)}
    found: dict[object, list[str]] = {}
    for weight, parameter in adapter.named_parameters():
        role = next((role for role in domains if weight.startswith(f"{role}.")), None)
        if parameter.requires_grad and role is not None:
            found.setdefault(weight if silo == "tensor" else domains[role], []).append(weight)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Another method, of whose weights a share alone ends up different from the start. A folder has that share, and loads as the method inside.

    The start is drawn again from the seed that the folder names.
    """

    inner: Method  # LoRA, AdaLink, or any other that has no budget of its own
    fraction: float  # of the weights that may differ
    silo: Silo = "tensor"  # what the fraction is of: each tensor, or all weights of a group of token domains
    dynamic: bool = True  # false: the set of the first step stays, for comparison

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if not dataclasses.is_dataclass(self.inner) or not hasattr(self.inner, "place"):
            raise ConfigError(f"Sparse wraps a method, got {self.inner!r}: give for instance LoRA(rank=8)")
        if isinstance(self.inner, Scheduled):
            raise ConfigError(f"Sparse wraps a method without a budget of its own, and {type(self.inner).__name__} has one: give for instance LoRA(rank=8)")
        _checked("Sparse", self.fraction, self.silo)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The wrapped method's."""
        return self.inner.slots(anatomy)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """The wrapped method's."""
        return self.inner.place(anatomy)

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """What sets weights back; nothing where the method is not trained."""
        silos = _silos(name, adapter, self.silo)
        return Subset(adapter, silos, self.fraction, dynamic=self.dynamic) if silos else Schedule()

    def written(self, name: str, adapter: Adapter) -> Written:
        """The method inside, with few weights that are not the start's."""
        return Written(self.inner, {key: value.detach() for key, value in adapter.tensors().items() if key.startswith(f"{name}.")}, "start")


class Delta(nn.Module):
    """h + D x, with D [D_out, D_in] zero at the start."""

    def __init__(self, target: Target, dropout: TokenDropout) -> None:
        super().__init__()
        self.target, self.dropout = target, dropout
        self.delta = nn.Parameter(torch.zeros(target.width, target.linear.n_in))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + self.target.spread(self.dropout(nn.functional.linear(x, self.delta), tokens))


@dataclass(frozen=True, kw_only=True)
class SparseDelta:
    """A change of few entries in the linears inside the layers, which stay as they are; one for each group of token domains.

    While it trains, and once it is loaded, a matrix as large as the linear's lies beside each linear.
    """

    fraction: float  # of the entries of each linear, or of all linears, that may differ from zero
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # group name -> its token domains: image, text (prompt and answer), ...
    silo: Silo = "tensor"  # what the fraction is of: each linear, or all linears of a group together
    dynamic: bool = True  # false: the set of the first step stays, for comparison
    targets: tuple[str, ...] = ("query", "value")  # all, last path components (q_proj, mlp.c_proj), or query, key, value, down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers
    memory_gib: float = 4.0  # most GiB for the matrices in training, in float32: with a gradient and two moments of AdamW 16 bytes an entry

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "SparseDelta's")
        object.__setattr__(self, "groups", checked_groups("SparseDelta", self.groups))
        dropouts("SparseDelta", self.dropout, self.groups)
        _checked("SparseDelta", self.fraction, self.silo)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One edit for each group and target, at the linear's output. Raises ConfigError where they need more memory than is allowed."""
        targets = find_targets(anatomy, self.targets, self.exclude, self.exclude_layers)
        needed = 16 * len(self.groups) * sum(target.width * target.linear.n_in for target in targets) / 2**30
        if needed > self.memory_gib:
            raise ConfigError(
                f"SparseDelta on {len(targets)} linears for {len(self.groups)} groups trains in {needed:.2f} GiB, and memory_gib is {self.memory_gib:g}: "
                "name fewer targets, exclude layers, or allow more"
            )
        by_group = dropouts("SparseDelta", self.dropout, self.groups)
        return at_outputs(self.groups, targets, lambda group, target: Delta(target, by_group[group]))

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """What sets entries back to zero; nothing where the method is not trained."""
        silos = _silos(name, adapter, self.silo)
        return Subset(adapter, silos, self.fraction, dynamic=self.dynamic, starts_at_zero=True) if silos else Schedule()

    def written(self, name: str, adapter: Adapter) -> Written:
        """The same, with few entries that are not zero."""
        return Written(self, {key: value.detach() for key, value in adapter.tensors().items() if key.startswith(f"{name}.")}, "zero")
