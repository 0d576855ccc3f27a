"""Several data sets read as one, by weight."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.lengths import Measure, lengths_of
from multimodal.order import MixedOrder, Order, SampleOrder
from multimodal.sample import Sample, SampleSource
from multimodal.shards import DamagedSample

__all__ = ["MixedSet", "Mixture", "fingerprint_of", "order_of", "set_sizes", "texts_fingerprint_of"]


@dataclass(frozen=True)
class MixedSet:
    """A data set and its share.

    weight   of every sum(weights) pictures in a row so many are of this set; a set that comes round before the others repeats
    """

    source: SampleSource
    weight: int

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise ConfigError(f"the weight of a data set is {self.weight}: give a whole number from 1, its pictures in each round")


class Mixture:
    """The samples of several sets, one set after the other; `order_of` says how a training stream mixes them.

    A sample's key is NAME:KEY, because two sets may use one key. An epoch is as many pictures as all sets hold together.
    """

    def __init__(self, sets: Mapping[str, MixedSet]) -> None:
        if not sets:
            raise ConfigError("there are no data sets to mix: give one or more, each with a weight")
        self.names = tuple(sets)
        self._sources = tuple(each.source for each in sets.values())
        self._ends = list(accumulate(len(source) for source in self._sources))
        self.sizes = tuple(len(source) for source in self._sources)
        self.weights = tuple(each.weight for each in sets.values())
        self.fingerprint = _joined(fingerprint_of(source) for source in self._sources)

    @property
    def texts_fingerprint(self) -> str:
        """Of the sets'."""
        return _joined(texts_fingerprint_of(source) for source in self._sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Raises what the set that holds the sample raises."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        number = bisect_right(self._ends, index)
        try:
            sample = self._sources[number][index - self._ends[number] + self.sizes[number]]
        except DamagedSample as error:
            raise DamagedSample(replace(error.bad, key=f"{self.names[number]}:{error.bad.key}")) from error
        return replace(sample, key=f"{self.names[number]}:{sample.key}")

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.lengths.TextLengths`; sets whose lengths differ, or are told in other units, mostly come in batches of their own."""
        return np.concatenate([lengths_of(source, measure) for source in self._sources])


@runtime_checkable
class Fingerprinted(Protocol):
    """A data set that can say whether it holds what it held before."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal content."""
        ...


@runtime_checkable
class TextsFingerprinted(Protocol):
    """A data set without a fingerprint of its pictures that can say whether its keys and texts are what they were."""

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


def order_of(source: SampleSource, seed: int) -> Order:
    """The order in which a training stream reads a data set."""
    return MixedOrder(source.sizes, source.weights, seed) if isinstance(source, Mixture) else SampleOrder(len(source), seed)
