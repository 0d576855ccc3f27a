"""metrics.json and the figures in the model card: every figure with its interval and with what computed it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from adalink.atomic import write_whole
from multimodal.bad_samples import BadSample
from multimodal.counted import counted
from tasks.metrics.bootstrap import Resampling
from tasks.metrics.listing import software
from tasks.model_card import add_figures
from tasks.task import TRAINED, Score, Task

__all__ = ["UNSCORED", "write_card_figures", "write_metrics"]

UNSCORED = "the data set has no references or answers (a test split), so nothing was scored: hand in the official result file"


def write_metrics(
    path: Path,
    task: Task,
    scores: Mapping[str, Score],
    *,
    items: int,
    trained: Mapping[str, int],
    seconds: float,
    bad: tuple[BadSample, ...],
) -> None:
    """Write metrics.json.

    rows        by what was done to the model, the figures by name
    intervals   the same, each figure's bootstrap interval (low, high)
    scorers     by figure, what it equals, with the version; `software` computed it
    note        about what was scored; in place of figures, where there is nothing to score against
    """
    resampling = Resampling()
    intervals = {row: score.intervals(resampling) for row, score in scores.items()}
    metrics = {
        "task": task.name,
        "headline": scores[TRAINED].headline if scores else task.headline,
        "software": software(),
        "scorer": scores[TRAINED].scorer if scores else None,
        "scorers": {name: score.other_scorers.get(name, score.scorer) for score in scores.values() for name in score.figures},
        "items": items,
        "rows": {row: dict(score.figures) for row, score in scores.items()},
        "intervals": {row: {name: [found.low, found.high] for name, found in figures.items()} for row, figures in intervals.items()},
        "resampling": vars(resampling),
        "trained_parameters": dict(trained),
        "seconds_to_generate": round(seconds, 2),
        "bad_samples": [vars(sample) for sample in bad],
    }
    if note := scores[TRAINED].note if scores else UNSCORED:
        metrics["note"] = note
    write_whole(path, (json.dumps(metrics, indent=2) + "\n").encode())


def write_card_figures(folder: Path, score: Score, *, split: str, items: int, best: str = "") -> None:
    """Put the trained adapter's figures into its model card. best: which step its weights are of, where that is not the last one."""
    data = f"the validation data of the run ({split}, {counted(items, 'item')}{best and ', '}{best})"
    figures = {name: value for name, value in score.figures.items() if name not in score.other_scorers}
    add_figures(folder, figures, score.intervals(Resampling()), scorer=score.scorer, software=software(), data=data)
