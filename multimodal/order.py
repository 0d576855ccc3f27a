"""The order in which samples are read: a function of (seed, epoch, position) alone."""

from __future__ import annotations

import torch

__all__ = ["SampleOrder"]


class SampleOrder:
    """Endless shuffled epochs. Position p is sample `order(p // n)[p % n]`: no worker, rank or restart changes it.

    Epochs follow each other without a gap, so every rank does the same number of steps and no sample is dropped at an epoch's end.
    """

    def __init__(self, n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def sample(self, position: int) -> int:
        """The index of the sample at a position of the stream."""
        epoch = position // self.n_samples
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n_samples, generator=generator)
        return int(self._order[position % self.n_samples])
