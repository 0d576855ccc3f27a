"""`adalink launch` as a person types it: accelerate's launcher, which cannot start by itself where torchvision does not fit torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cli_run import FIXED, RECIPES, adalink, hostile, refused, train
from safetensors.torch import load_file
from shared import PATIENCE, ROOT

SMALL = ("--data.train.scenes", "train/4", "--data.val.scenes", "val/2", "--train.steps", "2", "--train.batch_size", "2", "--generation.max_new_tokens", "2")


def launched(*arguments: str, folder: Path, n: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adalink", "launch", "--cpu", "--num_processes", str(n), "--main_process_port", "0", "--mixed_precision", "no", "--", *arguments]
    return started(command, folder)


def started(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, dict.fromkeys((folder, ROOT))))}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=folder, env=environment)


def test_a_command_is_needed() -> None:
    for arguments in ((), ("--num_processes", "2"), ("--num_processes", "2", "--")):
        assert refused(adalink("launch", *arguments)).startswith("`adalink launch` got no command: write one after --")


@pytest.mark.slow
def test_a_run_is_launched_and_a_refused_one_keeps_its_exit_code(tmp_path: Path) -> None:
    done = launched("train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "run"), *FIXED, *SMALL, folder=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    again = launched("train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "run"), *FIXED, *SMALL, folder=ROOT)
    assert again.returncode == 2
    assert "is there already: give another `out`, or --resume to go on with it" in again.stderr


@pytest.mark.parametrize("way", ["launch", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_processes_on_cpus_train_together_and_not_each_by_itself(way: str, tmp_path: Path) -> None:
    """Those of `adalink launch` in a folder that has a `tasks` of its own, which they do not mind."""
    arguments = ("train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "two"), *FIXED, *SMALL, "--train.log_every", "1")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tasks.cli")
    done = launched(*arguments, folder=hostile(tmp_path), n=2) if way == "launch" else started([*torchrun, *arguments], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert train("captioning", tmp_path / "one", "--train.batch_size", "4", small=(*SMALL, "--train.log_every", "1")).code == 0
    two, one = ([json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("two", "one"))
    assert len(two) == 2
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_two_machines_with_one_command_equal_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    """Two nodes on this machine: the same config and command on each, but for the rank of the machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ("--data.train.scenes", "train/13", "--data.val.scenes", "val/2", "--train.steps", "5", "--train.log_every", "1")
    small += ("--train.features", "encode", "--generation.max_new_tokens", "2")
    options = ("--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
    command = ["train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "two"), *FIXED, *small, "--train.batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    nodes = []
    for rank in ("0", "1"):
        started = [sys.executable, "-m", "tasks.cli", "launch", *options, "--machine_rank", rank, "--mixed_precision", "no", "--", *command]
        nodes.append(subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
    printed = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][1][-2000:]
    assert ["trained: " in out for out, _ in printed] == [True, False]  # one process of all writes and tells

    assert train("captioning", tmp_path / "one", "--train.batch_size", "4", small=small).code == 0
    two, one = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "one"))
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("two", "one")]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
