"""`adalink launch` as a person types it: accelerate's launcher, which cannot start by itself where torchvision does not fit torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_run import FIXED, RECIPES, adalink, refused

ROOT = Path(__file__).parents[2]
SMALL = ("--data.train.scenes", "train/4", "--data.val.scenes", "val/2", "--train.steps", "2", "--train.batch_size", "2", "--generation.max_new_tokens", "2")


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.cli", "launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no", "--", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, cwd=ROOT, env=environment)


def test_a_command_is_needed() -> None:
    for arguments in ((), ("--num_processes", "2"), ("--num_processes", "2", "--")):
        assert refused(adalink("launch", *arguments)).startswith("`adalink launch` got no command: write one after --")


@pytest.mark.slow
def test_a_run_is_launched_and_a_refused_one_keeps_its_exit_code(tmp_path: Path) -> None:
    done = launched("train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "run"), *FIXED, *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    again = launched("train", "--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "run"), *FIXED, *SMALL)
    assert again.returncode == 2
    assert "is there already: give another `out`, or --resume to go on with it" in again.stderr
