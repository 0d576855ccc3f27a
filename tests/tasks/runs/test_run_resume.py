"""A training process that is killed at any moment goes on to the same weights, bit for bit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from cli_run import FIXED, RECIPES, Files
from safetensors.torch import load_file
from shared import PATIENCE

from tasks.data.arrow.write import write_parquet
from tasks.scenes.dataset import Scenes

N_STEPS = 10
OPTIONS = (
    "--data.val.scenes", "val/2", "--generation.max_new_tokens", "2", "--train.steps", str(N_STEPS),
    "--train.batch_size", "4", "--train.checkpoint_every", "3", "--train.keep", "2", "--train.log_every", "1", "--train.features", "encode",
    "--train.measure_every", "4",
)  # fmt: skip
SCENES = ("--data.train.scenes", "train/23")
ACCUMULATED = ("--train.batch_size", "2", "--train.accumulation", "2", "--train.bucket_pool", "4")


def _command(arguments: list[str], errors: str, last: float) -> None:
    from multimodal.run_log import RunLog

    from tasks.cli import main

    write = RunLog.write

    def written_or_waited_with(log: RunLog, values: Mapping[str, float]) -> None:
        while values["step"] > last:  # until the process is killed: it never ends before that, however late the kill comes
            time.sleep(1)
        write(log, values)

    RunLog.write = written_or_waited_with  # type: ignore[method-assign]
    multiprocessing.set_start_method("fork", force=True)  # of its own workers, as in a process that a person starts
    sys.stderr = sys.stdout = open(errors, "a", buffering=1)  # noqa: SIM115 (the process ends with it)
    sys.exit(main(arguments))


class Machine:
    """Starts commands as processes of their own: real ones, which can be killed; see forkserver.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")

    def start(self, out: Path, *options: str, last: float = N_STEPS) -> BaseProcess:
        """last: the step that it writes a line of, and goes no further."""
        data = () if "--data.train" in options else SCENES
        arguments = ["train", "--config", str(RECIPES["captioning"]), "--out", str(out), *FIXED, *OPTIONS, *data, *options]
        process = self.context.Process(target=_command, args=(arguments, str(self.folder / "errors.txt"), last))
        process.start()
        return process

    def run(self, out: Path, *options: str) -> Path:
        process = self.start(out, *options)
        process.join(PATIENCE)
        assert process.exitcode == 0, (self.folder / "errors.txt").read_text()[-2000:]
        return out

    def killed_after(self, step: int, out: Path, *options: str) -> None:
        """Start, and SIGKILL as soon as a line of this step is in metrics.jsonl, wherever the process is then: before its last line in any case."""
        process = self.start(out, *options, last=N_STEPS - 1)
        give_up = time.monotonic() + PATIENCE
        while process.is_alive() and steps(out)[-1:] < [step]:
            assert time.monotonic() < give_up
            time.sleep(0.002)
        assert process.pid is not None
        assert process.is_alive(), (self.folder / "errors.txt").read_text()[-2000:]
        os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:  # not join(), which waits for orphaned workers too
                os.kill(process.pid, 0)
                time.sleep(0.002)
        assert not (out / "metrics.json").exists()


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def steps(run: Path) -> list[float]:
    return [line["step"] for line in lines(run) if "loss" in line]


def same(run: Path, unbroken: Path) -> None:
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (unbroken / "adapter" / "adapter_model.safetensors").read_bytes()
    assert steps(run) == list(range(1, N_STEPS + 1))
    assert lines(run) == lines(unbroken)
    assert [line["step"] for line in lines(run) if "CIDEr" in line] == [4, 8]
    assert json.loads((run / "results.json").read_text()) == json.loads((unbroken / "results.json").read_text())
    assert not list((run / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def unbroken(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machine.run(tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options that make a table the data, and accumulate gradients."""
    files = Files(tmp_path_factory.mktemp("table"), n=23)
    path = files.folder / "table.jsonl"
    rows = ({"file": f"{row['image_id']}.png", "caption": row["caption"]} for row in files.captions["annotations"])
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return (*ACCUMULATED, "--data.train", str(path), "--data.train.images", str(files.folder / "pictures"), "--data.train.scenes", "null")


@pytest.fixture(scope="module")
def unbroken_table(machine: Machine, table: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machine.run(tmp_path_factory.mktemp("unbroken") / "run", *table)


def test_killed_at_a_random_step_and_resumed_gives_the_weights_of_an_unbroken_run(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    step = random.randint(4, 7)  # any step after the first checkpoint will do, so none is chosen
    machine.killed_after(step, out)
    assert not (out / "adapter").exists()
    last = max((out / "checkpoints").glob("step_*"))
    # The control: what was killed is not yet what it becomes.
    stored, final = load_file(last / "state.safetensors"), load_file(unbroken / "adapter" / "adapter_model.safetensors")
    assert any((stored[f"weight.{name}"] != value).any() for name, value in final.items())
    same(machine.run(out, "--resume"), unbroken)


def test_a_run_that_stops_at_two_steps_and_goes_on_gives_the_weights_of_an_unbroken_run(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    """The learning rates are those of all ten steps: a run of three steps, the control, ends with other weights."""
    out = tmp_path / "run"
    machine.run(out, "--train.stop_at", "3")
    assert steps(out) == [1, 2, 3]
    stopped, shorter = lines(out), lines(machine.run(tmp_path / "shorter", "--train.steps", "3"))
    assert stopped == lines(unbroken)[:3]
    assert stopped != shorter
    machine.run(out, "--resume", "--train.stop_at", "7")
    same(machine.run(out, "--resume"), unbroken)


def test_killed_twice_with_a_worker_and_resumed_without_one_from_a_table(
    machine: Machine, table: tuple[str, ...], unbroken_table: Path, tmp_path: Path
) -> None:
    """Begun with --resume where a process was killed before its first checkpoint, which is to begin anew."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").touch()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "rate": 0.1}\n{"step": 2, "lo')
    machine.killed_after(random.randint(4, 5), out, *table, "--resume", "--train.workers", "1")  # the checkpoint of step 3 is there
    assert steps(out) == list(range(1, len(steps(out)) + 1))
    # What a process leaves that is killed while it writes: half a checkpoint, half a line.
    partial = out / "checkpoints" / ".step_00000006.1"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 6, "lo')
    machine.killed_after(random.randint(7, 8), out, *table, "--resume")
    same(machine.run(out, *table, "--resume", "--train.workers", "1"), unbroken_table)


@pytest.mark.slow
@pytest.mark.parametrize("data, workers", [("scenes", "0"), ("scenes", "1"), ("parquet", "0"), ("parquet", "2")])
def test_any_number_of_kills_gives_the_weights_of_an_unbroken_run(data: str, workers: str, machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    """The unbroken run is one of scenes; the same samples in parquet give the same weights."""
    options: tuple[str, ...] = ("--train.workers", workers)
    if data == "parquet":
        write_parquet(Scenes(split="train", size=23), tmp_path / "parquet", samples_per_file=9)
        options += ("--data.train", str(tmp_path / "parquet"), "--data.train.scenes", "null")
    out = tmp_path / "run"
    step = 0
    while (step := step + random.randint(1, 4)) < N_STEPS:
        machine.killed_after(max(step, *steps(out), 1), out, *options, *(["--resume"] if out.exists() else []))
    same(machine.run(out, "--resume", *options), unbroken)
