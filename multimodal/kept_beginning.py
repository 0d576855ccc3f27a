"""The keys and values of beginnings, as a cache that texts are read after: gradients flow through it, and reading it again changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["caches"]


class Read(DynamicLayer):  # a layer of transformers' Cache, which asks for its class
    """A layer's keys and values of the beginnings, kept as they are first made: checkpointing makes them again in the backward pass."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, [I, H, T, D] each: these keys and values."""
        if self.get_seq_length() == 0:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class After(DynamicLayer):
    """The keys and values that a text comes after; those of the text are not kept, so that a layer may be run twice.

    which: int64 [B], the beginning of each row; None where row i has beginning i.
    """

    def __init__(self, read: Read, which: Tensor | None) -> None:
        super().__init__()
        self.read, self.which = read, which

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, [B, H, T, D] each: the row's beginning, then these."""
        assert self.read.keys is not None
        assert self.read.values is not None
        keys, values = (one if self.which is None else one[self.which] for one in (self.read.keys, self.read.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        """Tokens of the beginning."""
        return self.read.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys attention reads, and the place of the first."""
        return self.get_seq_length() + query_length, 0


def caches(n_layers: int, which: Tensor | None) -> tuple[Cache, Cache]:
    """The cache that beginnings are read into, and the one that is given with what comes after them.

    Neither drops what a window does not reach: masks are made for all keys, by the model or by us.
    """
    read = [Read() for _ in range(n_layers)]
    return Cache(layers=list(read)), Cache(layers=[After(layer, which) for layer in read])
