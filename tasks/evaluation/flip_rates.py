"""What a new model does to the items that an old one had right: counts, rates with intervals, by type, and how much graded items lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from adalink.errors import ConfigError, ScoreError
from tasks.metrics.bootstrap import Interval, Metrics, Resampling, aligned, intervals
from tasks.metrics.vqa import QuestionId

__all__ = ["FlipCounts", "FlipRates", "Pair", "check_limit", "counts_of", "flip_rates", "nfr_matrix"]

NEGATIVE, POSITIVE, LOSS, GAIN = "negative flip rate", "positive flip rate", "loss", "gain"
_MOST_TYPES = 10  # on the screen


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One item in both runs: the text of each, and its metric (CIDEr or accuracy, in percent)."""

    item: QuestionId
    said_before: str
    said_after: str
    before: float
    after: float

    @property
    def has_other_words(self) -> bool:
        """Whether the texts differ in more than case and spaces."""
        return self.said_before.lower().split() != self.said_after.lower().split()


@dataclass(frozen=True, kw_only=True)
class FlipCounts:
    """How many items were right (first word: before, second: after); other_words: those wrong in both runs with other words.

    The names are those of MUSCLE (Echterhoff et al. 2024, arXiv 2407.09435): an item that was right and is wrong is a negative flip.
    """

    right_right: int
    right_wrong: int
    wrong_right: int
    wrong_wrong: int
    other_words: int

    @property
    def n(self) -> int:
        """All items."""
        return self.right_right + self.right_wrong + self.wrong_right + self.wrong_wrong

    @property
    def negative(self) -> float:
        """Share of all items that were right before and are wrong now."""
        return self.right_wrong / self.n

    @property
    def positive(self) -> float:
        """Share of all items that were wrong before and are right now."""
        return self.wrong_right / self.n

    @property
    def inconsistent(self) -> float:
        """Share of all items that a user sees change for the worse, or from one wrong text to another."""
        return (self.right_wrong + self.other_words) / self.n

    @property
    def by_chance(self) -> float:
        """The negative flip rate of two models with these accuracies that know nothing of each other."""
        return (self.right_right + self.right_wrong) * (self.right_wrong + self.wrong_wrong) / self.n**2

    @property
    def observed_over_independent(self) -> float | None:
        """Negative flip rate by that of chance: 1 where the new model knows nothing of the old one; None where chance would flip nothing."""
        return self.negative / self.by_chance if self.by_chance else None

    @property
    def relative_negative(self) -> float | None:
        """Of the items that are wrong now, the share that was right; None where nothing is wrong."""
        wrong = self.right_wrong + self.wrong_wrong
        return self.right_wrong / wrong if wrong else None


@dataclass(frozen=True, kw_only=True)
class FlipRates:
    """Flips of all items and of each type, and how far the items' metrics moved.

    by_type     name -> its counts; those with most negative flips first
    loss, gain  mean over all items of max(before - after, 0), and of max(after - before, 0), in percent; gain - loss is the difference of the means
    lost_share  share of the items that lost more than `margin`, in percent
    intervals   of the two rates (as shares), of loss and of gain, by name; empty without resamples and for one item
    """

    counts: FlipCounts
    by_type: Mapping[str, FlipCounts]
    loss: float
    gain: float
    margin: float
    lost_share: float
    intervals: Mapping[str, Interval]

    def document(self) -> dict[str, object]:
        """For JSON: counts, rates, what is graded, and the types in their order."""
        own = self.counts
        return {
            "counts": asdict(own),
            "inconsistency": own.inconsistent,
            "relative_negative_flips": own.relative_negative,
            "observed_over_independent": own.observed_over_independent,
            "graded": {"loss": self.loss, "gain": self.gain, "margin": self.margin, "lost_share": self.lost_share},
            "intervals": {name: [interval.low, interval.high] for name, interval in self.intervals.items()},
            "by_type": {name: {"n": counts.n, **asdict(counts)} for name, counts in self.by_type.items()},
        }

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Rows of cells, the first with the names of the columns: the two by two counts with their rates, then the types."""
        own, n = self.counts, self.counts.n
        rows: list[tuple[str, ...]] = [("flips", "items", "in percent", "95 % interval")]
        rows += [
            (name, f"{count:,}", f"{100 * count / n:.2f}", self._between(rate, 100))
            for name, count, rate in (
                ("right in both", own.right_right, ""),
                ("right to wrong", own.right_wrong, NEGATIVE),
                ("wrong to right", own.wrong_right, POSITIVE),
                ("wrong in both, other words", own.other_words, ""),
                ("wrong in both, the same words", own.wrong_wrong - own.other_words, ""),
            )
        ]
        types: list[tuple[str, ...]] = [("type", "n", "right to wrong", "wrong to right", "wrong, other words")]
        types += [(name, f"{c.n:,}", f"{c.right_wrong:,}", f"{c.wrong_right:,}", f"{c.other_words:,}") for name, c in list(self.by_type.items())[:_MOST_TYPES]]
        return [rows, types] if self.by_type else [rows]

    def sentences(self) -> list[str]:
        """Lines below the tables: the rates beside chance, and what items lost and gained."""
        own, ratio = self.counts, self.counts.observed_over_independent
        beside = "" if ratio is None else f", {ratio:.2f} of the {100 * own.by_chance:.2f} % of two unrelated models with these accuracies"
        loss, gain = (f" ({between})" if (between := self._between(name, 1)) else "" for name in (LOSS, GAIN))
        return [
            f"negative flips are {100 * own.negative:.2f} %{beside}; right to wrong, or wrong with other words: {100 * own.inconsistent:.2f} %",
            f"by how much: items lose {self.loss:.2f}{loss} and gain {self.gain:.2f}{gain}, means over all of them; {100 * self.lost_share:.2f} % lose more "
            f"than {self.margin:g}",
        ]

    def lines(self) -> list[str]:
        """All of it for the screen."""
        tables = [line for table in self.tables() for line in ("", *aligned(table))]
        hidden = len(self.by_type) - _MOST_TYPES
        return [*tables, *([f"and {hidden} types with no more negative flips than these"] if hidden > 0 else []), "", *self.sentences()]

    def check(self, most_negative: float, *, by_estimate: bool = False) -> None:
        """Raise ScoreError where the negative flip rate is surely above a limit: by the lower end of its interval, or by the rate itself.

        most_negative: a share from 0 to 1; others, and an interval that was not drawn, raise ConfigError.
        """
        check_limit(most_negative)
        interval = self.intervals.get(NEGATIVE)
        if interval is None and not by_estimate:
            raise ConfigError("the negative flip rate has no interval to judge: give two items or more, and --resamples 1000, or --by_estimate for the rate")
        found = self.counts.negative if by_estimate or interval is None else interval.low
        if found > most_negative:
            between = "" if interval is None else f" (95 % interval {100 * interval.low:.2f} .. {100 * interval.high:.2f})"
            worst = next((f", most of them {name} ({counts.right_wrong})" for name, counts in self.by_type.items()), "")
            raise ScoreError(
                f"{self.counts.right_wrong} of {self.counts.n} items went from right to wrong{worst}: a negative flip rate of "
                f"{100 * self.counts.negative:.2f} %{between}, and at most {100 * most_negative:g} % was allowed: look at the items, or train with teachers"
            )

    def _between(self, name: str, scale: float) -> str:
        found = self.intervals.get(name)
        return f"{scale * found.low:.2f} .. {scale * found.high:.2f}" if found else ""


def check_limit(most_negative: float) -> None:
    """Raise ConfigError where a limit of the negative flip rate is no share."""
    if not 0 <= most_negative <= 1:
        raise ConfigError(f"the most negative flips are {most_negative}: give a share from 0 to 1, such as 0.02 for two items of a hundred")


def counts_of(pairs: Sequence[Pair], right_from: float) -> FlipCounts:
    """The two by two counts; an item is right from this metric on."""
    before, after = (np.array([getattr(pair, name) for pair in pairs]) >= right_from for name in ("before", "after"))
    other = np.array([pair.has_other_words for pair in pairs], bool)
    return FlipCounts(
        right_right=int((before & after).sum()), right_wrong=int((before & ~after).sum()), wrong_right=int((~before & after).sum()),
        wrong_wrong=int((~before & ~after).sum()), other_words=int((~before & ~after & other).sum()),
    )  # fmt: skip


def flip_rates(
    pairs: Sequence[Pair], right_from: float, *, types: Sequence[Sequence[str]] = (), margin: float = 0.0, resampling: Resampling | None = None
) -> FlipRates:
    """All rates of the items of two runs.

    types    of each item, the names of the types that it is of; none: nothing by type
    margin   an item that loses more than this, in percent of its metric, counts towards `lost_share`
    """
    moved = np.array([pair.after - pair.before for pair in pairs])
    before, after = (np.array([getattr(pair, name) for pair in pairs]) >= right_from for name in ("before", "after"))
    table = np.stack([before & ~after, ~before & after, np.maximum(-moved, 0), np.maximum(moved, 0)], 1).astype(np.float64)
    metrics = Metrics(names=(NEGATIVE, POSITIVE, LOSS, GAIN), items=len(pairs), of=lambda weights: weights @ table / weights.sum(1, keepdims=True))
    members: dict[str, list[Pair]] = {}
    for pair, names in zip(pairs, types, strict=False):
        for name in names:
            members.setdefault(name, []).append(pair)
    by_type = {name: counts_of(members[name], right_from) for name in members}
    return FlipRates(
        counts=counts_of(pairs, right_from),
        by_type=dict(sorted(by_type.items(), key=lambda item: (-item[1].right_wrong, -item[1].negative))),
        loss=float(table[:, 2].mean()),
        gain=float(table[:, 3].mean()),
        margin=margin,
        lost_share=float((-moved > margin).mean()),
        intervals=intervals(metrics, resampling or Resampling()) if len(pairs) > 1 else {},
    )


def nfr_matrix(right: Sequence[frozenset[QuestionId]], n_items: int) -> list[list[float]]:
    """Negative flip rates between several runs on the same items: row before, column after. right: what each run has right."""
    return [[len(before - after) / n_items for after in right] for before in right]
