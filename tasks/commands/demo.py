"""The demo: both tasks on the embedded scenes with the embedded frozen parts, by the same commands that a user gives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError
from tasks.commands import Command
from tasks.commands.parser import main
from tasks.commands.train import results_table

__all__ = ["DEMO", "RECIPES", "run_demo"]

RECIPES = {task: Path(__file__).parents[1] / "scenes" / f"{task}.yaml" for task in ("captioning", "vqa")}


def run_demo(out: Path) -> None:
    """Train and evaluate captioning and VQA into `out/captioning` and `out/vqa`, and print both tables.

    Raises ConfigError where one of the folders is there already, or a command failed.
    """
    started = time.perf_counter()
    folders = {task: out / task for task in RECIPES}
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ConfigError(f"the demo was run here before ({', '.join(taken)}): remove it, or give another --out")
    for task, recipe in RECIPES.items():
        print(f"\n{task}: adalink train --config {recipe} --out {folders[task]}")
        if main(["train", "--config", str(recipe), "--out", str(folders[task])]):
            raise ConfigError(f"the demo's {task} did not finish")
    print()
    for folder in folders.values():
        metrics = json.loads((folder / "metrics.json").read_text())
        print(f"{metrics['task']}: {metrics['headline']} ({metrics['scorer']})")
        print(results_table({name: {metrics["headline"]: figures[metrics["headline"]]} for name, figures in metrics["rows"].items()}), end="\n\n")
    print(f"{time.perf_counter() - started:.0f} seconds; look at {' and '.join(str(folder / 'report.html') for folder in folders.values())}")


def _add_demo(parser: Any) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the folder that the two run folders are made in")


DEMO = Command(_add_demo, lambda values, plain: run_demo(values.out))
