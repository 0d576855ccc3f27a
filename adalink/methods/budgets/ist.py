"""IST, importance-aware sparse tuning (arXiv 2410.11772): each step trains the edits of a few layers, drawn by what weakening a layer does to the loss.

    every step       a share of the layers is drawn with weights sigmoid(-I); the others' edits get no gradient
    every interval   some sets of layers are drawn with weights sigmoid(I); each is weakened while a loss is read: r_k = exp(-loss_k)
                     I_i += rate (r_k - mean r) p_i (1 - p_i)          for the members i of set k, with p = sigmoid(I) before the update

A layer whose weakening does not hurt gets a higher I, and is trained less. With I = 0 for good the draws are uniform: the control, RST.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Adapter, Placement, Slots, Written
from adalink.errors import ConfigError
from adalink.methods.budgets.schedule import OTHER, Schedule, place_of
from adalink.methods.unipelt import NOT_EDITS, Writes

__all__ = ["IST", "Draws", "moved"]


@dataclass(frozen=True, kw_only=True)
class IST:
    """Trains the edits of a few layers in each step, for all methods beside it in the adapter. It has no weights, and no folder has it.

    What is outside the layers (a bridge, AdaLink) is trained in every step. A layer that rests keeps its weights and the optimizer's state bit for bit.
    """

    active: float = 0.25  # share of the layers that a step trains, rounded down
    importance: Literal["learned", "uniform"] = "learned"  # uniform: every layer is drawn as often, and no loss is read (RST)
    per: Literal["layer", "layer_domain"] = "layer"  # layer_domain: a layer's edits for text and for image are drawn apart
    interval: int = 10  # optimizer steps between two updates of the importance
    sets: int = 3  # sets of layers that an update weakens, one after the other: as many forward passes of a batch
    suppressed: float = 0.5  # share of the layers in a set, rounded down
    factor: float = 0.25  # of the change of an edit that is weakened
    rate: float = 10.0  # of the importance

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        for name, value in (("active", self.active), ("suppressed", self.suppressed)):
            if not 0 < value <= 1:
                raise ConfigError(f"ist's {name} is {value}: give a share of the layers, more than 0 and at most 1")
        if self.interval < 1 or self.sets < 2 or not self.rate > 0 or not 0 <= self.factor < 1:
            raise ConfigError(
                f"ist's interval is {self.interval}, sets {self.sets}, rate {self.rate} and factor {self.factor}: "
                "give an interval of 1 or more, 2 sets or more, a positive rate, and a factor of 0 or more and less than 1"
            )
        if self.importance not in ("learned", "uniform") or self.per not in ("layer", "layer_domain"):
            raise ConfigError(f"ist's importance is {self.importance!r} and its per {self.per!r}: give learned or uniform, and layer or layer_domain")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """Nothing: it acts on what other methods place."""
        return ()

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """What draws the layers of each step. Raises ConfigError where too few layers have edits."""
        return Draws(self, adapter)

    def written(self, name: str, adapter: Adapter) -> Written | None:
        """Nothing: a folder has what it trained."""
        return None


def moved(importance: Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float) -> Tensor:
    """float [L]: the importance after an update in which each of the sets was weakened, and its loss read."""
    rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64))
    gains, p, result = rewards - rewards.mean(), torch.sigmoid(importance), importance.clone()
    for members, gain in zip(sets, gains.to(importance.dtype), strict=True):
        chosen = torch.tensor(members)
        result[chosen] += rate * gain * p[chosen] * (1 - p[chosen])
    return result


class Draws(Schedule):
    """Draws the layers of each step by a generator that (seed, step) seeds, so that a run which goes on draws as one that never stopped.

    units   the layers that have trained edits: name -> placements
    """

    def __init__(self, method: IST, adapter: Adapter) -> None:
        self.method, self.seed = method, 0
        self.units = _units(method, adapter)
        self.names = list(self.units)
        n, what = len(self.units), "layers" if method.per == "layer" else "layers and domains"
        if not n:
            raise ConfigError("ist chooses among layers, and the methods beside it have no trained edit inside one: give for instance lora, or leave ist out")
        self.n_active, self.n_suppressed = int(method.active * n), int(method.suppressed * n)
        if not self.n_active:
            raise ConfigError(f"ist trains {method.active} of {n} {what} with edits, so n_active would be 0: give an active of {1 / n:.3g} or more")
        if method.importance == "learned" and (not self.n_suppressed or math.comb(n, self.n_suppressed) < method.sets):
            raise ConfigError(
                f"ist compares {method.sets} different sets of {self.n_suppressed} {what}, and {n} have edits, which is too few for that: "
                "give another share for suppressed, or importance: uniform"
            )
        self.importance, self.drawn, self.lowest = torch.zeros(n), torch.zeros(n, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self.active: list[int] = []
        self._owners = _owners(self.units, adapter)

    def begin(self, n_steps: int, seed: int) -> None:
        """Raises ConfigError where the importance would never be updated."""
        self.seed = seed
        if self.method.importance == "learned" and self.method.interval >= n_steps:
            raise ConfigError(
                f"ist's interval is {self.method.interval} steps, and the run has {n_steps}, so the importance would stay as it is: "
                "give a smaller one, or importance: uniform"
            )

    def before_step(self, step: int, loss: Callable[[], float]) -> None:
        """Update the importance where it is due, then draw the layers of the step."""
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"ist.{self.seed}.{step}".encode()).digest()[:7], "big"))
        if self.method.importance == "learned" and step and step % self.method.interval == 0:
            sets = self.draw_sets(generator)
            losses = []
            for members in sets:
                with self.weakened(members):
                    losses.append(loss())
            self.importance.copy_(moved(self.importance, sets, losses, self.method.rate))
        self.active = self.draw_active(generator)
        self.drawn[self.active] += 1
        self.lowest += min(_layer(self.names[i]) for i in self.active)

    def draw_active(self, generator: torch.Generator) -> list[int]:
        """The units that the step trains."""
        return _drawn(-self.importance, self.n_active, generator)

    def draw_sets(self, generator: torch.Generator) -> list[list[int]]:
        """The units of each set; no two sets are the same."""
        sets: list[list[int]] = []
        while len(sets) < self.method.sets:
            members = _drawn(self.importance, self.n_suppressed, generator)
            if set(members) not in map(set, sets):
                sets.append(members)
        return sets

    @contextlib.contextmanager
    def weakened(self, members: Sequence[int]) -> Iterator[None]:
        """Inside the block the changes of these units are multiplied by the factor; after it nothing of that is left."""
        edits = dict.fromkeys(placement.edit for i in members for placement in self.units[self.names[i]])
        hooks = [edit.register_forward_hook(partial(_weaker, self.method.factor)) for edit in edits]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def after_backward(self, step: int) -> None:
        """No gradient for the units that rest, which an optimizer then lets be, moments and decay included."""
        chosen = {self.names[i] for i in self.active}
        for parameter, owners in self._owners.items():
            if owners.isdisjoint(chosen):
                parameter.grad = None

    def report(self) -> Mapping[str, float]:
        """Of the steps so far, the share that trained each layer, and the mean of the lowest layer, down to which a backward pass has to go."""
        n_steps = max(int(self.drawn.sum()) // self.n_active, 1)
        shares = {f"trains {name}": int(count) / n_steps for name, count in zip(self.names, self.drawn, strict=True)}
        return {**shares, "lowest": int(self.lowest) / n_steps}

    def state(self) -> Mapping[str, Tensor]:
        """The importance, how often each unit was drawn, and the sum of each step's lowest layer."""
        return {"importance": self.importance, "drawn": self.drawn, "lowest": self.lowest}


def _drawn(importance: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """n different places, drawn one after the other with weights sigmoid(importance)."""
    found: list[int] = torch.multinomial(torch.sigmoid(importance.double()), n, generator=generator).tolist()
    return found


def _weaker(factor: float, edit: nn.Module, args: Sequence[Any], value: Tensor) -> Tensor:
    base: Tensor = edit.off(args[0]) if isinstance(edit, Writes) else args[0]
    return torch.lerp(base.to(value.dtype), value, factor)


def _units(method: IST, adapter: Adapter) -> dict[str, list[Placement]]:
    """The placements whose layer may rest, by `3`, or by `3.image` where token domains rest apart; those without a trained weight left out."""
    units: dict[str, list[Placement]] = defaultdict(list)
    for one in adapter.placements:
        name = place_of(one, adapter.anatomy, by_domain=method.per == "layer_domain")
        if not name.startswith(OTHER) and one.port.side not in NOT_EDITS and next(one.edit.parameters(), None) is not None:
            units[name].append(one)
    return dict(sorted(units.items(), key=lambda unit: _layer(unit[0])))


def _layer(unit: str) -> int:
    return int(unit.partition(".")[0])


def _owners(units: Mapping[str, Sequence[Placement]], adapter: Adapter) -> dict[nn.Parameter, set[str]]:
    """The units of each weight that can rest: what a placement in no unit has too is left out."""
    owners: dict[nn.Parameter, set[str]] = defaultdict(set)
    for name, placed in units.items():
        for one in placed:
            for weight in _weights(one):
                owners[weight].add(name)
    inside = {id(one) for placed in units.values() for one in placed}
    always = {weight for one in adapter.placements if id(one) not in inside for weight in _weights(one)}
    return {weight: names for weight, names in owners.items() if weight not in always}


def _weights(placement: Placement) -> Iterator[nn.Parameter]:
    for module in (placement.edit, *placement.shared.values()):
        yield from module.parameters()
