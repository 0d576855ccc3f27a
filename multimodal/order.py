"""The order in which samples are read: a function of (seed, epoch, position) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from adalink.errors import ConfigError

__all__ = ["MixedOrder", "Order", "SampleOrder"]

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

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], seed: int) -> None:
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
        self._own = [SampleOrder(size, seed + 1 + k) for k, size in enumerate(self.sizes)]

    def sample(self, position: int) -> int:
        """The index, in the sets one after the other, of the sample at a position of the stream."""
        block, place = divmod(position, len(self._pattern))
        if block != self._block:
            self._block, self._sets = block, self._pattern[self._blocks.order(block, len(self._pattern))]
            self._before = np.empty_like(self._sets)
            for chosen, weight in enumerate(self.weights):
                self._before[self._sets == chosen] = np.arange(weight)
        chosen = int(self._sets[place])
        return self._starts[chosen] + self._own[chosen].sample(block * self.weights[chosen] + int(self._before[place]))

    def state(self) -> dict[str, object]:
        """Seed, sizes, and weights in lowest terms."""
        return {"seed": self.seed, "samples": list(self.sizes), "weights": list(self.weights)}


class _Shuffled:
    """A permutation for each epoch; the last one asked for is kept."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def order(self, epoch: int, size: int) -> NDArray[np.int64]:
        """int64 [size]"""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * _SEEDS + epoch)
            self._epoch, self._order = epoch, torch.randperm(size, generator=generator).numpy()  # a tensor's single elements are slow
        return self._order
