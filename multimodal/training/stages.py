"""The stages of a training: which weights have a gradient at a step, and how fast each learns (PT-PEFT, arXiv 2411.00029)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adalink.errors import CheckpointError
from multimodal.training.settings import TrainSettings

__all__ = ["Stages"]


class Stages:
    """Passes the stages of a run, of whose settings a run without any is one stage of everything.

    What a stage does not name has no gradient and no optimizer state, and no step changes a bit of it. What it names and the stage before did not has
    a new optimizer state, and a learning rate that rises and falls from this stage's start to the end of the last stage in a row that names it.

        stage   1          2
        prefix  rises ............ falls
        lora    stands still rises falls

    optimizer  whose groups are those of `parameter_groups`
    drops      gradients are made for everything and those of what stands still dropped, for FSDP2, which knows at its start what has one
    number     of the stage that trains now, counted from 0; None before the first step
    """

    def __init__(self, settings: TrainSettings, optimizer: torch.optim.Optimizer, *, drops: bool = False) -> None:
        self.settings, self.optimizer, self.drops = settings, optimizer, drops
        self.number: int | None = None

    def enter(self, done: float, n_steps: float) -> bool:
        """Make ready for the step after `done` of `n_steps`, with its learning rates; whether other weights have a gradient than before."""
        ends, number = self.settings.stage_ends(n_steps), self._number_at(done, n_steps)
        is_other = number != self.number and self._begin(number)
        for group in self.optimizer.param_groups:
            peak, (first, last) = group["peaks"][number], self._span(group["peaks"], number)
            start = ends[first - 1] if first else 0
            group["lr"] = 0.0 if peak is None else peak * self.settings.rate(done - start, ends[last] - start)
        return is_other

    def drop(self) -> None:
        """After a backward pass: what stands still has no gradient."""
        for parameter in self._resting() if self.drops else ():
            parameter.grad = None

    def close(self) -> None:
        """Everything may have a gradient again."""
        for group in self.optimizer.param_groups:
            self._let_learn(group, True)

    @property
    def rate(self) -> float:
        """The learning rate of the first group that trains."""
        return next((group["lr"] for group in self.optimizer.param_groups if group["lr"]), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """As JSON: the stage's number and what it trains."""
        return {"number": self.number or 0, "trains": self._trains(self.number or 0)}

    def load_state_dict(self, state: Mapping[str, Any], done: float, n_steps: float) -> None:
        """Go on in the stage that a checkpoint was written in, after `done` of `n_steps`. Raises CheckpointError where it is none of this run's, or over."""
        number, trains, staged = state.get("number", 0), state.get("trains", []), self.settings.staged
        own = f"it trains {_listed(self._trains(number))}" if number < len(staged) else f"there are {len(staged)}"
        if number >= len(staged) or trains != self._trains(number):
            raise CheckpointError(f"it was written in stage {number + 1} of train.stages, which trained {_listed(trains)}, and now {own}")
        if self._number_at(done, n_steps) < number:
            raise CheckpointError(f"it was written in stage {number + 1} of train.stages, and now an earlier stage is as long as that")
        self.number = number
        self._let_learn_in(number)

    def _number_at(self, done: float, n_steps: float) -> int:
        ends = self.settings.stage_ends(n_steps)
        return min(bisect_right(ends, done), len(ends) - 1)

    def _trains(self, number: int) -> list[str]:
        stage = self.settings.staged[number]
        return [] if stage is None else list(stage.trains)

    def _begin(self, number: int) -> bool:
        """Forget the optimizer's state of all but what goes on."""
        for group in self.optimizer.param_groups:
            first, _ = self._span(group["peaks"], number)
            if group["peaks"][number] is None or first == number:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
        self.number = number
        return self._let_learn_in(number)

    def _let_learn_in(self, number: int) -> bool:
        found = [self._let_learn(group, group["peaks"][number] is not None) for group in self.optimizer.param_groups]
        return any(found)

    def _let_learn(self, group: Mapping[str, Any], learns: bool) -> bool:
        """Whether that is new."""
        other: list[nn.Parameter] = [] if self.drops else [one for one in group["params"] if one.requires_grad != learns]
        for parameter in other:
            parameter.requires_grad_(learns)
        return bool(other)

    def _resting(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            if self.number is not None and group["peaks"][self.number] is None:
                yield from group["params"]

    def _span(self, peaks: tuple[float | None, ...], number: int) -> tuple[int, int]:
        """The first and the last of the stages in a row, this one among them, through which a group trains on."""

        def goes_on(into: int) -> bool:
            stage = self.settings.staged[into]
            return stage is not None and stage.optimizer == "keep" and peaks[into - 1] is not None and peaks[into] is not None

        first = last = number
        while first and goes_on(first):
            first -= 1
        while last + 1 < len(peaks) and goes_on(last + 1):
            last += 1
        return first, last


def _listed(trains: Sequence[str]) -> str:
    return ", ".join(trains) or "everything"
