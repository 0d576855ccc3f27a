"""Two processes train what one trains with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_run import FIXED, RECIPES, train
from safetensors.torch import load_file
from shared import PATIENCE, ROOT

from tasks.data.arrow.write import write_parquet
from tasks.scenes.dataset import Scenes

OPTIONS = (
    "--data.train.scenes", "train/13", "--data.val.scenes", "val/2", "--train.steps", "5", "--train.log_every", "1",
    "--generation.max_new_tokens", "2", "--train.features", "encode", "--train.checkpoint_every", "3",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """The two read parquet, and the one the scenes that it was written of."""
    write_parquet(Scenes(split="train", size=13), tmp_path / "parquet", samples_per_file=5)
    data = ("--data.train", str(tmp_path / "parquet"), "--data.train.scenes", "null", "--train.workers", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tasks.cli", "train"]
    arguments = ["--config", str(RECIPES["captioning"]), "--out", str(tmp_path / "two"), *FIXED, *OPTIONS, "--train.batch_size", "2", *data]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained: ") == done.stdout.count("report: ") == 1
    assert train("captioning", tmp_path / "one", "--train.batch_size", "4", small=OPTIONS).code == 0

    def weights(run: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")

    two, one = weights("two"), weights("one")
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
    logs = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("two", "one")]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-4)
    assert train("captioning", tmp_path / "control", "--train.batch_size", "2", small=OPTIONS).code == 0
    assert not all(torch.allclose(weights("control")[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
