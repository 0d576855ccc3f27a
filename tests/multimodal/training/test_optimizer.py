"""AdamW in one kernel for all weights gives what AdamW in a loop does, and goes on from its states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from multimodal.training.prepare import new_optimizer
from multimodal.training.settings import TrainSettings
from multimodal.training.state import load_state, save_state

SETTINGS = TrainSettings(learning_rate=0.1, weight_decay=0.1, learning_rates={"b": 0.03})


class Run:
    """Two methods' weights and their optimizer."""

    def __init__(self, dtype: torch.dtype, *, fused: bool) -> None:
        torch.manual_seed(1)
        self.weights = {name: nn.Parameter(torch.randn(*shape, dtype=dtype)) for name, shape in (("a.down", (3, 2)), ("a.bias", (2,)), ("b.up", (3, 2)))}
        self.optimizer = new_optimizer(self.weights, SETTINGS)
        for group in self.optimizer.param_groups:
            group["fused"] = fused

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            for weight in self.weights.values():
                weight.grad = torch.randn_like(weight)
            self.optimizer.step()


def test_an_optimizer_of_floats_on_a_processor_is_fused() -> None:
    weights = {"a.down": nn.Parameter(torch.randn(2, 2)), "b.up": nn.Parameter(torch.randn(2, 2))}
    assert all(group["fused"] for group in new_optimizer(weights, SETTINGS).param_groups)
    weights["b.up"] = nn.Parameter(torch.randn(2, 2, device="meta"))  # stands for a device that has no such kernel
    assert not any(group["fused"] for group in new_optimizer(weights, SETTINGS).param_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)], ids=["fused", "loop then fused", "fused then loop"])
def test_ten_steps_of_either_form_and_ten_of_the_other_equal_twenty_in_a_loop(dtype: torch.dtype, before: bool, after: bool, tmp_path: Path) -> None:
    whole, first, second = Run(dtype, fused=False), Run(dtype, fused=before), Run(dtype, fused=after)
    whole.steps(0, 20)
    first.steps(0, 10)
    save_state(tmp_path, 10, first.weights, first.optimizer, {}, 1)
    load_state(tmp_path / "step_00000010", second.weights, second.optimizer)
    second.steps(10, 20)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
        assert float(second.optimizer.state[second.weights[name]]["step"]) == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the step count of a fused optimizer is kept beside its weights on a GPU alone")
def test_a_state_from_a_processor_is_continued_in_one_kernel_on_a_gpu(tmp_path: Path) -> None:
    first, second = Run(torch.float32, fused=False), Run(torch.float32, fused=True)
    first.steps(0, 10)
    save_state(tmp_path, 10, first.weights, first.optimizer, {}, 1)
    weights = {name: nn.Parameter(weight.detach().cuda()) for name, weight in second.weights.items()}
    optimizer = new_optimizer(weights, SETTINGS)
    load_state(tmp_path / "step_00000010", weights, optimizer)
    assert all(optimizer.state[weight]["step"].is_cuda for weight in weights.values())
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
