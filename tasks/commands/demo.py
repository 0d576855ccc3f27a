"""The demo: both tasks on the embedded scenes with the embedded frozen parts, by the same commands that a user gives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError
from tasks.commands import Command
from tasks.commands.parser import main

__all__ = ["DEMO", "RECIPES", "run_demo"]

RECIPES = {task: Path(__file__).parents[1] / "scenes" / f"{task}.yaml" for task in ("captioning", "vqa")}


def run_demo(out: Path) -> None:
    """Train and evaluate captioning and VQA into `out/captioning` and `out/vqa`, and print both tables.

    Raises ConfigError where one of the folders is there already, or a command failed.
    """
    started = time.perf_counter()
    folders, features = {task: out / task for task in RECIPES}, out / "features"
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ConfigError(f"the demo was run here before ({', '.join(taken)}): remove it, or give another --out")
    print("A frozen encoder and a frozen language model learn to caption drawn scenes, then to answer questions about them.", flush=True)
    _run("features", "--config", RECIPES["captioning"], "--features", features)  # of the scenes that both tasks read
    for task, recipe in RECIPES.items():
        _run("train", "--config", recipe, "--features", features, "--out", folders[task])
    from tasks.commands.train import results_table  # late: the first line above waits for nothing

    print()
    for folder in folders.values():
        metrics = json.loads((folder / "metrics.json").read_text())
        print(f"{metrics['task']}: {metrics['headline']} ({metrics['scorer']})")
        print(results_table({name: {metrics["headline"]: values[metrics["headline"]]} for name, values in metrics["rows"].items()}), end="\n\n")
    print(f"{time.perf_counter() - started:.0f} seconds; look at {' and '.join(str(folder / 'report.html') for folder in folders.values())}")


def _run(*arguments: object) -> None:
    given = [str(argument) for argument in arguments]
    print(f"\nadalink {' '.join(given)}", flush=True)
    if main(given):
        raise ConfigError(f"the demo's `adalink {given[0]}` did not finish")


def _add_demo(parser: Any) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the folder that the two run folders are made in")


DEMO = Command(_add_demo, lambda values, plain: run_demo(values.out), examples=("adalink demo", "adalink demo --out runs/second_demo"))
