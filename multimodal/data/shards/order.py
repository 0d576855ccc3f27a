"""An order in which shards are read in a row: a function of (seed, position) and of how many samples each shard has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError

__all__ = ["ShardOrder", "drawn_seed", "epoch_permutation", "permutation"]


class ShardOrder:
    """Endless epochs: shards in a drawn order, `window` of them at a time for each part of a step, and their samples shuffled together.

    A step's positions are cut in `parts` of one size, the first for the first ranks and so on, and a window's samples, as they lie in its
    shards, too: so the ranks of one machine read shards of their own, and a batch has samples of all. Where two parts share a shard, both
    read it. Which sample stands at a position depends on nothing but the arguments: another number of ranks reads the same stream, only
    that a machine then reads several parts.

    Windows are counted from the first epoch's first and never begin anew, so that a reader that fetches ahead needs no epochs. An epoch's
    shards are dealt to its windows as evenly as whole shards allow.

    sizes   int64 [shards]: samples in each; indices count through the shards one after the other
    step    positions of a step of all ranks, counted from the stream's first; where there is one part it does not matter
    """

    def __init__(self, sizes: NDArray[np.int64], window: int, seed: int, *, parts: int = 1, step: int = 1) -> None:
        if window < 1 or not len(sizes) or sizes.min() < 0 or not sizes.sum():
            raise ConfigError(f"{len(sizes)} shards cannot be read {window} at a time: give a window of 1 shard or more, and shards that hold samples")
        if not 1 <= parts <= step:
            raise ConfigError(f"a step of {step} images cannot be read in {parts} parts: give from 1 part to {step}")
        self.n_samples, self.window_shards, self.seed, self.parts, self.step = int(sizes.sum()), window, seed, parts, step
        self.n_windows = -(-len(sizes) // (window * parts))
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self._borders = np.arange(self.n_windows + 1) * len(sizes) // self.n_windows  # shards of window w: from [w] to [w + 1]
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._window = self._first = self._end = -1
        self._parts: dict[int, NDArray[np.int64]] = {}  # of the window that was read last, the parts that were

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        if not self._first <= position < self._end:
            self._window, self._parts = self.window(position), {}
            self._first, self._end = self._bounds(self._window)
        part = position % self.step * self.parts // self.step
        samples = self._parts.get(part)
        if samples is None:
            samples = self._parts[part] = self.samples_of(self._window, part)
        return int(samples[self._place(part, position) - self._place(part, self._first)])

    def window(self, position: int) -> int:
        """The number of the window that a position is in."""
        epoch, place = divmod(position, self.n_samples)
        return epoch * self.n_windows + int(np.searchsorted(self._epoch(epoch)[1], place, side="right"))

    def first_position(self, window: int) -> int:
        """The first position of a window."""
        return self._bounds(window)[0]

    def shards_of(self, window: int, parts: Sequence[int] | None = None) -> NDArray[np.int64]:
        """int64 [shards]: the numbers of a window's shards, as they come; of some of its parts alone where they are given."""
        shards = self._shards(window)
        return shards if parts is None else shards[np.any([self._cut(window, part)[1] > 0 for part in parts], axis=0)]

    def samples_of(self, window: int, part: int = 0) -> NDArray[np.int64]:
        """int64 [samples]: those of one part of a window, in the order of its positions."""
        before, sizes = self._cut(window, part)
        read = sizes > 0
        starts, sizes = (self._starts[self._shards(window)] + before)[read], sizes[read]
        samples = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        return samples[permutation(len(samples), drawn_seed(self.seed, f"window {window} part {part}"))]

    def parts_of(self, rank: int, world: int, batch_size: int) -> range:
        """The parts that one of `world` ranks reads, and perhaps others between them.

        Of steps of the size that the order was made for, its machine's; of steps of another size those that its positions come to.
        """
        apart = math.gcd(self.step, world * batch_size)  # positions of a rank come again in each step so far from each other
        places = np.unique(np.arange(rank * batch_size, (rank + 1) * batch_size) % apart)
        every = places[:, None] + np.arange(0, self.step, apart)
        parts = np.unique(every * self.parts // self.step)
        spaces = set(np.diff(parts).tolist())
        return range(int(parts[0]), int(parts[-1]) + 1, spaces.pop() if len(spaces) == 1 else 1)

    def state(self) -> dict[str, object]:
        """What the order is a function of, as JSON; of the shards' sizes a check sum."""
        state: dict[str, object] = {"seed": self.seed, "samples": [self.n_samples], "weights": [1], "window": [self.window_shards], "shards": [self.digest]}
        return state if self.parts == 1 else {**state, "shard_parts": self.parts, "shard_step": self.step}

    @property
    def digest(self) -> str:
        """A check sum of the shards' sizes."""
        return hashlib.sha256(self._sizes.astype("<i8").tobytes()).hexdigest()[:16]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shards, int64 [shards], and the position in it after each window's last, int64 [windows]; the last two epochs' are cached."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = epoch_permutation(len(self._sizes), self.seed, epoch)
            found = shards, np.cumsum(np.add.reduceat(np.take(self._sizes, shards), self._borders[:-1]))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}  # a new one, since threads may read the one before
        return found

    def _bounds(self, window: int) -> tuple[int, int]:
        """The first position of a window, and the first after it."""
        epoch, place = divmod(window, self.n_windows)
        ends = self._epoch(epoch)[1]
        return epoch * self.n_samples + (int(ends[place - 1]) if place else 0), epoch * self.n_samples + int(ends[place])

    def _shards(self, window: int) -> NDArray[np.int64]:
        epoch, place = divmod(window, self.n_windows)
        return self._epoch(epoch)[0][self._borders[place] : self._borders[place + 1]]

    def _below(self, part: int, position: int) -> int:
        """Positions before this one that belong to the parts before this one."""
        steps, place = divmod(position, self.step)
        each = -(-part * self.step // self.parts)  # of each step
        return steps * each + min(place, each)

    def _place(self, part: int, position: int) -> int:
        """Positions of one part before this one."""
        return self._below(part + 1, position) - self._below(part, position)

    def _cut(self, window: int, part: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each shard of a window, int64 [shards]: samples of it before this part, and in it; 0 or less where it is not in it."""
        bounds = self._bounds(window)
        first, end = (self._below(each, bounds[1]) - self._below(each, bounds[0]) for each in (part, part + 1))
        sizes = self._sizes[self._shards(window)]
        ends = np.cumsum(sizes)
        before: NDArray[np.int64] = np.maximum(first - ends + sizes, 0)
        return before, np.minimum(ends, end) - np.maximum(ends - sizes, first)


# ----------------------------------------
# Draws that every process makes for itself, and alike.


_SEEDS = 1_000_003  # epochs of one seed; a prime, so that (seed, epoch) pairs do not meet


def epoch_permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """int64 [size]: another one in each epoch."""
    return permutation(size, seed * _SEEDS + epoch)


def drawn_seed(seed: int, what: object) -> int:
    """A generator's seed, below 2**56: a function of both."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7])


def permutation(size: int, seed: int) -> NDArray[np.int64]:
    """int64 [size]"""
    import torch  # late: help needs the classes here and no number

    order: NDArray[np.int64] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()  # a tensor's single elements are slow
    return order
