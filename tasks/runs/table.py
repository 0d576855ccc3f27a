"""Runs side by side: what each reached, what it trained and took, and which settings differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adalink.errors import DataError
from multimodal.training.records import METRICS_FILE
from tasks.metrics.bootstrap import aligned, software
from tasks.report.compare_pages import RunsPage, Series, write_runs_page
from tasks.task import TRAINED

__all__ = ["RunSummary", "compare_many", "find_runs", "listed_runs", "many_json", "many_table", "read_summary"]

_NOT_SETTINGS = ("out",)  # differ between any two runs


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run folder in short.

    metrics      of the trained adapter, in percent; empty for a test split
    parameters   how many were trained, all parts together
    seconds      that generating the evaluation's texts took
    settings     by whole name: "train.learning_rate"
    curves       name -> (step, value)
    """

    folder: Path
    task: str
    headline: str
    metrics: Mapping[str, float]
    n_items: int
    parameters: int
    seconds: float
    settings: Mapping[str, object]
    curves: Mapping[str, Sequence[tuple[float, float]]]


def read_summary(folder: Path) -> RunSummary:
    """Read a run folder of `adalink train` or `adalink evaluate`. Raises DataError where it is none, or damaged."""
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        log = folder / METRICS_FILE
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        keys = dict.fromkeys(key for line in lines for key in line if key != "step")
        return RunSummary(
            folder=folder,
            task=metrics["task"],
            headline=metrics["headline"],
            metrics=metrics["rows"].get(TRAINED, {}),
            n_items=metrics["items"],
            parameters=sum(metrics["trained_parameters"].values()),
            seconds=metrics["seconds_to_generate"],
            settings={name: value for name, value in _flat(config, "").items() if name not in _NOT_SETTINGS},
            curves={key: [(line["step"], line[key]) for line in lines if key in line] for key in keys},
        )
    except OSError as error:
        raise DataError(f"{folder} is no run folder of `adalink train` or `adalink evaluate`: {error.filename} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"the run folder {folder} is damaged: metrics.json or config.yaml has another shape ({error!r}); evaluate it again") from None


def find_runs(folder: Path) -> list[RunSummary]:
    """The finished runs in a folder and in those below it, by name. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the one that holds the run folders, such as runs")
    found = sorted(path.parent for path in folder.rglob("metrics.json") if (path.parent / "config.yaml").exists())
    if not found:
        raise DataError(f"{folder} holds no finished run: expected folders with metrics.json and config.yaml, which `adalink train` writes")
    return [read_summary(path) for path in found]


def listed_runs(*, folder: Path) -> None:
    """Print the runs in a folder and below it: what each is judged by, what it trained, and how long it generated.

    Args:
        folder: The folder that holds the run folders, such as runs.
    """
    rows = [("run", "task", "metric", "in percent", "n", "trained", "seconds to generate")]
    for run in find_runs(folder):
        value = f"{run.metrics[run.headline]:.2f}" if run.headline in run.metrics else "-"
        rows.append((str(run.folder.relative_to(folder)), run.task, run.headline, value, f"{run.n_items:,}", f"{run.parameters:,}", f"{run.seconds:.1f}"))
    print("\n".join(aligned(rows)))


Matrix = Sequence[Sequence[float]]  # negative flip rates as shares: row before, column after


def compare_many(folders: Sequence[Path], report: Path, matrix: Matrix | None = None) -> list[RunSummary]:
    """The runs, and a page with their table, the settings that differ, the flips between them, and their curves laid over each other."""
    runs = [read_summary(folder) for folder in folders]
    names = _names(runs)
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    series = {key: [Series(name=name, points=run.curves.get(key, ())) for name, run in zip(names, runs, strict=True)] for key in keys}
    tables = {"Metrics, in percent": _cells(runs, names), "Settings that differ": _differing(runs, names)}
    tables |= {"Negative flips": _flip_cells(names, matrix)}
    page = RunsPage(title=f"{len(runs)} runs compared", tables=tables, series=series, software=software())
    write_runs_page(page, report)
    return runs


def many_table(runs: Sequence[RunSummary], matrix: Matrix | None = None) -> str:
    """Lines for the screen: a row for each run with all metrics, then the settings that differ, a row each, then the flips between runs."""
    names = _names(runs)
    lines = aligned(_cells(runs, names))
    differing = _differing(runs, names)
    between = [] if matrix is None else ["", *aligned(_flip_cells(names, matrix))]
    return "\n".join([*lines, "", *(aligned(differing) if len(differing) > 1 else ["no setting differs"]), *between])


def many_json(runs: Sequence[RunSummary], matrix: Matrix | None = None) -> str:
    """One object for each run: folder, task, metrics, items, parameters, seconds, and the settings that differ; then the flips between runs."""
    differing = _differing_names(runs)
    rows = [
        {
            "run": str(run.folder), "task": run.task, "n_items": run.n_items, "metrics": dict(run.metrics), "trained_parameters": run.parameters,
            "seconds_to_generate": run.seconds, "settings": {name: run.settings.get(name) for name in differing},
        }
        for run in runs
    ]  # fmt: skip
    return json.dumps({"software": software(), "runs": rows, "negative_flip_rates": matrix}, indent=2)


def _names(runs: Sequence[RunSummary]) -> list[str]:
    """The folders' last names where they are distinct, else whole paths."""
    short = [run.folder.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _cells(runs: Sequence[RunSummary], names: Sequence[str]) -> list[tuple[str, ...]]:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    head = ("run", *metrics, "n", "trained parameters", "seconds to generate")
    rows = [
        (name, *(f"{run.metrics[key]:.2f}" if key in run.metrics else "-" for key in metrics), f"{run.n_items:,}", f"{run.parameters:,}", f"{run.seconds:.1f}")
        for name, run in zip(names, runs, strict=True)
    ]
    return [head, *rows]


def _flip_cells(names: Sequence[str], matrix: Matrix | None) -> list[tuple[str, ...]]:
    """Negative flip rates in percent; the column is the run after."""
    if matrix is None:
        return []
    rows = [(name, *("-" if i == j else f"{100 * rate:.2f}" for j, rate in enumerate(row))) for i, (name, row) in enumerate(zip(names, matrix, strict=True))]
    return [("negative flips, in percent: before", *(f"after: {name}" for name in names)), *rows]


def _differing_names(runs: Sequence[RunSummary]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({json.dumps(run.settings.get(name), default=str) for run in runs}) > 1]


def _differing(runs: Sequence[RunSummary], names: Sequence[str]) -> list[tuple[str, ...]]:
    rows = [(name, *(_written(run.settings.get(name)) for run in runs)) for name in _differing_names(runs)]
    return [("setting", *names), *rows]


def _written(value: object) -> str:
    return "-" if value is None else str(value)


def _flat(tree: Any, path: str) -> dict[str, object]:
    """Nested settings by their whole names."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: value for key, inner in tree.items() for name, value in _flat(inner, f"{path}.{key}" if path else str(key)).items()}
