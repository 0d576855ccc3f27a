"""The demo: both tasks on the embedded scenes with the embedded frozen parts, side by side, by the same commands that a user gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import IO, Any

from tqdm import tqdm

import adalink
from adalink.errors import ConfigError
from tasks.commands import Command

__all__ = ["DEMO", "RECIPES", "run_demo"]

RECIPES = {task: Path(__file__).parents[1] / "scenes" / f"{task}.yaml" for task in ("captioning", "vqa")}
_STEP = re.compile(r"step (\d+)/(\d+)  .*s left")


def run_demo(out: Path) -> None:
    """Train and evaluate captioning and VQA into `out/captioning` and `out/vqa`, each in a process of its own, and print both tables.

    Raises ConfigError where one of the folders is there already, or a command failed.
    """
    started = time.perf_counter()
    folders = {task: out / task for task in RECIPES}
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ConfigError(f"the demo was run here before ({', '.join(taken)}): remove it, or give another --out")
    print("A frozen encoder and a frozen language model learn to caption drawn scenes and, at the same time, to answer questions about them.", flush=True)
    trainings = [_Training(task, recipe, folders[task], row) for row, (task, recipe) in enumerate(RECIPES.items())]
    try:
        failed = [training.task for training in trainings if training.ends_badly()]
    except BaseException:
        for training in trainings:
            training.process.terminate()
        raise
    if failed:
        raise ConfigError(f"the demo's `adalink train` of {' and '.join(failed)} did not finish")
    from tasks.commands.train import results_table  # late: the first line above waits for nothing

    for folder in folders.values():
        metrics = json.loads((folder / "metrics.json").read_text())
        print(f"\n{metrics['task']}: {metrics['headline']} ({metrics['scorer']})")
        print(results_table({name: {metrics["headline"]: values[metrics["headline"]]} for name, values in metrics["rows"].items()}))
    print(f"\n{time.perf_counter() - started:.0f} seconds; look at {' and '.join(str(folder / 'report.html') for folder in folders.values())}")


class _Training:
    """One `adalink train` in a process of its own: a bar on a terminal, and its lines behind the name of the task.

    Each gets its share of the cores. On two cores, two processes of one thread are far faster than one process of two threads after the other.
    """

    def __init__(self, task: str, recipe: Path, folder: Path, row: int) -> None:
        arguments = ["train", "--config", str(recipe), "--out", str(folder)]
        print(f"adalink {' '.join(arguments)}", flush=True)
        self.task, self._row = task, row
        self._bar: Any = None
        threads = max(1, (os.cpu_count() or 1) // len(RECIPES))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(adalink.__file__).with_name("__main__.py")), *arguments],  # by its file, as `adalink launch` does
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        pipes = (self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)
        self._readers = [Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def ends_badly(self) -> bool:
        """Wait for its end: whether it failed."""
        for reader in self._readers:
            reader.join()
        if self._bar is not None:
            self._bar.close()
        return self.process.wait() != 0

    def _read(self, pipe: IO[str], to: IO[str]) -> None:
        for line in pipe:
            step = _STEP.match(line) if sys.stderr.isatty() else None
            if step is None:
                tqdm.write(f"{self.task:10} | {line.rstrip()}", file=to)
                to.flush()
            else:
                self._move(int(step[1]), int(step[2]))

    def _move(self, step: int, last: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=last, initial=step, desc=f"{self.task:10}", unit="step", position=self._row, leave=False, dynamic_ncols=True)
        self._bar.update(step - self._bar.n)


def _add_demo(parser: Any) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the folder that the two run folders are made in")


DEMO = Command(_add_demo, lambda values, plain: run_demo(values.out), examples=("adalink demo", "adalink demo --out runs/second_demo"))
