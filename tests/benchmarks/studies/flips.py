"""Flips of a retrained VQA adapter on the scenes, before and after training with teachers, and with what teachers must beat.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/studies/flips.py --out runs/flips

Runs in a folder: old (seed 0), new (seed 1, so other weights and another data order), then from the weights of new, with the learning rate times each of
`--rates`: teachers (the method), inverted (the old one followed where the new one is right), labels (the texts alone, as long). Finished runs are read, not
run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from adalink.files import write_whole
from multimodal.loss import teachers
from tasks.cli import main as adalink
from tasks.commands.compare import compare_runs
from tasks.evaluation.compare import Comparison
from tasks.metrics.bootstrap import aligned

RECIPE = Path(__file__).parents[3] / "tasks/scenes/vqa.yaml"
KINDS = ("teachers", "inverted", "labels")


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="train/2000")
    parser.add_argument("--val", default="val/200")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    old = run(options, options.out / "old", 0, options.epochs, 1.0)
    rows = [("run", "accuracy", "accuracy - old's", "negative flips, %", "their interval", "of chance", "inconsistent, %", "fewer flips than new, paired, points")]
    for seed in options.seeds:
        new = run(options, options.out / f"new{seed}", seed, options.epochs, 1.0)
        plain = compare_runs(before=old, after=new)
        rows.append(row(new.name, plain, plain))
        for rate in options.rates:
            for kind in options.kinds:
                out = run(options, options.out / f"{kind}{seed}_{rate:g}", seed, options.epochs / 3, rate, kind, (old, new))
                rows.append(row(out.name, compare_runs(before=old, after=out), plain))
    print("\n".join(aligned(rows)))


def run(options: Any, out: Path, seed: int, epochs: float, rate: float, kind: str = "", versions: Sequence[Path] = ()) -> Path:
    """The folder of a run, made where it is not there yet."""
    if (out / "metrics.json").exists():
        return out
    config = yaml.safe_load(RECIPE.read_text())
    config["data"] = {"train": {"scenes": options.data}, "val": {"scenes": options.val}}
    train = config["train"] | {"epochs": epochs, "seed": seed, "measure_every": 0, "checkpoint_every": 100_000}
    rates = {name: rate * value for name, value in train["learning_rates"].items()}
    config["train"] = train | {"learning_rate": rate * train["learning_rate"], "learning_rates": rates}
    if versions:
        config["train"]["teachers"] = {"old": str(versions[0] / "adapter"), "new": str(versions[1] / "adapter")}
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / f"{out.name}.yaml", yaml.safe_dump(config).encode())
    with mock.patch.object(teachers, "aligned_loss", {"inverted": inverted, "labels": labels_alone}.get(kind, teachers.aligned_loss)):
        if code := adalink(["train", "--config", str(options.out / f"{out.name}.yaml"), "--out", str(out)]):
            sys.exit(code)
    return out


aligned_loss = teachers.aligned_loss


def inverted(student: Any, old: Any, new: Any, target: Any, **settings: Any) -> Any:
    """The old teacher where the new one is right, and the new one where it is wrong."""
    by_old, by_new, own = (aligned_loss(student, one, other, target, **settings) for one, other in ((old, old), (new, new), (old, new)))
    return by_old + by_new - own


def labels_alone(student: Any, old: Any, new: Any, target: Any, **settings: Any) -> Any:
    """The ordinary loss."""
    return aligned_loss(student, student.detach(), student.detach(), target, labels=1.0)


def row(name: str, found: Comparison, plain: Comparison) -> tuple[str, ...]:
    """Beside the old run; `plain` is the retrained one, whose flips are drawn with these."""
    own, interval = found.rates.counts, found.rates.intervals["negative flip rate"]
    lost = [np.array([pair.before >= one.right_from > pair.after for pair in one.pairs], float) for one in (plain, found)]
    drawn = np.random.default_rng(0).integers(0, len(lost[0]), (1000, len(lost[0])))
    low, high = np.percentile((lost[0] - lost[1])[drawn].mean(1) * 100, [2.5, 97.5])
    overall = found.differences[0]
    return (
        name, f"{overall.after:.2f}", f"{overall.after - overall.before:+.2f}", f"{100 * own.negative:.2f}", f"{100 * interval.low:.2f} .. {100 * interval.high:.2f}",
        f"{own.observed_over_independent or 0:.2f}", f"{100 * own.inconsistent:.2f}", f"{100 * (lost[0] - lost[1]).mean():+.2f} ({low:+.2f} .. {high:+.2f})",
    )  # fmt: skip


if __name__ == "__main__":
    main()
