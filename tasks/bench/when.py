"""When adapting pays: methods of different budgets on samples of different sizes, over seeds, each beside the whole language model trained."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from adalink.errors import AdalinkError, ConfigError, TerminatedError
from adalink.files import locked, write_whole
from multimodal.data.order import fingerprint_of
from tasks.data.sources import saved_data
from tasks.report.compare_pages import COLOURS
from tasks.runs.search.runs import Plan, Read
from tasks.runs.search.trials import Ledger, TrialFailed, folder_bytes, read_metrics, run_adalink
from tasks.task import TRAINED

__all__ = ["Axes", "Cell", "Row", "as_csv", "as_markdown", "as_svg", "conclusions", "rows_of", "run_cells"]

HEAD, FULL = "head", "full"
AXES = ("methods", "shots", "bases", "seeds")
CHOOSING = 1000  # at most so many samples after the shots choose the checkpoint and the learning rates
TUNED_AT = 1000  # shots at which learning rates are chosen, or the nearest size below
RATES, FULL_RATES = (1 / 3, 1.0, 3.0), (1 / 100, 1 / 30, 1 / 10)  # of the config's learning rate
MEASURED = 4  # times in a training, of which the best is taken

# ----------------------------------------
# What is compared.


@dataclass(frozen=True)
class Axes:
    """methods: label -> what it adds to the config's methods. bases: language models by label. Sizes are ascending, with all samples, 0, last."""

    methods: Mapping[str, Mapping[str, Any]]
    shots: tuple[int, ...]
    bases: Mapping[str, str]
    seeds: tuple[int, ...]

    @staticmethod
    def read(given: Any, base: str | None) -> Axes:
        """From `axes` of a config. base: its language model. Raises ConfigError for an axis without values, an unknown one, and a method twice."""
        if not isinstance(given, Mapping) or set(given) - set(AXES):
            wrong = ", ".join(sorted(set(given) - set(AXES))) if isinstance(given, Mapping) else repr(given)
            raise ConfigError(f"axes has {wrong or 'nothing'}: expected lists under {', '.join(AXES)}")
        lists = {"bases": [base], **given}
        for name in AXES:
            if not isinstance(lists.get(name), list) or not lists[name]:
                raise ConfigError(f"axes.{name} is {lists.get(name)!r}: expected a list with at least one value")
        named = [pair for one in lists["methods"] for pair in _expanded(one)]
        for values in ([label for label, _ in named], lists["shots"], lists["bases"], lists["seeds"]):
            if twice := next((one for one in values if values.count(one) > 1), None):
                raise ConfigError(f"axes names {twice} twice: leave one out")
        if bad := [one for one in (*lists["shots"], *lists["seeds"]) if not isinstance(one, int) or one < 0]:
            raise ConfigError(f"axes has {bad[0]!r} among its shots and seeds: give whole numbers from 0 on")
        bases = {str(one): str(one) for one in lists["bases"]}
        short = {place: place.rstrip("/").rpartition("/")[2] for place in bases}
        labels = short if len(set(short.values())) == len(short) else bases
        return Axes(dict(named), tuple(sorted(lists["shots"], key=lambda n: n or math.inf)), {labels[place]: place for place in bases}, tuple(lists["seeds"]))


def _expanded(given: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`{lora: {rank: [1, 8]}}` -> ("lora rank 1", {lora: {rank: 1}}), ...; a list of lists has lists as its values."""
    if given in (HEAD, FULL):
        yield str(given), {}
        return
    if not isinstance(given, Mapping) or len(given) != 1 or not isinstance(next(iter(given.values())), Mapping | None):
        raise ConfigError(f"axes.methods has {given!r}: expected {HEAD}, {FULL}, or a method with its settings, such as {{lora: {{rank: [1, 8]}}}}")
    ((name, settings),) = given.items()
    many = {key: value for key, value in (settings or {}).items() if isinstance(value, list)}
    for values in itertools.product(*many.values()):
        chosen = dict(zip(many, values, strict=True))
        label = " ".join([str(name), *(f"{key} {value}" for key, value in chosen.items())])
        yield label, {str(name): {**(settings or {}), **chosen}}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its evaluation."""

    method: str
    base: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        words = f"{self.method} {self.base} {self.shots or 'all'} seed {self.seed}"
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The cells of a method, a base and a size: scores over seeds, and why others have none. rate: the learning rate that was chosen for the method."""

    method: str
    base: str
    shots: int
    weights: int
    share: float
    bytes: float
    seconds: float
    mib: float
    rate: float
    scores: Sequence[float]
    failed: Sequence[str]

    @property
    def mean(self) -> float:
        """NaN where no cell has a score."""
        return mean(self.scores) if self.scores else math.nan

    @property
    def deviation(self) -> float:
        """Over seeds; NaN of fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else math.nan


# ----------------------------------------
# The cells, trained and scored, with their ledger.


@dataclass
class _Bench:
    """What all cells have in common. n: samples of the training data; sizes: weights of each base."""

    config: dict[str, Any]
    axes: Axes
    plan: Plan
    folder: Path
    ledger: Ledger
    n: int
    metric: str
    sizes: dict[str, int] = field(default_factory=dict)

    def data(self, shots: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first samples of a seed's permutation, and those after them, which choose the checkpoint; of all samples the last ones choose."""
        n = shots or self.n - min(CHOOSING, self.n // 5)
        train = {**self.config["data"]["train"], "shots": n, "shots_seed": seed}
        return train, {**train, "after_shots": CHOOSING}

    def settings(self, cell: Cell, factor: float) -> dict[str, Any]:
        """The config of a cell. factor: of the config's learning rate, for what the method adds; for the head itself where it adds nothing."""
        found = copy.deepcopy(self.config)
        added, settings = self.axes.methods[cell.method], found["train"]
        found["language_model"] = self.axes.bases[cell.base]
        train, choosing = self.data(cell.shots, cell.seed)
        found["data"] = {"train": train, "val": choosing}
        found["methods"] = {**found.get("methods", {}), **added}
        rate = settings.get("learning_rate", 1e-3) * factor
        rates = dict.fromkeys(["language_model"] if cell.method == FULL else list(added), rate)
        settings["learning_rates"] = {**settings.get("learning_rates", {}), **rates}
        if cell.method == HEAD:
            settings["learning_rate"] = rate
        steps = settings["steps"]
        settings |= {"seed": cell.seed, "full": cell.method == FULL, "measure_every": max(1, steps // MEASURED), "keep_best": True, "keep": 1}
        return found

    def trained(self, cell: Cell, factor: float, out: Path) -> dict[str, Any]:
        """Train a cell; what it took, and its score on the samples that chose the checkpoint. Raises TrialFailed."""
        file = out.with_name(f"{out.name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, yaml.safe_dump(self.settings(cell, factor), sort_keys=False).encode())
        resume = ["--resume"] if out.exists() else []
        process = run_adalink(["train", "--config", str(file), "--out", str(out), *resume], out.with_name(f"{out.name}.log"), threads=os.cpu_count() or 1)
        metrics = read_metrics(out)
        weights = sum(metrics["trained_parameters"].values())
        size = folder_bytes(out / "adapter") + folder_bytes(out / "language_model")
        took = {"weights": weights, "bytes": size, "seconds": round(process.seconds, 1), "mib": round(process.mib)}
        return {"chosen_by": _score(metrics, self.metric), **took}

    def scored(self, out: Path) -> float:
        """The metric on the validation data."""
        file, folder = out.with_name(f"{out.name}-val.yaml"), out / "validation"
        config = {**yaml.safe_load(out.with_name(f"{out.name}.yaml").read_text(encoding="utf-8")), "data": {"val": self.config["data"]["val"]}}
        whole = ["--language_model", str(out / "language_model"), "--allow_other_base"] if (out / "language_model").exists() else []
        write_whole(file, yaml.safe_dump(config, sort_keys=False).encode())
        arguments = ["evaluate", "--adapter", str(out / "adapter"), "--config", str(file), "--out", str(folder), *whole]
        run_adalink(arguments, out.with_name(f"{out.name}.log"), threads=os.cpu_count() or 1)
        return _score(read_metrics(folder), self.metric)

    def rate(self, method: str) -> float:
        """The factor of the learning rate that the samples after the shots choose, on the smallest base with the first seed; then it is fixed."""
        known = {event["factor"]: event for event in self.ledger.of("rate") if event["method"] == method}
        base = min(self.axes.bases, key=lambda name: self.sizes[name])
        shots = max([n for n in self.axes.shots if 0 < n <= TUNED_AT], default=self.axes.shots[0])
        cell = Cell(method=method, base=base, shots=shots, seed=self.axes.seeds[0])
        for factor in FULL_RATES if method == FULL else RATES:
            if factor not in known:
                try:
                    found = {"score": self.trained(cell, factor, self.folder / "rates" / f"{cell.name}_{factor:.3g}")["chosen_by"]}
                except TerminatedError:
                    raise
                except AdalinkError as error:
                    found = {"reason": str(error)}
                known[factor] = self.ledger.add("rate", method=method, factor=factor, cell=cell.name, **found)
        scored = {factor: event["score"] for factor, event in known.items() if "score" in event}
        return max(scored, key=lambda factor: scored[factor]) if scored else 1.0

    def run(self, cell: Cell, factor: float) -> None:
        """Train and score a cell, unless the ledger has it; one that fails is a cell with its reason."""
        if any(event["name"] == cell.name for event in self.ledger.of("cell")):
            return
        train, choosing = (fingerprint_of(saved_data(one).open().source)[:16] for one in self.data(cell.shots, cell.seed))
        out = self.folder / "cells" / cell.name
        try:
            found = self.trained(cell, factor, out)
            found["score"] = self.scored(out)
        except TerminatedError:
            raise
        except AdalinkError as error:
            found = {"reason": str(error)}
        rate = factor * self.config["train"].get("learning_rate", 1e-3)
        self.ledger.add("cell", name=cell.name, **vars(cell), rate=rate, rows=train, choosing_rows=choosing, base_weights=self.sizes[cell.base], **found)


def _score(metrics: Mapping[str, Any], metric: str) -> float:
    score = metrics["rows"].get(TRAINED, {}).get(metric or metrics["headline"])
    if score is None or not math.isfinite(score):
        raise TrialFailed(f"the score is {score}")
    return float(score)


def run_cells(config: Path, out: Path, read: Read, plan: Plan, *, resume: bool) -> Iterator[str]:
    """Run every cell that the ledger has not, then write table.md, table.csv and when.svg; lines for the screen come as they are known.

    Raises ConfigError for axes without values or with a method twice, shots above the data, and steps that are not fixed; DataError as `Ledger`.
    """
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give another --out, or --resume to go on with it")
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    if "axes" not in given:
        raise ConfigError(f"{config} has no axes: give lists under {', '.join(f'axes.{name}' for name in AXES)}")
    axes = Axes.read(given.pop("axes"), given.get("language_model"))
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out / ".lock", f"another bench writes {out}: wait for its end, or give another --out")
    try:
        bench = _bench(given, axes, out, read, plan)
        cells = [
            Cell(method=method, base=base, shots=shots, seed=seed)
            for method, base, shots, seed in itertools.product(axes.methods, axes.bases, axes.shots, axes.seeds)
        ]
        yield f"{len(cells)} cells of {bench.config['train']['steps']} steps each, and the learning rates"
        for method in axes.methods:
            factor = bench.rate(method)
            yield f"{method}: learning rate {factor * bench.config['train'].get('learning_rate', 1e-3):.3g}"
            for cell in (cell for cell in cells if cell.method == method):
                bench.run(cell, factor)
        rows = rows_of(bench.ledger.of("cell"))
        write_whole(out / "table.md", as_markdown(rows, bench.config["train"]["steps"]).encode())
        write_whole(out / "table.csv", as_csv(rows).encode())
        write_whole(out / "when.svg", as_svg(rows, bench.metric or "the task's metric").encode())
        yield from conclusions(rows)
        yield f"table: {out / 'table.md'}"
    finally:
        os.close(lock)


def _bench(given: dict[str, Any], axes: Axes, out: Path, read: Read, plan: Plan) -> _Bench:
    """Everything that can be refused is, before a cell is trained."""
    file = out / "base.yaml"
    write_whole(file, yaml.safe_dump(given, sort_keys=False).encode())
    settings, text = read(file)
    config = yaml.safe_load(text)
    if settings.data.train is None or settings.data.val is None:
        raise ConfigError("the cells learn from data.train and are scored on data.val: give both")
    if not settings.train.steps:
        raise ConfigError("train.steps is not given, and epochs are other steps for other sizes of the data: give train.steps, which all cells take")
    n = len(settings.data.train.open().source)
    if over := [shots for shots in axes.shots if shots >= n]:
        raise ConfigError(f"axes.shots has {over[0]}, and data.train holds {n:,} samples, of which some must be left to choose by: give fewer, or 0 for all")
    config = {name: value for name, value in config.items() if name not in ("out", "features")}
    config["methods"] = {name: value for name, value in (config.get("methods") or {}).items() if value is not None}
    ledger = Ledger(out / "cells.jsonl")
    ledger.begin({"config": config, "axes": {name: _plain(getattr(axes, name)) for name in AXES}}, "a bench")
    bench = _Bench(config=config, axes=axes, plan=plan, folder=out, ledger=ledger, n=n, metric="")
    for label, place in axes.bases.items():
        write_whole(file, yaml.safe_dump({**config, "language_model": place}, sort_keys=False).encode())
        bench.sizes[label] = plan(file).base
        if not bench.sizes[label]:
            raise ConfigError("the task is text, whose base is not planned, and budgets are shares of it: give captioning or vqa")
    return bench


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)


# ----------------------------------------
# The table, and what it comes to in words.


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each method, base and size; means are of the cells that have a score, and n says how many these are."""
    found = []
    for method, base, shots in dict.fromkeys((one["method"], one["base"], one["shots"]) for one in cells):
        own = [one for one in cells if (one["method"], one["base"], one["shots"]) == (method, base, shots)]
        took = {name: mean([one[name] for one in own if name in one] or [math.nan]) for name in ("weights", "bytes", "seconds", "mib")}
        weights = 0 if math.isnan(took["weights"]) else round(took["weights"])
        found.append(
            Row(
                method=method, base=base, shots=shots, weights=weights, share=weights / own[0]["base_weights"], bytes=took["bytes"], seconds=took["seconds"],
                mib=took["mib"], rate=own[0]["rate"], scores=[one["score"] for one in own if "score" in one],
                failed=[one["reason"] for one in own if "score" not in one],
            )
        )  # fmt: skip
    return found


_COLUMNS = ("method", "weights", "share of the base", "base", "K", "mean", "standard deviation", "n", "learning rate", "bytes", "seconds", "MiB", "diverged")


def _cells(row: Row) -> tuple[str, ...]:
    numbers = [f"{row.mean:.2f}", f"{row.deviation:.2f}", str(len(row.scores)), f"{row.rate:.3g}", f"{row.bytes:.0f}", f"{row.seconds:.1f}", f"{row.mib:.0f}"]
    written = ["" if number == "nan" else number for number in numbers]
    return (row.method, str(row.weights), f"{100 * row.share:.3f} %", row.base, str(row.shots or "all"), *written, "; ".join(row.failed))


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV; empty where there is no number."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *map(_cells, rows)])
    return text.getvalue()


def as_markdown(rows: Sequence[Row], steps: int) -> str:
    """The table with the three sentences below it."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    about = (
        f"Every cell takes {steps} steps. The samples after the K choose the checkpoint; at one size, on the smallest base and with one seed, they chose the "
        "learning rate of each method, out of three. Scores are of the validation data. Seconds are of the whole training."
    )
    return "\n\n".join([table, about, *conclusions(rows)]) + "\n"


def conclusions(rows: Sequence[Row]) -> list[str]:
    """The smallest budget that reaches `full` at each K; the K at which `full` overtakes; and whether a larger base with a small budget beats it."""
    return [_smallest(rows), _overtaken(rows), _larger(rows)]


def _by(rows: Sequence[Row], base: str, shots: int) -> tuple[Row | None, list[Row]]:
    """(full, the others by their weights) of a base and a size, of those with scores."""
    own = sorted((row for row in rows if (row.base, row.shots) == (base, shots) and row.scores), key=lambda row: row.weights)
    return next((row for row in own if row.method == FULL), None), [row for row in own if row.method != FULL]


def _places(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row.base, row.shots) for row in rows))


def _smallest(rows: Sequence[Row]) -> str:
    found = []
    for base, shots in _places(rows):
        full, others = _by(rows, base, shots)
        if full is not None:
            floor = full.mean - (0.0 if math.isnan(full.deviation) else full.deviation)
            reached = next((row for row in others if row.mean >= floor), None)
            found.append(f"{base}, K = {shots or 'all'}: {f'{reached.method} ({reached.weights:,} weights)' if reached else 'none'}")
    return f"The smallest budget within one standard deviation of `full`: {'; '.join(found)}." if found else "There is no `full` in this grid to reach."


def _overtaken(rows: Sequence[Row]) -> str:
    found = []
    for base in dict.fromkeys(row.base for row in rows):
        at = None
        for shots in (shots for one, shots in _places(rows) if one == base):
            full, others = _by(rows, base, shots)
            if at is None and full is not None and others and full.mean > max(row.mean for row in others):
                at = str(shots or "all")
        found.append(f"{base}: {f'K = {at}' if at else 'never in this grid'}")
    return f"`full` overtakes the best small budget at: {'; '.join(found)}."


def _larger(rows: Sequence[Row]) -> str:
    """Bases by their weights, which are those of the share."""
    size = {row.base: row.weights / row.share for row in rows if row.share}
    if len(size) < 2:
        return "There is one base in this grid, so none larger to compare."
    small, large = min(size, key=lambda base: size[base]), max(size, key=lambda base: size[base])
    found = []
    for shots in dict.fromkeys(shots for _, shots in _places(rows)):
        full, (_, others) = _by(rows, small, shots)[0], _by(rows, large, shots)
        if full is not None and others:
            best = max(others, key=lambda row: row.mean)
            word = "beats" if best.mean > full.mean else "does not beat"
            found.append(f"K = {shots or 'all'}: {best.method} on {large} ({best.mean:.2f}) {word} `full` on {small} ({full.mean:.2f})")
    return f"Small budgets on the larger base: {'; '.join(found) or 'no cells to compare'}."


# ----------------------------------------
# The image: a panel for each base, and one of budgets.


WIDTH, HEIGHT, LEFT, TOP, GAP, RIGHT = 260, 200, 56, 64, 70, 190


def as_svg(rows: Sequence[Row], metric: str) -> str:
    """A panel for each base: score against K, a line for each method with its band over seeds, `full` dashed; then the share of `full` against budget."""
    methods, bases = list(dict.fromkeys(row.method for row in rows)), list(dict.fromkeys(row.base for row in rows))
    sizes = sorted({row.shots for row in rows}, key=lambda n: n or math.inf)
    scores = [value for row in rows if row.scores for value in (row.mean - _band(row), row.mean + _band(row))] or [0.0, 1.0]
    low, high = min(scores), max(max(scores), min(scores) + 1e-9)
    width, height = LEFT + (len(bases) + 1) * (WIDTH + GAP) + RIGHT, TOP + HEIGHT + 60
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">']
    parts += [f'<rect width="{width}" height="{height}" fill="white"/>', _word(LEFT, 22, f"{metric} against the number of samples, K", 14)]
    for number, base in enumerate(bases):
        x = LEFT + number * (WIDTH + GAP)
        parts += _frame(x, base, [(_across(x, i, len(sizes)), str(shots or "all")) for i, shots in enumerate(sizes)], low, high)
        for i, method in enumerate(methods):
            own = [(sizes.index(row.shots), row) for row in rows if (row.base, row.method) == (base, method) and row.scores]
            places = [(_across(x, at, len(sizes)), *(_up(row.mean + side * _band(row), low, high) for side in (0, -1, 1))) for at, row in own]
            parts += _line(places, COLOURS[i % len(COLOURS)], method, base, [row for _, row in own])
    parts += _budgets(rows, methods, LEFT + len(bases) * (WIDTH + GAP))
    for i, method in enumerate(methods):
        parts += [f'<rect x="{width - RIGHT + 10}" y="{TOP + 18 * i}" width="12" height="4" fill="{COLOURS[i % len(COLOURS)]}"/>']
        parts += [_word(width - RIGHT + 28, TOP + 18 * i + 7, method)]
    return "\n".join([*parts, "</svg>", ""])


def _band(row: Row) -> float:
    return 0.0 if math.isnan(row.deviation) else row.deviation


def _across(x: float, at: float, count: int) -> float:
    """Sizes are usually apart by factors, so each has the same room."""
    return x + 12 + (WIDTH - 24) * (at / max(count - 1, 1))


def _up(value: float, low: float, high: float) -> float:
    return TOP + HEIGHT * (1 - (value - low) / (high - low))


def _frame(x: float, title: str, across: Sequence[tuple[float, str]], low: float, high: float) -> list[str]:
    parts = [_word(x, TOP - 12, title), f'<path d="M{x} {TOP}V{TOP + HEIGHT}H{x + WIDTH}" fill="none" stroke="#57606a"/>']
    parts += [_word(at, TOP + HEIGHT + 18, label, anchor="middle") for at, label in across]
    return parts + [_word(x - 6, _up(value, low, high) + 4, f"{value:.4g}", anchor="end") for value in (low, (low + high) / 2, high)]


def _line(places: Sequence[tuple[float, ...]], colour: str, method: str, base: str, rows: Sequence[Row]) -> list[str]:
    """One line with its band; each point has the numbers of its row."""
    about = f'data-method="{escape(method, quote=True)}" data-base="{escape(base, quote=True)}"'
    band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*((a, d) for a, _, _, d in places), *((a, c) for a, _, c, _ in reversed(places))])
    dash = ' stroke-dasharray="6 4"' if method == FULL else ""
    parts = [f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>'] if places else []
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in places)
    parts.append(f'<polyline class="line" {about} points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    for (a, b, *_), row in zip(places, rows, strict=True):
        parts.append(f'<circle {about} data-k="{row.shots or "all"}" data-mean="{row.mean:.2f}" cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
    return parts


def _budgets(rows: Sequence[Row], methods: Sequence[str], x: float) -> list[str]:
    """The share of `full` that each small budget reaches, against its weights as a share of the base, by their logarithm."""
    points = []
    for base, shots in _places(rows):
        full, others = _by(rows, base, shots)
        points += [(row.share, 100 * row.mean / full.mean, row.method) for row in others if full is not None and full.mean and row.share]
    if not points:
        return []
    left, right = (math.floor(math.log10(min(p[0] for p in points))), math.ceil(math.log10(max(p[0] for p in points))) + 1)
    low, high = min(0.0, *(p[1] for p in points)), max(100.0, *(p[1] for p in points))
    ticks = [(_across(x, power - left, right - left + 1), f"{100 * 10.0**power:g} %") for power in range(left, right + 1)]
    parts = _frame(x, "percent of `full`, against weights as a share of the base", ticks, low, high)
    for share, value, method in points:
        at = _across(x, math.log10(share) - left, right - left + 1)
        parts.append(f'<circle cx="{at:.1f}" cy="{_up(value, low, high):.1f}" r="4" fill="{COLOURS[methods.index(method) % len(COLOURS)]}"/>')
    return parts


def _word(x: float, y: float, text: str, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#1b1f24">{escape(text)}</text>'
