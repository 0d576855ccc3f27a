"""Checkpoints: whole or not at all, exact, and refused where they are another run's."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adalink.errors import CheckpointError, DataError
from multimodal.training.state import latest_checkpoint, load_state, save_state


class Run:
    """Two weights and their optimizer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.weights = {"a.down": nn.Parameter(torch.randn(3, 2)), "a.bias": nn.Parameter(torch.randn(2))}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.1)

    def step(self) -> None:
        noise = torch.randn(3)  # a run may draw random numbers, which are resumed too
        (noise @ self.weights["a.down"] + self.weights["a.bias"]).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = 2) -> None:
        save_state(folder, step, self.weights, self.optimizer, {"scaler": None}, keep)

    def load(self, folder: Path) -> dict[str, object]:
        return load_state(folder, self.weights, self.optimizer)


def test_a_loaded_run_goes_on_as_the_saved_one_does(tmp_path: Path) -> None:
    first, second = Run(1), Run(2)
    for _ in range(3):
        first.step()
    first.save(tmp_path, 3)
    first.step()
    assert second.load(tmp_path / "step_00000003") == {"step": 3, "scaler": None}
    second.step()
    for name, weight in first.weights.items():
        assert torch.equal(second.weights[name], weight)
        for key, value in first.optimizer.state[weight].items():
            assert torch.equal(second.optimizer.state[second.weights[name]][key], value)
    control = Run(2)
    control.step()
    assert not torch.equal(control.weights["a.down"], first.weights["a.down"])


def test_a_run_saved_before_its_first_step_goes_on_too(tmp_path: Path) -> None:
    first, second = Run(1), Run(2)
    first.save(tmp_path, 0)
    second.load(tmp_path / "step_00000000")
    first.step()
    second.load(tmp_path / "step_00000000")
    second.step()
    assert torch.equal(second.weights["a.down"], first.weights["a.down"])


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = Run(1)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "no") is None
    for step in (5, 90, 1000):
        run.save(tmp_path, step)
        assert latest_checkpoint(tmp_path) == tmp_path / f"step_{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000090", "step_00001000"]
    run.save(tmp_path, 1001, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00001001"]


def test_what_a_killed_process_left_does_not_matter_and_goes_away(tmp_path: Path) -> None:
    run = Run(1)
    run.save(tmp_path, 3)
    # Another process's half, one with this process's own id (in a container each run may have the same), and the same step again.
    for left in (".step_00000006.1", f".step_00000006.{os.getpid()}"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "state.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000003"
    run.save(tmp_path, 6)
    run.save(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000006"]
    assert run.load(tmp_path / "step_00000006")["step"] == 6


def test_a_checkpoint_that_cannot_be_written_says_so_and_the_one_before_stays(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: writing beyond it fails in the same place, with another errno."""
    Run(1).save(tmp_path, 3)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            Run(1).save(tmp_path, 6)
        except DataError as error:
            stated = "step_00000006 cannot be written" in str(error) and "make room and go on with --resume" in str(error)
            os._exit(5 if stated else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the checkpoint .*file/run/step_00000006 cannot be written \(.*Not a directory.*; the one before stays: make room"):
        Run(1).save(tmp_path / "file" / "run", 6)


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = Run(1)
    for name, content in (("state.safetensors", b"half"), ("state.json", b"{"), ("state.json", b""), ("state.json", b"{}"), ("state.json", b"[]")):
        run.save(tmp_path, 3)
        (tmp_path / "step_00000003" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step_00000003 is damaged \(.+\): remove it to go on from the one before"):
            run.load(tmp_path / "step_00000003")
    (tmp_path / "step_00000003" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        run.load(tmp_path / "step_00000003")


def test_a_checkpoint_without_random_numbers_is_damaged(tmp_path: Path) -> None:
    run = Run(1)
    run.save(tmp_path, 3)
    path = tmp_path / "step_00000003" / "state.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "rng.cpu"}, path)
    with pytest.raises(CheckpointError, match=r"is damaged \(it has no rng.cpu\)"):
        run.load(path.parent)


def test_other_weights_than_those_of_the_run_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    Run(1).save(tmp_path, 3)
    other = Run(2)
    other.weights["b.up"] = nn.Parameter(torch.zeros(1))
    before = other.weights["a.down"].detach().clone()
    with pytest.raises(CheckpointError, match=r"holds other weights than this config trains: \['b.up'\] differ; resume with the config of the run"):
        other.load(tmp_path / "step_00000003")
    del other.weights["b.up"]
    other.weights["a.bias"] = nn.Parameter(torch.zeros(5))
    with pytest.raises(CheckpointError, match=r"a.bias is \[2\], this config makes it \[5\]"):
        other.load(tmp_path / "step_00000003")
    assert torch.equal(other.weights["a.down"], before)


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    run = Run(1)
    run.step()
    run.save(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    assert {path.name for path in folder.iterdir()} == {"state.safetensors", "state.json"}
    assert json.loads((folder / "state.json").read_text()) == {"step": 1, "scaler": None}
    names = set(load_file(folder / "state.safetensors")) - {"rng.cpu", "rng.cuda"}
    assert names == {f"{kind}.{name}{key}" for name in run.weights for kind, keys in
                     (("weight", ("",)), ("optimizer", (".exp_avg", ".exp_avg_sq", ".step"))) for key in keys}  # fmt: skip
