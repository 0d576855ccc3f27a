"""The metrics of text classification and similarity, equal to GLUE's (scikit-learn's and scipy's) to 1e-12: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from tasks.metrics.bootstrap import Metrics
from tasks.metrics.ngrams import Floats

__all__ = ["CLASS_METRICS", "NUMBER_METRICS", "SCORER", "classes_of", "resampled_metrics", "text_metrics"]

SCORER = "adalink text (as GLUE's metrics: scikit-learn, scipy)"

Ints = NDArray[np.int64]

# ----------------------------------------
# Each metric of resampled items: float64[draws, items] says how often each item counts, and all ones give the metric of the corpus.


def _accuracy(weights: Floats, given: Ints, wanted: Ints) -> Floats:
    return np.asarray(weights @ (given == wanted) / weights.sum(1))


def _f1_of(weights: Floats, given: Ints, wanted: Ints, number: int) -> Floats:
    """F1 of one class; 0 where it is neither given nor wanted."""
    hits = weights @ ((given == number) & (wanted == number))
    both = weights @ (given == number) + weights @ (wanted == number)
    return np.asarray(np.divide(2 * hits, both, out=np.zeros(len(weights)), where=both > 0))


def _f1(weights: Floats, given: Ints, wanted: Ints) -> Floats:
    return _f1_of(weights, given, wanted, 1)


def _macro_f1(weights: Floats, given: Ints, wanted: Ints) -> Floats:
    """The mean over the classes that occur on either side; an answer that names no label (-1) is none."""
    numbers = [int(number) for number in np.union1d(given, wanted) if number >= 0]
    occurs = np.stack([weights @ ((given == number) | (wanted == number)) > 0 for number in numbers])
    return np.asarray(np.sum([_f1_of(weights, given, wanted, number) for number in numbers], axis=0) / occurs.sum(0))


def _matthews(weights: Floats, given: Ints, wanted: Ints) -> Floats:
    """(c n - sum t_k p_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2)), for any number of classes; 0 where one side is constant."""
    n, c = weights.sum(1), weights @ (given == wanted)
    p, t = (np.stack([weights @ (side == number) for number in np.union1d(given, wanted)]) for side in (given, wanted))
    below = np.sqrt((n**2 - (p**2).sum(0)) * (n**2 - (t**2).sum(0)))
    return np.asarray(np.divide(c * n - (t * p).sum(0), below, out=np.zeros(len(weights)), where=below > 0))


def _pearson(weights: Floats, given: Floats, wanted: Floats) -> Floats:
    return _correlation(weights, np.broadcast_to(given - given.mean(), weights.shape), np.broadcast_to(wanted - wanted.mean(), weights.shape))


def _spearman(weights: Floats, given: Floats, wanted: Floats) -> Floats:
    return _correlation(weights, _weighted_ranks(weights, given), _weighted_ranks(weights, wanted))


def _correlation(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Of each draw; x and y are [draws, items]. NaN where a side is constant."""
    n = weights.sum(1, keepdims=True)
    x, y = (side - (weights * side).sum(1, keepdims=True) / n for side in (x, y))
    below = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
    return np.asarray(np.divide((weights * x * y).sum(1), below, out=np.full(len(weights), np.nan), where=below > 0))


def _weighted_ranks(weights: Floats, values: Floats) -> Floats:
    """[draws, items]: each item's rank among the items drawn, the mean of its places where it is tied."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    tied = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(tied, axis=1) - tied / 2 + 0.5)[:, group])


Metric = Callable[[Floats, NDArray[np.generic], NDArray[np.generic]], Floats]
CLASS_METRICS: Mapping[str, Metric] = {"accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1, "matthews_correlation": _matthews}  # type: ignore[dict-item]
NUMBER_METRICS: Mapping[str, Metric] = {"pearson": _pearson, "spearmanr": _spearman}  # type: ignore[dict-item]

# ----------------------------------------


def classes_of(given: Sequence[int | None], wanted: Sequence[int], n_labels: int) -> Ints:
    """The classes that the metrics compare. An answer that names no label is wrong.

    Of two labels it counts as the one that is not wanted, so that F1 and Matthews stay defined; of more it is -1, a class of its own.
    """
    return np.array([(1 - right if n_labels == 2 else -1) if one is None else one for one, right in zip(given, wanted, strict=True)], dtype=np.int64)


def text_metrics(names: Sequence[str], given: Sequence[float] | Ints, wanted: Sequence[float] | Ints) -> dict[str, float | None]:
    """Each metric of a corpus as a fraction; None where a correlation is undefined, because a side is constant.

    given, wanted: numbers of classes for `CLASS_METRICS`, numbers for `NUMBER_METRICS`. Raises ConfigError for an unknown name.
    """
    x, y = np.asarray(given), np.asarray(wanted)
    return {name: _plain(name, x, y) for name in names}


def _plain(name: str, x: NDArray[np.generic], y: NDArray[np.generic]) -> float | None:
    if name in CLASS_METRICS:
        return float(CLASS_METRICS[name](np.ones((1, len(x))), x, y)[0])
    if name not in NUMBER_METRICS:
        raise ConfigError(f"there is no metric {name!r} for texts: give some of {', '.join((*CLASS_METRICS, *NUMBER_METRICS))}")
    sides = [np.asarray(side, dtype=np.float64) for side in (x, y)]
    if any((side == side[0]).all() for side in sides):
        return None
    if name == "spearmanr":
        sides = [_weighted_ranks(np.ones((1, len(side))), side)[0] for side in sides]
    # As scipy has it: from the mean, and by the length, with no second mean, which would differ where values are hardly different.
    centred = [side - side.mean() for side in sides]
    one, other = (side / (np.abs(side).max() * np.linalg.norm(side / np.abs(side).max())) for side in centred)
    return float(np.clip(one @ other, -1.0, 1.0))


def resampled_metrics(names: Sequence[str], given: Sequence[float] | Ints, wanted: Sequence[float] | Ints) -> Metrics:
    """The same metrics of resampled items, in percent; NaN where one is undefined in a draw."""
    x, y = np.asarray(given), np.asarray(wanted)
    known = {**CLASS_METRICS, **NUMBER_METRICS}

    def of(weights: Floats) -> Floats:
        return 100 * np.stack([known[name](weights, x, y) for name in names], axis=1)

    return Metrics(names=tuple(names), items=len(x), of=of)
