"""The order in which samples are read: a function of (seed, epoch, position) alone."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.sample import DamagedSample, Measure, Sample, SampleSource, lengths_of

__all__ = [
    "BucketedOrder", "MixedOrder", "MixedSet", "Mixture", "Order", "Reading", "SampleOrder", "ShardOrder", "fingerprint_of", "order_of",
    "reading_plan", "set_sizes", "shard_sizes_of", "texts_fingerprint_of",
]  # fmt: skip


_SEEDS = 1_000_003  # epochs of one seed; a prime, so that (seed, epoch) pairs do not meet


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
        return {"seed": self.seed, "samples": list(self.sizes), "weights": list(self.weights)}


class ShardOrder:
    """Endless epochs that read shards in a row: shards in a drawn order, `window` of them at a time, their samples shuffled together.

    An epoch's shards are dealt to its windows as evenly as whole shards allow, none with more than `window`. Windows are counted from the
    first epoch's first and never begin anew, so that a reader that fetches ahead needs no epochs. Which sample stands at a position is a
    function of the shards' sizes, seed, window and position alone. A new position takes a search in an epoch's windows; an epoch's shards are
    drawn once, and a window's samples too.

    sizes   int64 [shards]: samples in each; indices count through the shards one after the other
    """

    def __init__(self, sizes: NDArray[np.int64], window: int, seed: int) -> None:
        if window < 1 or not len(sizes) or sizes.min() < 0 or not sizes.sum():
            raise ConfigError(f"{len(sizes)} shards cannot be read {window} at a time: give a window of 1 shard or more, and shards that hold samples")
        self.n_samples, self.n_windows, self.window_shards, self.seed = int(sizes.sum()), -(-len(sizes) // window), window, seed
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self._borders = np.arange(self.n_windows + 1) * len(sizes) // self.n_windows  # shards of window w: from [w] to [w + 1]
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._first = self._end = -1
        self._samples = np.empty(0, dtype=np.int64)

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        if not self._first <= position < self._end:
            number = self.window(position)
            self._samples = self._shuffled(number)
            epoch, place = divmod(number, self.n_windows)
            self._end = epoch * self.n_samples + int(self._epoch(epoch)[1][place])
            self._first = self._end - len(self._samples)
        return int(self._samples[position - self._first])

    def window(self, position: int) -> int:
        """The number of the window that a position is in."""
        epoch, place = divmod(position, self.n_samples)
        return epoch * self.n_windows + int(np.searchsorted(self._epoch(epoch)[1], place, side="right"))

    def shards_of(self, window: int) -> NDArray[np.int64]:
        """int64 [shards]: the numbers of a window's shards."""
        epoch, place = divmod(window, self.n_windows)
        return self._epoch(epoch)[0][self._borders[place] : self._borders[place + 1]]

    def state(self) -> dict[str, object]:
        """Seed, number of samples, the window, and a check sum of the shards' sizes."""
        digest = hashlib.sha256(self._sizes.astype("<i8").tobytes()).hexdigest()[:16]
        shared: dict[str, object] = {"seed": self.seed, "samples": [self.n_samples], "weights": [1]}
        return {**shared, "order": ["shards"], "window": [self.window_shards], "shards": [digest]}

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shards, int64 [shards], and the position in it after each window's last, int64 [windows]; the last two epochs' are cached."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = _permutation(len(self._sizes), self.seed * _SEEDS + epoch)
            found = shards, np.cumsum(np.add.reduceat(self._sizes[shards], self._borders[:-1]))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}  # a new one, since threads may read the one before
        return found

    def _shuffled(self, window: int) -> NDArray[np.int64]:
        """int64 [samples]: those of a window."""
        shards = self.shards_of(window)
        sizes = self._sizes[shards]
        samples = np.repeat(self._starts[shards] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        return samples[_permutation(len(samples), _drawn(self.seed, f"window {window}"))]


class _Shuffled:
    """A permutation for each epoch; the last one asked for is cached."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def order(self, epoch: int, size: int) -> NDArray[np.int64]:
        """int64 [size]"""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _permutation(size, self.seed * _SEEDS + epoch)
        return self._order


def _drawn(seed: int, what: object) -> int:
    """A generator's seed, below 2**56: a function of both."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7])


def _permutation(size: int, seed: int) -> NDArray[np.int64]:
    """int64 [size]"""
    import torch  # late: help needs the classes here and no number

    order: NDArray[np.int64] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()  # a tensor's single elements are slow
    return order


# ----------------------------------------
# An order in which samples of like length share a batch, so that little of it is padding; as exact and as resumable as the one it is made of.


class BucketedOrder:
    """Another order, rearranged within pools: `pool` batches in a row are sorted by length, cut into batches again, and the batches shuffled.

    Batches are those of all ranks together: of `batch` positions, counted from the stream's first. Pools are counted from each epoch's first
    position (an epoch has as many as there are samples) and end with it, so that every epoch of one set has each sample once; what it has
    before its first whole batch or after its last is moved with the batches, and keeps its size. Of several sets each pool holds what it held
    before: their shares are exact at the end of every pool, and no sample is ahead of another of its set by more than one reading there.

    Everything is a function of the order, lengths, seed, pool and batch. A resumed stream keeps the batch that it was sorted for
    (`with_batch`), though its steps may now be of another size: they then hold samples of several batches, and more padding. A pool that holds
    a whole epoch makes nearly the same batches in each.

    lengths   int64 [samples]: only their order matters
    """

    def __init__(self, order: Order, lengths: NDArray[np.int64], *, seed: int, pool: int, batch: int) -> None:
        self.order, self.lengths, self.seed, self.pool, self.batch = order, lengths, seed, pool, batch
        self._digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
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

    def with_batch(self, batch: int) -> BucketedOrder:
        """The same, sorted for batches of another size."""
        return BucketedOrder(self.order, self.lengths, seed=self.seed, pool=self.pool, batch=batch)

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
        places = _permutation(len(sizes), _drawn(self.seed, first))  # of the batches, those of short texts first
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
    """How one set of a stream is read: `order.shards_of(w)` for each w of `windows(position)`, then the windows that follow.

    whole    the stream's order
    number   of the set, from 0
    order    the set's own
    """

    whole: Order
    number: int
    order: ShardOrder

    def windows(self, position: int) -> range:
        """The set's windows from which a step at this position of the stream may read: what comes before them is needed no more.

        One window, or several at the border between two of a mixture's blocks or a pool of batches.
        """
        first, end = _own_positions(self.whole, self.number, position)
        return range(self.order.window(first), self.order.window(end - 1) + 1)


def reading_plan(order: Order) -> tuple[Reading | None, ...]:
    """For each set of a stream how its shards are read; None where all samples of a set are shuffled, so that nothing is known ahead."""
    inner = order.order if isinstance(order, BucketedOrder) else order
    own = inner.own if isinstance(inner, MixedOrder) else (inner,)
    return tuple(Reading(order, number, one) if isinstance(one, ShardOrder) else None for number, one in enumerate(own))


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
        return np.concatenate([lengths_of(source, measure) for source in self.sources])


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


def shard_sizes_of(source: SampleSource) -> NDArray[np.int64] | None:
    """int64 [shards]: samples of each shard of a data set, in the order of its indices; None where it is not made of shards."""
    sizes: NDArray[np.int64] | None = getattr(source, "shard_sizes", None)
    return sizes


def order_of(source: SampleSource, seed: int, window: int = 0) -> Order:
    """The order in which a training stream reads a data set. window: shards that are shuffled together, where there are any; 0: all samples are."""

    def own(one: SampleSource, seed: int) -> SampleOrder | ShardOrder:
        sizes = shard_sizes_of(one) if window else None
        return SampleOrder(len(one), seed) if sizes is None else ShardOrder(sizes, window, seed)

    if not isinstance(source, Mixture):
        return own(source, seed)
    # Another seed for each set: sets of one size would else be read in step.
    return MixedOrder(source.sizes, source.weights, seed, [own(one, seed + 1 + k) for k, one in enumerate(source.sources)])
