"""Bootstrap intervals of corpus metrics: how far a metric would move with another draw of items from the same source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from adalink.errors import ConfigError, DataError
from tasks.metrics.bleu import bleu
from tasks.metrics.captions import CaptionScores
from tasks.metrics.ngrams import Floats
from tasks.metrics.vqa import AnswerScores, GradedQuestion, named_accuracies

__all__ = [
    "MetricValue", "Metrics", "Interval", "Listing", "Resampling", "aligned", "answer_metrics", "as_json", "as_table",
    "caption_metrics", "intervals", "paired_intervals", "software",
]  # fmt: skip


_AT_ONCE = 1 << 21  # weights drawn together, 16 MB of them


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are found."""

    n_resamples: int = 1000  # 0: no intervals
    level: float = 0.95  # share of resamples inside the interval
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.n_resamples < 0:
            raise ConfigError(f"the number of resamples is {self.n_resamples}; give 0 (no intervals) or more")
        if not 0 < self.level < 1:
            raise ConfigError(f"the level of the intervals is {self.level}; give a share between 0 and 1, such as 0.95")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The percentile interval of a metric, in the metric's unit."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of a corpus as a function of how often each item counts.

    names    of the metrics
    items    how many items the corpus has
    counts   how many items a metric is of, by name, where not all of them
    of       float64[draws, items] -> float64[draws, names]: with all ones, the corpus metrics; NaN where nothing of a kind is drawn
    """

    names: tuple[str, ...]
    items: int
    of: Callable[[Floats], Floats]
    counts: Mapping[str, int] = field(default_factory=dict)

    def n_of(self, name: str) -> int:
        """How many items a metric is of."""
        return self.counts.get(name, self.items)

    def chosen(self, names: Iterable[str] | Mapping[str, str], scale: float = 1.0) -> Metrics:
        """Some of the metrics in another order and unit; a mapping gives each a new name: {"accuracy": "overall"}.

        Names that there are not are left out.
        """
        new = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        places = {name: self.names.index(old) for name, old in new.items() if old in self.names}
        columns = list(places.values())
        counts = {name: self.n_of(new[name]) for name in places}
        return Metrics(names=tuple(places), items=self.items, of=lambda weights: scale * self.of(weights)[:, columns], counts=counts)


def caption_metrics(scores: CaptionScores) -> Metrics:
    """BLEU-1 .. 4, ROUGE-L and CIDEr of resampled images, from sums over images.

    CIDEr's document frequencies stay those of the whole corpus: an image's score is what it is, and only the draw of images varies.
    """
    sums = scores.bleu
    means = [[row["ROUGE_L"], row["CIDEr"]] for row in scores.per_image.values()]
    table = np.hstack([sums.correct, sums.guess, sums.length[:, None], sums.reference_length[:, None], np.array(means)]).astype(np.float64)

    def of(weights: Floats) -> Floats:
        total = weights @ table
        metrics = bleu(total[:, :4], total[:, 4:8], total[:, 8], total[:, 9])
        return np.hstack([metrics, total[:, 10:] / weights.sum(1, keepdims=True)])

    return Metrics(names=("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"), items=len(table), of=of)


def answer_metrics(scores: AnswerScores, questions: Sequence[GradedQuestion]) -> Metrics:
    """Accuracy overall, by answer type and by question type, of resampled questions, in percent."""
    accuracy = np.array([scores.per_question[question.question_id] for question in questions])
    kinds = ([question.answer_type for question in questions], [question.question_type for question in questions])
    named = [({name: at for at, name in enumerate(by)}, kind) for by, kind in zip((scores.per_answer_type, scores.per_question_type), kinds, strict=True)]
    places = [np.array(list(map(at.__getitem__, kind))) for at, kind in named if set(at) != {""}]
    orders = [np.argsort(place, kind="stable") for place in places]
    starts = [np.flatnonzero(np.diff(place[order], prepend=-1)) for place, order in zip(places, orders, strict=True)]

    def of(weights: Floats) -> Floats:
        found = [(weights @ accuracy / weights.sum(1))[:, None]]
        for order, start in zip(orders, starts, strict=True):
            counts = np.add.reduceat(weights[:, order], start, axis=1)
            sums = np.add.reduceat((weights * accuracy)[:, order], start, axis=1)
            found.append(np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0))
        return np.hstack(found)

    n_items = [len(questions), *(int(n) for place in places for n in np.bincount(place))]
    names = tuple(named_accuracies(scores))
    return Metrics(names=names, items=len(questions), of=of, counts=dict(zip(names, n_items, strict=True)))


def intervals(metrics: Metrics, settings: Resampling) -> dict[str, Interval]:
    """The interval of each metric; none with no resamples."""
    return _percentiles(metrics, [metrics.of], settings)


def paired_intervals(before: Metrics, after: Metrics, settings: Resampling) -> dict[str, Interval]:
    """The interval of each difference, after minus before, both of the same items in the same order, drawn together.

    Pairing takes out what makes items easy or hard for both, so it finds differences that two separate intervals would hide. A metric of
    one item has none: every draw repeats that item, and its difference would seem sure.
    Raises DataError where the two are not of the same metrics and items.
    """
    if (before.names, before.items) != (after.names, after.items):
        raise DataError(
            f"the two runs cannot be paired: {len(before.names)} metrics of {before.items} items, and {len(after.names)} of {after.items}; "
            "expected the same of both"
        )
    found = _percentiles(before, [before.of, after.of], settings)
    return {name: interval for name, interval in found.items() if before.n_of(name) > 1}


def _percentiles(metrics: Metrics, of: Sequence[Callable[[Floats], Floats]], settings: Resampling) -> dict[str, Interval]:
    """Of the last function's metrics, less the first's where there are two."""
    n_items = metrics.items
    if settings.n_resamples == 0:
        return {}
    generator = np.random.default_rng(settings.seed)
    drawn = []
    for left in range(settings.n_resamples, 0, -(n_rows := max(1, _AT_ONCE // n_items))):
        rows = min(left, n_rows)
        chosen = generator.integers(0, n_items, (rows, n_items)) + np.arange(0, rows * n_items, n_items)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=rows * n_items).reshape(rows, n_items).astype(np.float64)
        drawn.append(of[-1](weights) - (of[0](weights) if len(of) > 1 else 0))
    unknown = 50 * (1 - settings.level)
    low, high = np.nanpercentile(np.concatenate(drawn), [unknown, 100 - unknown], axis=0)
    return {name: Interval(low=float(a), high=float(b)) for name, a, b in zip(metrics.names, low, high, strict=True)}


# ----------------------------------------
# Metrics with their intervals and scorers, as a table for people and as JSON for machines.


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One number of a corpus.

    value     in the unit of the official code: a fraction for captions (CIDEr of 10), percent for answers
    scale     what makes it percent, as papers and all other commands have it
    scorer    what computed it, with its version
    interval  None where none was asked for or none can be found
    """

    name: str
    value: float
    scorer: str
    scale: float = 1.0
    interval: Interval | None = None

    @property
    def percent(self) -> float:
        """The value in percent."""
        return self.scale * self.value


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a file of results scored.

    source   what was compared with what, for the heading: {"references": "captions_val2014.json", ...}
    unit     of what: "images" or "questions"
    notes    sentences about what was scored
    """

    source: Mapping[str, str]
    n_items: int
    unit: str
    metrics: Sequence[MetricValue]
    resampling: Resampling
    notes: Sequence[str] = ()


def software() -> str:
    """This package with its version, which stands beside every metric."""
    try:
        return f"adalink {version('adalink')}"
    except PackageNotFoundError:  # run from a folder that was never installed
        return "adalink (not installed)"


def as_table(listing: Listing) -> str:
    """Lines for the screen; the scorers stand above the metrics that they made."""
    lines = [f"{name}: {value}" for name, value in listing.source.items()]
    lines.append(f"{listing.n_items} {listing.unit}; computed by {software()}")
    lines += listing.notes
    level = f"{100 * listing.resampling.level:g} % interval"
    for scorer in dict.fromkeys(metric.scorer for metric in listing.metrics):
        metrics = [metric for metric in listing.metrics if metric.scorer == scorer]
        rows: list[tuple[str, ...]] = [("metric", "value", level, "in percent")]
        for metric in metrics:
            between = f"{metric.interval.low:.4f} .. {metric.interval.high:.4f}" if metric.interval else ""
            rows.append((metric.name, f"{metric.value:.4f}", between, f"{metric.percent:.2f}"))
        if all(metric.scale == 1 for metric in metrics):  # they are percent
            rows = [row[:3] for row in rows]
        lines += ["", f"scorer: {scorer}", *aligned(rows)]
    return "\n".join(lines)


def as_json(listing: Listing) -> str:
    """One object: software, source, n_items, resampling, notes, and metrics by name.

    Each has its value and interval (low, high, or null) in the unit of the official code, the value in percent, and the scorer.
    """
    metrics = {
        metric.name: {
            "value": metric.value,
            "percent": metric.percent,
            "interval": [metric.interval.low, metric.interval.high] if metric.interval else None,
            "scorer": metric.scorer,
        }
        for metric in listing.metrics
    }
    about = {"software": software(), **listing.source, "n_items": listing.n_items, "unit": listing.unit, "resampling": vars(listing.resampling)}
    return json.dumps({**about, "notes": list(listing.notes), "figures": metrics}, indent=2)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
