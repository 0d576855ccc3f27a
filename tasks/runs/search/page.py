"""The page of a search: its front beside chance's, what it gained in words, which settings went with the score, and the configs to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from markupsafe import Markup

from multimodal.sample import counted
from tasks.metrics.bootstrap import software
from tasks.metrics.text import text_metrics
from tasks.report.compare_pages import RunsPage, Series, write_runs_page
from tasks.report.svg import draw_many, draw_points
from tasks.runs.search.runs import Runs, Winner
from tasks.runs.search.search import CONTROL, SEARCH, Point, Search, Trial, front, hypervolume
from tasks.runs.search.space import Setting

__all__ = ["importance", "sentences", "write_page"]

COLOURS = ("found by the search", "drawn by chance")
FEWEST = 3  # trials of which a correlation is computed


def write_page(search: Search, runs: Runs, winners: Sequence[Winner], path: Path) -> list[str]:
    """Write report.html; its sentences come back, for the screen."""
    last = len(search.settings.shares) - 1
    notes = [*sentences(search, runs.metric), runs.prepared.sentence]
    tables: dict[str, list[tuple[str, ...]]] = {
        "The front": _winners(search, runs, winners),
        "Rank correlation of each setting, at the first rung": importance(search, runs),
        "Failed trials": [("trial", "settings", "reason"), *((one.name, _values(search, one), one.reason) for one in search.trials.values() if one.reason)],
    }
    titles = {last: "All steps"} | ({0: f"The first rung, {search.settings.shares[0]:.0%} of the steps"} if last else {})
    page = RunsPage(
        title=f"Search: {runs.metric} against {runs.cost.replace('_', ' ')}",
        tables=tables,
        series={},
        software=software(),
        notes=notes,
        plots={title: _scatter(search, runs, rung) for rung, title in titles.items()} | {"Hypervolume over trials, first rung": _growth(search)},
        colours=COLOURS,
        texts={winner.config.name: winner.config.read_text(encoding="utf-8") for winner in winners},
    )
    write_runs_page(page, path)
    return notes


def _reached(search: Search, kind: str, rung: int) -> list[Trial]:
    return [trial for trial in search.of(kind) if rung in trial.outcomes]


def _points(search: Search, kind: str, rung: int) -> list[Point]:
    return [trial.point(rung) for trial in _reached(search, kind, rung)]


def _reference(search: Search, rung: int) -> Point:
    """The greatest cost and the least score of all trials of a rung: no trial lies beyond it."""
    points = [*_points(search, SEARCH, rung), *_points(search, CONTROL, rung)]
    return max(cost for cost, _ in points) + 1, min(score for _, score in points)


def _growth_of(search: Search, kind: str, reference: Point) -> list[Point]:
    """(trials, hypervolume) after each trial."""
    points = _points(search, kind, 0)
    return [(n, hypervolume(points[:n], reference)) for n in range(1, len(points) + 1)]


def sentences(search: Search, metric: str) -> list[str]:
    """What was found, against chance at the same number of trials."""
    done, failed = len(search.of(SEARCH)), sum(bool(one.reason) for one in search.of(SEARCH))
    many = f"{counted(done, 'configuration')} {'was' if done == 1 else 'were'} tried, " + (f"of which {failed} failed" if failed else "and none failed")
    if not _reached(search, SEARCH, 0):
        return [f"{many}: there is no front"]
    drawn = _reached(search, CONTROL, 0)
    if not drawn:
        return [many, "There is no random control (--control 0), so nothing shows that the search is better than chance."]
    n = min(len(drawn), len(_reached(search, SEARCH, 0)))
    reference = _reference(search, 0)
    own, chance = (hypervolume(_points(search, kind, 0)[:n], reference) for kind in (SEARCH, CONTROL))
    compared = f"at {n} trials each and the first rung's scores, the search encloses {own:.4g} and chance {chance:.4g} (hypervolume)"
    found = [many, f"The search is better than chance: {compared}." if own > chance else f"The search is not better than chance: {compared}."]
    last = len(search.settings.shares) - 1
    ends = [_points(search, kind, last) for kind in (SEARCH, CONTROL)]
    if all(ends):
        best = [max(score for _, score in points) for points in ends]
        beaten = [point for point in ends[1] if not any(cost <= point[0] and score >= point[1] for cost, score in ends[0])]
        found.append(
            f"After all steps the best {metric} is {best[0]:.2f} of the search's {len(ends[0])} and {best[1]:.2f} of chance's {len(ends[1])}; "
            + (f"{len(beaten)} of chance's lie beyond the search's front." if beaten else "none of chance's lies beyond the search's front.")
        )
    return found


def _scatter(search: Search, runs: Runs, rung: int) -> Markup:
    series = [Series(name=name, points=_points(search, kind, rung)) for name, kind in zip(COLOURS, (SEARCH, CONTROL), strict=True)]
    return draw_points("Trials", series, [_steps(one.points) for one in series], runs.metric, runs.cost.replace("_", " "))


def _steps(points: Sequence[Point]) -> list[Point]:
    """The edge of what a front encloses."""
    edge: list[Point] = []
    for i in front(points):
        edge += [(points[i][0], edge[-1][1])] if edge else []
        edge.append(points[i])
    return [*edge, (max(cost for cost, _ in points), edge[-1][1])] if edge else []


def _growth(search: Search) -> Markup:
    if not _reached(search, SEARCH, 0):
        return Markup("")
    reference = _reference(search, 0)
    series = [Series(name=name, points=_growth_of(search, kind, reference)) for name, kind in zip(COLOURS, (SEARCH, CONTROL), strict=True)]
    return draw_many("Hypervolume", series, "trials")


def _winners(search: Search, runs: Runs, winners: Sequence[Winner]) -> list[tuple[str, ...]]:
    seeds = list(winners[0].again) if winners else []
    head = ("trial", "settings", runs.cost.replace("_", " "), "in the search", *(f"again, seed {seed}" for seed in seeds), "validation, mean of the seeds")
    rows = []
    for one in winners:
        again = [f"{score:.2f}" if isinstance(score, float) else f"none: {score}" for score in one.again.values()]
        val = f"{mean(one.val.values()):.2f}" if one.val else "none"
        rows.append((one.trial.name, _values(search, one.trial), f"{one.cost:,g}", f"{one.searched:.2f}", *again, val))
    return [head, *rows]


def _values(search: Search, trial: Trial) -> str:
    values = search.space.values(trial.choices).items()
    named = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values]
    return ", ".join([*named, *(f"without {method}" for method in search.space.off(trial.choices))])


def importance(search: Search, runs: Runs) -> list[tuple[str, ...]]:
    """By method: Spearman's correlation of each setting with score and cost, over the trials in which it counts; of a choice, of each of its values."""
    trials = [trial for kind in (SEARCH, CONTROL) for trial in _reached(search, kind, 0)]
    rows = []
    for setting in search.space.settings:
        own = [trial for trial in trials if setting.name in search.space.values(trial.choices)]
        if len(own) < FEWEST:
            continue
        scores, costs = [trial.point(0)[1] for trial in own], [trial.point(0)[0] for trial in own]
        for name, values in _columns(setting, own):
            found = [text_metrics(["spearmanr"], values, side)["spearmanr"] for side in (scores, costs)]
            rows.append((setting.method.partition(".")[2] or "the run", name, str(len(own)), *("constant" if one is None else f"{one:+.2f}" for one in found)))
    rows.sort(key=lambda row: (row[0], -abs(float(row[3])) if row[3] != "constant" else 1))
    return [("method", "setting", "trials", f"with {runs.metric}", f"with {runs.cost.replace('_', ' ')}"), *rows]


def _columns(setting: Setting, trials: Sequence[Trial]) -> list[tuple[str, list[float]]]:
    """(what it is, its value in each trial)."""
    if setting.kind == "layers":
        return [(name.replace("[", ": layer ").rstrip("]") + " is on", [float(one.choices[name]) for one in trials]) for name in setting.parameters]
    if setting.kind == "one_of":
        return [(f"{setting.name} is {value}", [float(one.choices[setting.name] == i) for one in trials]) for i, value in enumerate(setting.values)]
    return [(setting.name, [float(one.choices[setting.name]) for one in trials])]
