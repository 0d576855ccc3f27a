"""An order in which samples of like length share a batch, so that little of it is padding; as exact and as resumable as the one it is made of."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from multimodal.order import Order

__all__ = ["BucketedOrder"]


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
            self._first, self._end = self._bounds(position)
            self._samples = self._rearranged(self._first, self._end).tolist()
        return self._samples[position - self._first]

    def state(self) -> dict[str, object]:
        """The other order's; pictures in a pool's batch, batches in a pool, and a check sum of the lengths."""
        return {**self.order.state(), "bucket_pool": self.pool, "bucket_batch": self.batch, "lengths": self._digest}

    def with_batch(self, batch: int) -> BucketedOrder:
        """The same, sorted for batches of another size."""
        return BucketedOrder(self.order, self.lengths, seed=self.seed, pool=self.pool, batch=batch)

    def _bounds(self, position: int) -> tuple[int, int]:
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
        key = hashlib.sha256(f"{self.seed} {first}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
        places = torch.randperm(len(sizes), generator=generator).numpy()  # of the batches, those of short texts first
        rearranged = np.empty_like(samples)
        taken = 0
        for place in places:
            rearranged[borders[place] - first : borders[place + 1] - first] = samples[taken : taken + sizes[place]]
            taken += sizes[place]
        return rearranged
