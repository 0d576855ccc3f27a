"""The script for a GPU, in miniature on a CPU: every row is there, and none fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[3]


def test_every_row_is_measured_or_says_why_not(tmp_path: Path) -> None:
    rows = gpu.main(["--tiny", "--out", str(tmp_path / "found.md")])
    assert not [row for row in rows if "FAILED" in row.found or "NOT EQUAL" in row.found]
    measured = [row for row in rows if "not measured" not in row.found]
    assert {row.part for row in measured} == {"card", "training", "packed against peft", "decoding", "equality"}
    assert [row.what for row in measured if row.part == "decoding"] == ["tiny llama, 1 rows, 8 adapters", "tiny llama, 3 rows, 8 adapters"]
    for row in rows:
        if row not in measured:
            assert any(reason in row.found for reason in ("torchao", "on a GPU alone", "minutes on a CPU", "Liger-Kernel needs a GPU"))
    written = (tmp_path / "found.md").read_text()
    assert all(str(row) in written for row in rows)
    assert "machine: " in written


def test_a_part_that_starts_too_late_is_named() -> None:
    machine = gpu.Machine(device=gpu.torch.device("cpu"), dtype=gpu.torch.float32)
    rows = list(gpu.measured(gpu.TINY, machine, -1))
    assert {row.found for row in rows} == {"not measured: the -1 minutes were over"}


def test_without_a_gpu_the_whole_run_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA here: give --tiny" in capsys.readouterr().err


def test_the_shell_script_runs_the_program_with_what_it_is_given() -> None:
    done = subprocess.run([ROOT / "tests/benchmarks/gpu.sh", "--tiny"], env={**os.environ, "PYTHON": "echo"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tests/benchmarks/gpu.py", "--tiny"]
