"""A method's schedule is called around each step of a training, and goes on exactly where it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, two_texts
from torch import Tensor
from train_case import METHODS, SETTINGS, Stop, losses, stop_at, weights

from adalink import Adapter
from adalink.errors import CheckpointError, ConfigError
from adalink.methods.adalink import AdaLink
from adalink.methods.budgets.schedule import Schedule
from multimodal.model import VisionLanguageModel
from multimodal.training.settings import Stage, TrainSettings
from multimodal.training.train import train


@dataclass
class Noted(Schedule):
    """Writes its calls down, pulls one weight to 1 by its loss, and lets another one be at odd steps."""

    adapter: Adapter
    calls: list[str] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    grads: list[float] = field(default_factory=list)
    count: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    share: float = 0.0
    ups: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = dict(self.adapter.named_parameters())
        self.down, self.up = named["adalink.text.down.weight"], named["adalink.image.up.weight"]
        self.ups.append(self.up.detach().clone())

    def begin(self, n_steps: int, seed: int) -> None:
        if n_steps > 8:
            raise ConfigError(f"the schedule ends at 8, and the run at {n_steps}")
        self.calls.append(f"begin {n_steps} {seed}")

    def before_step(self, step: int, loss: Callable[[], float]) -> None:
        self.seen.append(loss())
        self.calls.append(f"before {step}")

    def loss(self, step: int) -> Tensor | None:
        return self.share * (self.down - 1).square().sum() if self.share else None

    def after_backward(self, step: int) -> None:
        self.grads.append(float(self.down.grad.norm()) if self.down.grad is not None else 0.0)
        if step % 2:
            self.up.grad = None

    def after_step(self, step: int) -> None:
        self.count += 1
        self.ups.append(self.up.detach().clone())
        self.calls.append(f"after {step} {int(self.count)} {self.down.grad is not None}")

    def end(self) -> None:
        self.calls.append("end")

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}


@dataclass(frozen=True, kw_only=True)
class WithSchedule(AdaLink):
    made: list[Noted] = field(default_factory=list)
    share: float = 0.0

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        assert any(placement.role.startswith(f"{name}.") for placement in adapter.placements)
        self.made.append(Noted(adapter, share=self.share))
        return self.made[-1]


def run(folder: Path, *, share: float = 0.0, resume: bool = False, measure: Any = None, **fields: Any) -> tuple[VisionLanguageModel, Noted]:
    folder.mkdir(exist_ok=True, parents=True)
    model = compose("opt")
    torch.manual_seed(5)
    method = WithSchedule(rank=4, modalities=("image", "text"), bias=True, share=share)
    excite(model.add_adapter("one", {**METHODS, "adalink": method}).double())
    train(model, Drawn(8), two_texts, TrainSettings(**{**SETTINGS, **fields}), folder, resume=resume, measure=measure)
    return model, method.made[-1]


def test_it_is_called_around_each_optimizer_step_whatever_the_accumulation(tmp_path: Path) -> None:
    _, once = run(tmp_path / "one", steps=2, seed=3)
    _, summed = run(tmp_path / "two", steps=2, seed=3, accumulation=2)
    calls = ["begin 2 3", "before 0", "after 0 1 True", "before 1", "after 1 2 True", "end"]
    assert once.calls == summed.calls == calls
    assert once.seen[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-6)  # the step's first micro-batch, before the step


def test_a_weight_without_gradient_stands_and_the_loss_that_is_added_moves_its_own(tmp_path: Path) -> None:
    ups = run(tmp_path / "plain", steps=4)[1].ups
    assert [not torch.equal(before, after) for before, after in itertools.pairwise(ups)] == [True, False, True, False]
    distances, grads = [], []
    for share in (0.0, 5.0):
        _, noted = run(tmp_path / f"share{share}", steps=4, share=share, clip=0.0)
        distances.append(float((noted.down.detach() - 1).norm()))
        grads.append(noted.grads[0])
    assert distances[1] < distances[0]
    assert grads[1] > 2 * grads[0]  # the control is the run without it


def test_a_run_that_is_stopped_goes_on_with_its_state_and_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole, straight = run(tmp_path / "whole", share=0.5)
    with pytest.raises(Stop):
        run(tmp_path / "parts", share=0.5, measure=stop_at(3), measure_every=1)
    resumed, again = run(tmp_path / "parts", share=0.5, resume=True)
    assert again.calls[:2] == ["begin 4 0", "before 2"]
    assert int(again.count) == int(straight.count) == 4
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_run_that_the_schedule_does_not_fit_and_a_state_of_other_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the schedule ends at 8, and the run at 9$"):
        run(tmp_path / "long", steps=9)
    model = compose("opt")
    one = Noted(model.add_adapter("one", {**METHODS}))
    state = copy.deepcopy(one.state())
    with pytest.raises(CheckpointError, match=r"^the state of Noted is of other groups or targets: more differ$"):
        one.load_state({**state, "more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"count differ$"):
        one.load_state({"count": torch.zeros(2)})


def test_a_schedule_is_refused_beside_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.stages and a method with a schedule of its own were given, and both say what trains when: leave one of them out$"):
        run(tmp_path, stages=(Stage(trains=("bridge", "adalink"), share=0.5), Stage(trains=("prompt",))))
