"""The code is right on a device that is not the CPU: nothing meets a tensor elsewhere, waits where no reason is given, or drifts to another dtype."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from expected import unexpected
from scenarios import FAULTS, SCENARIOS
from simulator import Simulator

DEFAULT = (
    "train llama, apart", "train lora, bfloat16", "train qwen2_vl", "generate shared prefill", "generate qwen2_vl, beams", "decode mixed", "serve",
)  # fmt: skip
NOTED = {
    "a .cpu()": ("sync", ".cpu() of bfloat16"),
    "an .item()": ("sync", "_local_scalar_dense"),
    "a bool()": ("sync", "_local_scalar_dense"),
    "an index by a mask": ("sync", "index.Tensor by a mask"),
    "a tensor of a list": ("upload", "bfloat16 [2]"),
    "a tensor on the CPU": ("mismatch", "add.Tensor"),
    "a float64 constant": ("float64", "ones"),
    "a float32 constant": ("promoted", "add.Tensor of bfloat16 and float32"),
}


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    simulator = Simulator()
    yield simulator
    simulator.close()


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in SCENARIOS])
def test_a_step_neither_mixes_devices_nor_waits_unseen_nor_drifts(simulator: Simulator, name: str) -> None:
    outcome = simulator.run(name)
    assert [str(finding) for finding in unexpected(outcome.first) if finding.kind not in ("sync", "upload")] == []  # it moves weights and tries the model out
    assert [str(finding) for finding in unexpected(outcome.steady)] == []


def test_a_step_of_one_text_a_row_asks_no_mask_whether_it_has_padding(simulator: Simulator) -> None:
    """The model is given the whole mask; its loss is that of the CPU, where transformers makes it."""
    outcome = simulator.run("train llama, apart")
    assert [str(finding) for finding in outcome.steady if "masking_utils" in finding.below] == []


@pytest.fixture(scope="module")
def planted(simulator: Simulator) -> Any:
    return unexpected(simulator.run("faults").steady)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted: Any, fault: str) -> None:
    kind, what = NOTED[fault]
    line = inspect.getsourcelines(FAULTS[fault])[1]
    assert [one for one in planted if one.kind == kind and what in one.what and one.below.endswith(f"<lambda> line {line}")], planted
