"""`adalink bench when`: its axes, its samples, its table with the sentences below it, its image, and cells that are trained."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from cli_run import adalink, refused, trial_here

from adalink.errors import ConfigError
from tasks.bench import when
from tasks.bench.when import Axes, as_csv, as_markdown, as_svg, conclusions, rows_of
from tasks.runs.search.trials import Process

RUN: dict[str, Any] = {
    "task": "captioning", "encoder": "scenes:encoder", "language_model": "scenes:language",
    "data": {"train": {"scenes": "train/12"}, "val": {"scenes": "val/3"}},
    "methods": {"bridge": {"kind": "mlp", "hidden": 16, "init_scale": 8.0}},
    "train": {"steps": 4, "batch_size": 2, "learning_rate": 0.01, "features": "memory"},
    "generation": {"max_new_tokens": 3},
}  # fmt: skip
AXES: dict[str, Any] = {"methods": ["head", "full"], "shots": [4, 0], "seeds": [1, 2]}


class Here:
    """Commands in this process. die_after: commands, then the bench ends as a killed one does, without a word in its ledger."""

    def __init__(self, die_after: int = 10**9) -> None:
        self.commands: list[Sequence[str]] = []
        self.left = die_after

    def __call__(self, arguments: Sequence[str], log: Path, *, threads: int) -> Process:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.commands.append(arguments)
        return trial_here(arguments)


def written(folder: Path, axes: Any = AXES, run: dict[str, Any] | None = None) -> list[str]:
    (folder / "when.yaml").write_text(yaml.safe_dump((run or RUN) | ({} if axes is None else {"axes": axes})))
    return ["bench", "when", "--config", str(folder / "when.yaml"), "--out", str(folder / "out")]


def cells(folder: Path, kind: str = "cell") -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (folder / "out" / "cells.jsonl").read_text().splitlines()) if event["event"] == kind]


def made(method: str, shots: int, scores: Sequence[float | str], base: str = "small", weights: int = 10, whole: int = 1000) -> list[dict[str, Any]]:
    """Events of the ledger; a text is the reason of a cell without a score."""
    common = {"method": method, "base": base, "shots": shots, "rate": 0.1, "base_weights": whole, "weights": weights, "bytes": 4.0, "seconds": 2.0, "mib": 9.0}
    return [common | ({"reason": score} if isinstance(score, str) else {"score": score}) | {"seed": seed} for seed, score in enumerate(scores)]


GRID = [
    *made("head", 100, [50.0, 52.0]), *made("lora rank 8", 100, [60.0, 64.0], weights=80), *made("full", 100, [55.0, 57.0], weights=1010),
    *made("head", 0, [51.0, 52.0]), *made("lora rank 8", 0, [70.0, "the loss is not a number"], weights=80), *made("full", 0, [78.0, 80.0], weights=1010),
    *made("head", 100, [58.5, 59.5], base="large", whole=4000), *made("full", 100, [60.0, 60.0], base="large", weights=4010, whole=4000),
]  # fmt: skip


def test_the_table_is_the_ledger_to_the_printed_digit_and_a_cell_that_diverged_is_in_no_average() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(rows_of(GRID)))))
    for row in rows:
        own = [one for one in GRID if (one["method"], one["base"], str(one["shots"] or "all")) == (row["method"], row["base"], row["K"])]
        scores = [one["score"] for one in own if "score" in one]
        assert row["mean"] == f"{mean(scores):.2f}"
        assert row["standard deviation"] == (f"{stdev(scores):.2f}" if len(scores) > 1 else "")
        assert row["n"] == str(len(scores))
    (diverged,) = [row for row in rows if row["diverged"]]
    assert (diverged["n"], diverged["mean"], diverged["diverged"]) == ("1", "70.00", "the loss is not a number")
    assert "| lora rank 8 | 80 | 8.000 % | small | all | 70.00 |  | 1 |" in as_markdown(rows_of(GRID), 5)
    (none,) = rows_of(made("lora", 5, ["out of memory", "out of memory"]))
    assert math.isnan(none.mean)
    assert ",,," in as_csv([none])


def test_three_sentences_say_when_adapting_pays() -> None:
    smallest, overtaken, larger = conclusions(rows_of(GRID))
    assert "small, K = 100: lora rank 8 (80 weights); small, K = all: none; large, K = 100: none" in smallest
    assert overtaken == "`full` overtakes the best small budget at: small: K = all; large: K = 100."
    assert larger == "Small budgets on the larger base: K = 100: head on large (59.00) beats `full` on small (56.00)."
    poor = conclusions(rows_of([*made("head", 100, [50.0]), *made("full", 100, [40.0], weights=1010)]))
    assert "head (10 weights)" in poor[0]
    assert poor[1] == "`full` overtakes the best small budget at: small: never in this grid."
    assert conclusions(rows_of(made("head", 100, [50.0])))[0] == "There is no `full` in this grid to reach."


def test_the_image_has_a_line_for_each_method_and_base_whose_points_are_the_table() -> None:
    rows = rows_of(GRID)
    image = ElementTree.fromstring(as_svg(rows, "CIDEr"))
    tag = "{http://www.w3.org/2000/svg}"
    lines = image.findall(f"{tag}polyline")
    assert {(line.get("data-method"), line.get("data-base")) for line in lines} == {(m, b) for m in ("head", "lora rank 8", "full") for b in ("small", "large")}
    assert {line.get("data-method") for line in lines if line.get("stroke-dasharray")} == {"full"}
    points = {(p.get("data-method"), p.get("data-base"), p.get("data-k"), p.get("data-mean")) for p in image.findall(f"{tag}circle") if p.get("data-k")}
    table = csv.DictReader(io.StringIO(as_csv(rows)))
    assert points == {(row["method"], row["base"], row["K"], row["mean"]) for row in table}
    heights = {p.get("data-mean"): float(p.get("cy") or 0) for p in image.findall(f"{tag}circle") if p.get("data-mean")}
    assert sorted(heights, key=float) == sorted(heights, key=lambda value: -heights[value])


def test_axes_are_every_combination_of_settings_given_as_lists() -> None:
    axes = Axes.read({"methods": ["head", {"lora": {"rank": [1, 8], "alpha": 2}}, "full"], "shots": [0, 100], "bases": ["a/x", "b/y"], "seeds": [3]}, None)
    assert dict(axes.methods) == {"head": {}, "lora rank 1": {"lora": {"rank": 1, "alpha": 2}}, "lora rank 8": {"lora": {"rank": 8, "alpha": 2}}, "full": {}}
    assert axes.shots == (100, 0)
    assert axes.bases == {"x": "a/x", "y": "b/y"}


@pytest.mark.parametrize(
    "change, sentence",
    [({"methods": []}, "axes.methods is []: expected a list with at least one value"),
     ({"seeds": None}, "axes.seeds is None: expected a list"),
     ({"methods": ["head", {"lora": {"rank": [2, 2]}}]}, "axes names lora rank 2 twice"),
     ({"methods": ["heads"]}, "axes.methods has 'heads': expected head, full, or a method with its settings"),
     ({"shots": [-1]}, "axes has -1 among its shots and seeds"),
     ({"layers": [1]}, "axes has layers: expected lists under methods, shots, bases, seeds")],
)  # fmt: skip
def test_axes_that_make_no_grid_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[").replace("]", r"\]")):
        Axes.read(AXES | change, "scenes:language")


@pytest.mark.parametrize(
    "axes, change, sentence",
    [(None, {}, "has no axes: give lists under axes.methods"),
     (AXES | {"shots": [4, 12]}, {}, "axes.shots has 12, and data.train holds 12 samples"),
     (AXES, {"train": {"batch_size": 2}}, "train.steps is not given, and epochs are other steps for other sizes of the data"),
     (AXES, {"data": {"val": {"scenes": "val/3"}}}, "give both")],
)  # fmt: skip
def test_a_grid_that_cannot_be_compared_is_refused(axes: Any, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(adalink(*written(tmp_path, axes, RUN | change)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the adapter in")  # that of `full` is for the language model beside it
def test_cells_are_trained_once_also_after_a_kill_on_nested_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(when, "run_adalink", Here(die_after=9))
    assert adalink(*written(tmp_path)).code == 130
    assert 0 < len(cells(tmp_path)) < 8
    again = Here()
    monkeypatch.setattr(when, "run_adalink", again)
    done = adalink(*written(tmp_path), "--resume")
    assert done.code == 0, done.err
    found, rates = cells(tmp_path), cells(tmp_path, "rate")
    assert [(one["method"], one["shots"], one["seed"]) for one in found] == [(m, k, s) for m in ("head", "full") for k in (4, 0) for s in (1, 2)]
    assert len(rates) == 6
    assert {one["method"]: {a["score"] for a in rates if a["method"] == one["method"]} for one in rates}.keys() == {"head", "full"}
    for seed in (1, 2):
        rows = {one["shots"]: {two["rows"] for two in found if (two["seed"], two["shots"]) == (seed, one["shots"])} for one in found}
        assert all(len(same) == 1 for same in rows.values())  # for every method
    whole = found[0]["base_weights"]
    assert {one["weights"] - whole for one in found if one["method"] == "full"} == {one["weights"] for one in found if one["method"] == "head"}
    assert all(one["bytes"] > 4 * whole for one in found if one["method"] == "full")
    before = (tmp_path / "out" / "table.md").read_bytes()
    last = Here()
    monkeypatch.setattr(when, "run_adalink", last)
    assert adalink(*written(tmp_path), "--resume").code == 0
    assert last.commands == []
    assert (tmp_path / "out" / "table.md").read_bytes() == before
    assert "of a bench with another axes" in refused(adalink(*written(tmp_path, AXES | {"seeds": [1]}), "--resume"))
    assert "--resume to go on with it" in refused(adalink(*written(tmp_path)))


def test_the_samples_of_a_size_are_among_those_of_a_larger_one() -> None:
    from tasks.data.sources import saved_data

    bench = when._Bench(config=RUN, axes=Axes.read(AXES, "a"), plan=None, folder=Path(), ledger=None, n=12, metric="")  # type: ignore[arg-type]

    def keys(settings: dict[str, Any]) -> list[str]:
        source = saved_data(settings).open().source
        return [source[i].key for i in range(len(source))]

    (few, after), (more, _), (whole, left) = (tuple(map(keys, bench.data(shots, seed=1))) for shots in (3, 6, 0))
    assert set(few) < set(more) < set(whole)
    assert (len(few), len(more), len(whole)) == (3, 6, 10)
    assert not set(few) & set(after)
    assert not set(whole) & set(left)
    assert keys(bench.data(3, seed=2)[0]) != few
