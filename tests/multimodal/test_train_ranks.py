"""Two processes train as one does, survive what one survives, and go on where they were, in another number too."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_jobs
import torch
from ranks import Machine
from ranks import machine as started
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with started(tmp_path_factory.mktemp("machine")) as one:
        yield one


def state(folder: Path, step: int = 20) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "state.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items() if name.startswith("weight."))


def step_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("loss") if path.exists() else 0


def test_two_processes_equal_one_with_the_same_pictures_in_a_step(machine: Machine, tmp_path: Path) -> None:
    """float64, ragged numbers of targets, accumulation, and seven pictures that nothing divides."""
    two = [{"folder": tmp_path / "two", "kept": True}, {"folder": tmp_path / "two_accumulated", "kept": True, "batch_size": 1, "accumulation": 2}]
    one = [{"folder": tmp_path / name, "kept": True, "batch_size": 4, "seed": seed} for name, seed in (("one", 0), ("control", 1))]
    groups = [machine.start(2, rank_jobs.several, two), machine.start(1, rank_jobs.several, one)]
    for group in groups:
        group.ended()
    for name in ("two", "two_accumulated"):
        assert difference(state(tmp_path / name), state(tmp_path / "one")) < 1e-10
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-12)
    assert difference(state(tmp_path / "control"), state(tmp_path / "one")) > 1e-3
    assert len(losses(tmp_path / "two")) == 20


@pytest.mark.parametrize("world", [1, 2])
def test_ten_steps_a_kill_and_ten_more_are_twenty_bit_for_bit_with_any_number_of_workers(world: int, machine: Machine, tmp_path: Path) -> None:
    """Pictures are decoded and encoded in each run, and read by 0, 1 and 2 workers; the unbroken run had one."""
    whole = machine.start(world, rank_jobs.several, [{"folder": tmp_path / "whole", "workers": 1}])
    killed = {}
    for workers in (0, 1, 2):
        folder = tmp_path / f"killed{workers}"
        killed[workers] = machine.start(world, rank_jobs.several, [{"folder": folder, "workers": workers, "pause": 0.02}])
        killed[workers].wait_until(lambda folder=folder: step_of(folder) >= 11)  # type: ignore[misc]
        killed[workers].killed()
        assert not (folder / "checkpoints" / "step_00000020").exists()
        assert (folder / "checkpoints" / "step_00000010").exists()
    whole.ended()
    again = [{"folder": tmp_path / f"killed{workers}", "workers": (workers + 1) % 3, "resume": True} for workers in killed]
    machine.start(world, rank_jobs.several, again).ended()
    expected = state(tmp_path / "whole")
    for workers in killed:
        found = state(tmp_path / f"killed{workers}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert losses(tmp_path / f"killed{workers}") == losses(tmp_path / "whole")
