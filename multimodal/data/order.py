"""The order in which samples are read: a function of (seed, epoch, position) alone."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.data.shards.order import ShardOrder, drawn_seed, epoch_permutation, permutation
from multimodal.sample import DamagedSample, Lengths, Measure, Sample, SampleSource, lengths_digest, lengths_of

__all__ = [
    "BucketedOrder", "MixedOrder", "MixedSet", "Mixture", "Order", "OrderChoice", "Reading", "SampleOrder", "fingerprint_of",
    "innermost", "order_note", "order_of", "reading_plan", "set_sizes", "sets_of", "shard_sizes_of", "texts_fingerprint_of", "windows_of",
]  # fmt: skip


class Order(Protocol):
    """Which sample stands at each position of an endless stream."""

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        ...

    def state(self) -> dict[str, object]:
        """What the order is a function of, as JSON: two orders that share it are the same."""
        ...


class SampleOrder:
    """Endless shuffled epochs. Position p is sample `order(p // n)[p % n]`: no worker, rank or restart changes it.

    Epochs follow each other without a gap, so every rank does the same number of steps and no sample is dropped at an epoch's end.
    """

    def __init__(self, n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._epochs = _Shuffled(seed)

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        return int(self._epochs.order(position // self.n_samples, self.n_samples)[position % self.n_samples])

    def state(self) -> dict[str, object]:
        """Seed and number of samples."""
        return {"seed": self.seed, "samples": [self.n_samples], "weights": [1]}


class MixedOrder:
    """Several sets in one stream, each in endless shuffled epochs of its own; indices count through the sets one after the other.

    Weights are exact: of every sum(weights) positions in a row, counted from the first, set k has weights[k], in an order that is drawn
    anew for each such block. Sizes 2 and 100 with weights 1 and 3: of each 4 positions one is of the first set, which comes round every 8.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], seed: int, own: Sequence[SampleOrder | ShardOrder] = ()) -> None:
        """own: each set's own order; without, all samples of a set are shuffled."""
        if len(sizes) != len(weights) or not sizes or min(*sizes, *weights) < 1:
            raise ConfigError(f"sets of {list(sizes)} samples cannot be mixed by the weights {list(weights)}: give each set a whole number from 1")
        self.sizes, self.seed = tuple(sizes), seed
        shared = math.gcd(*weights)
        self.weights = tuple(weight // shared for weight in weights)
        self._starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self._pattern = np.repeat(np.arange(len(self.weights)), self.weights)
        self._blocks = _Shuffled(seed)
        self._block, self._sets, self._before = -1, self._pattern, self._pattern
        # Another seed for each set: sets of one size would else be read in step.
        self.own = tuple(own) or tuple(SampleOrder(size, seed + 1 + k) for k, size in enumerate(self.sizes))

    def sample(self, position: int) -> int:
        """The index, in the sets one after the other, of the sample at a position of the stream."""
        block, place = divmod(position, len(self._pattern))
        if block != self._block:
            self._block, self._sets = block, self._pattern[self._blocks.order(block, len(self._pattern))]
            self._before = np.empty_like(self._sets)
            for chosen, weight in enumerate(self.weights):
                self._before[self._sets == chosen] = np.arange(weight)
        chosen = int(self._sets[place])
        return self._starts[chosen] + self.own[chosen].sample(block * self.weights[chosen] + int(self._before[place]))

    def state(self) -> dict[str, object]:
        """Seed, sizes, and weights in lowest terms."""
        state: dict[str, object] = {"seed": self.seed, "samples": list(self.sizes), "weights": list(self.weights)}
        in_rows = [one if isinstance(one, ShardOrder) else None for one in self.own]
        if any(in_rows):
            state["window"] = [one.window_shards if one else 0 for one in in_rows]
            state["shards"] = [one.digest if one else "" for one in in_rows]
        return state


class _Shuffled:
    """A permutation for each epoch; the last one asked for is cached."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def order(self, epoch: int, size: int) -> NDArray[np.int64]:
        """int64 [size]"""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_permutation(size, self.seed, epoch)
        return self._order


# ----------------------------------------
# An order in which samples of like length share a batch, so that little of it is padding; as exact and as resumable as the one it is made of.


class BucketedOrder:
    """Another order, rearranged within pools: `pool` batches in a row are sorted by length, cut into batches again, and the batches shuffled.

    Batches are those of all ranks together: of `batch` positions, counted from the stream's first. Pools are counted from each epoch's first
    position (an epoch has as many as there are samples) and end with it, so that every epoch of one set has each sample once; what it has
    before its first whole batch or after its last is moved with the batches, and keeps its size. Of several sets each pool holds what it held
    before: their shares are exact at the end of every pool, and no sample is ahead of another of its set by more than one reading there.

    Everything is a function of the order, lengths, seed, pool and batch. A resumed stream keeps the batch that it was sorted for, though
    its steps may now be of another size: they then hold samples of several batches, and more padding. A pool that holds
    a whole epoch makes nearly the same batches in each.

    lengths   int64 [samples]: only their order matters
    """

    def __init__(self, order: Order, lengths: Lengths, *, seed: int, pool: int, batch: int) -> None:
        self.order, self.lengths, self.seed, self.pool, self.batch = order, lengths, seed, pool, batch
        self._digest = lengths_digest(lengths)[:16]
        self._first = self._end = -1
        self._samples: list[int] = []

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        if not self._first <= position < self._end:
            self._first, self._end = self.bounds(position)
            self._samples = self._rearranged(self._first, self._end).tolist()
        return self._samples[position - self._first]

    def state(self) -> dict[str, object]:
        """The other order's; images in a pool's batch, batches in a pool, and a check sum of the lengths."""
        return {**self.order.state(), "bucket_pool": self.pool, "bucket_batch": self.batch, "lengths": self._digest}

    def bounds(self, position: int) -> tuple[int, int]:
        """The first position of the pool that a position is in, and the first after it."""
        size, n = len(self.lengths), self.pool * self.batch
        start = position - position % size
        whole = start + -start % self.batch  # where the epoch's first whole batch begins; what is before it goes with its first pool
        number = max(0, position - whole) // n
        return whole + number * n if number else start, min(whole + (number + 1) * n, start + size)

    def _rearranged(self, first: int, end: int) -> NDArray[np.int64]:
        """int64 [end - first]: the samples of a pool."""
        samples = np.fromiter(map(self.order.sample, range(first, end)), dtype=np.int64, count=end - first)
        samples = samples[np.argsort(self.lengths[samples], kind="stable")]  # those of one length stay in an order that each epoch draws anew
        borders = np.array([first, *range(first - first % self.batch + self.batch, end, self.batch), end])
        sizes = np.diff(borders)
        places = permutation(len(sizes), drawn_seed(self.seed, first))  # of the batches, those of short texts first
        rearranged = np.empty_like(samples)
        taken = 0
        for place in places:
            rearranged[borders[place] - first : borders[place + 1] - first] = samples[taken : taken + sizes[place]]
            taken += sizes[place]
        return rearranged


# ----------------------------------------
# Which shards a stream reads when: what is fetched ahead of it, and what it needs no more.


@dataclass(frozen=True)
class Reading:
    """How a process reads one set of a stream: `shards_of(w)` for each w of `windows(position)`, then the windows that follow.

    whole    the stream's order
    number   of the set, from 0
    order    the set's own
    parts    those that this process reads
    """

    whole: Order
    number: int
    order: ShardOrder
    parts: range

    def windows(self, position: int) -> range:
        """The set's windows from which a step at this position of the stream may read: what comes before them is needed no more.

        One window, or several at the border between two of a mixture's blocks or a pool of batches.
        """
        first, end = _own_positions(self.whole, self.number, position)
        return range(self.order.window(first), self.order.window(end - 1) + 1)

    def shards_of(self, window: int) -> NDArray[np.int64]:
        """int64 [shards]: the numbers of the shards that this process reads in a window."""
        return self.order.shards_of(window, self.parts)


def reading_plan(order: Order, rank: int = 0, world: int = 1, batch_size: int = 1) -> tuple[Reading | None, ...]:
    """For each set of a stream how a rank reads its shards; None where all samples of a set are shuffled, so that nothing is known ahead.

    batch_size   images of a step of each of the `world` ranks
    """
    inner = order.order if isinstance(order, BucketedOrder) else order
    own = inner.own if isinstance(inner, MixedOrder) else (inner,)
    return tuple(
        Reading(order, number, one, one.parts_of(rank, world, batch_size)) if isinstance(one, ShardOrder) else None
        for number, one in enumerate(own)
    )


def _own_positions(order: Order, number: int, position: int) -> tuple[int, int]:
    """The first and the end of a set's own positions that may be read at a position of the stream."""
    if isinstance(order, BucketedOrder):
        first, end = order.bounds(position)
        return _own_positions(order.order, number, first)[0], _own_positions(order.order, number, end - 1)[1]
    if isinstance(order, MixedOrder):
        block = position // sum(order.weights)
        return block * order.weights[number], (block + 1) * order.weights[number]
    return position, position + 1


# ----------------------------------------
# Several data sets read as one, by weight.


@dataclass(frozen=True)
class MixedSet:
    """A data set and its share.

    weight   of every sum(weights) images in a row so many are of this set; a set that comes round before the others repeats
    """

    source: SampleSource
    weight: int

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise ConfigError(f"the weight of a data set is {self.weight}: give a whole number from 1, its images in each round")


class Mixture:
    """The samples of several sets, one set after the other; `order_of` says how a training stream mixes them.

    A sample's key is NAME:KEY, because two sets may use one key. An epoch is as many images as all sets hold together.
    """

    def __init__(self, sets: Mapping[str, MixedSet]) -> None:
        if not sets:
            raise ConfigError("there are no data sets to mix: give one or more, each with a weight")
        self.names = tuple(sets)
        self.sources = tuple(each.source for each in sets.values())
        self._ends = list(accumulate(len(source) for source in self.sources))
        self.sizes = tuple(len(source) for source in self.sources)
        self.weights = tuple(each.weight for each in sets.values())
        known = [fingerprint_of(source) for source in self.sources]
        self.fingerprint = _joined(known) if all(known) else ""

    @property
    def texts_fingerprint(self) -> str:
        """Of the sets'."""
        return _joined(texts_fingerprint_of(source) for source in self.sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Raises what the set that holds the sample raises."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        number = bisect_right(self._ends, index)
        try:
            sample = self.sources[number][index - self._ends[number] + self.sizes[number]]
        except DamagedSample as error:
            raise DamagedSample(replace(error.bad, key=f"{self.names[number]}:{error.bad.key}")) from error
        return replace(sample, key=f"{self.names[number]}:{sample.key}")

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.sample.TextLengths`; sets whose lengths differ, or are measured in other units, mostly come in batches of their own."""
        return np.concatenate([np.asarray(lengths_of(source, measure)) for source in self.sources])


@runtime_checkable
class Fingerprinted(Protocol):
    """A data set that can say whether it holds what it held before."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal content."""
        ...


@runtime_checkable
class TextsFingerprinted(Protocol):
    """A data set without a fingerprint of its images that can say whether its keys and texts are what they were."""

    @property
    def texts_fingerprint(self) -> str:
        """Equal for equal keys, ids and texts in one order."""
        ...


def fingerprint_of(source: SampleSource) -> str:
    """A data set's fingerprint; empty where it has none, as files on disk."""
    return source.fingerprint if isinstance(source, Fingerprinted) else ""


def set_sizes(source: SampleSource) -> dict[str, int]:
    """Name -> number of samples of each set of a mixture, in the order of its indices; of any other data set one entry without a name."""
    return dict(zip(source.names, source.sizes, strict=True)) if isinstance(source, Mixture) else {"": len(source)}


def texts_fingerprint_of(source: SampleSource) -> str:
    """What a run that goes on compares: of keys and texts where the set can say that, else its fingerprint; empty where it has none."""
    return source.texts_fingerprint if isinstance(source, TextsFingerprinted) else fingerprint_of(source)


def _joined(fingerprints: Iterable[str]) -> str:
    return hashlib.sha256(repr(list(fingerprints)).encode()).hexdigest()


# ----------------------------------------
# Which order a data set is read in.


OrderChoice = Literal["auto", "global", "shards"]


def shard_sizes_of(source: SampleSource) -> NDArray[np.int64] | None:
    """int64 [shards]: samples of each shard of a data set, in the order of its indices; None where it is not made of shards."""
    sizes: NDArray[np.int64] | None = getattr(source, "shard_sizes", None)
    return sizes


def windows_of(source: SampleSource, choice: OrderChoice, window: int) -> tuple[int, ...]:
    """For each set of a data set the shards that are shuffled together; 0: all its samples are.

    choice   auto: `shards` where shards are read from a server and its cache, if it has one, holds a window; else `global`; of a mixture, each set
             for itself

    Raises ConfigError where there are no shards to read in a row.
    """
    in_shards = [one if shard_sizes_of(one) is not None else None for one in sets_of(source)]
    if choice == "shards" and not any(in_shards):
        raise ConfigError("train.order is shards, and the data is not in shards: write it with `adalink shards from`, or set train.order to global")
    return tuple(window if one is not None and (choice == "shards" or (choice == "auto" and _reads_in_a_row(one, window))) else 0 for one in in_shards)


def order_of(source: SampleSource, seed: int, windows: Sequence[int] = (), *, parts: int = 1, step: int = 1) -> Order:
    """The order in which a training stream reads a data set. windows: as `windows_of`; none: all samples of each set are shuffled.

    parts, step   as in `ShardOrder`, of a set alone: a mixture's positions are not those of its sets, so each rank reads all of a window
    """
    sets = sets_of(source)
    windows = windows or (0,) * len(sets)
    # Another seed for each set: sets of one size would else be read in step.
    seeds = [seed + 1 + k for k in range(len(sets))] if isinstance(source, Mixture) else [seed]
    own: list[SampleOrder | ShardOrder] = []
    for one, window, each in zip(sets, windows, seeds, strict=True):
        sizes = shard_sizes_of(one) if window else None
        cut = {} if isinstance(source, Mixture) else {"parts": parts, "step": step}
        own.append(SampleOrder(len(one), each) if sizes is None else ShardOrder(sizes, window, each, **cut))
    return MixedOrder(source.sizes, source.weights, seed, own) if isinstance(source, Mixture) else own[0]


def order_note(order: Order) -> str:
    """A line for a log: which sets are read by windows of shards."""
    windows = [0 if reading is None else reading.order.window_shards for reading in reading_plan(order)]
    if not any(windows):
        return "order: global, all samples are shuffled together"
    each = str(windows[0]) if len(windows) == 1 else f"{windows} of the sets (0: all)"
    parts = next((one.order.parts for one in reading_plan(order) if one is not None), 1)
    return f"order: shards in a drawn order, the samples of {each} shuffled together" + (f", in each of {parts} parts of a step" if parts > 1 else "")


def sets_of(source: SampleSource) -> Sequence[SampleSource]:
    """The sets of a mixture; of any other data set itself."""
    return source.sources if isinstance(source, Mixture) else (source,)


def innermost(source: SampleSource) -> SampleSource:
    """The data set that others are made of by choosing some of its samples or decoding them otherwise."""
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    return source


def _reads_in_a_row(source: SampleSource, window: int) -> bool:
    """Whether the shards are on a server, and a window of the largest fits into their cache."""
    inner: Any = innermost(source)
    if not isinstance(next(iter(getattr(inner, "places", ())), None), str):
        return False
    return inner.cache_bytes is None or int(np.sort(inner.shard_bytes)[-window:].sum()) <= inner.cache_bytes
