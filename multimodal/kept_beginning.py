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

    which   int64 [B], the beginning of each row
    each    how many rows in a row have the same beginning; None where pictures have several numbers of texts
    """

    def __init__(self, read: Read, which: Tensor, each: int | None) -> None:
        super().__init__()
        self.read, self.which, self.each = read, which, each

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, [B, H, T, D] each: the row's beginning, then these."""
        assert self.read.keys is not None
        assert self.read.values is not None
        return self._joined(self.read.keys, key_states), self._joined(self.read.values, value_states)

    def get_seq_length(self) -> int:
        """Tokens of the beginning."""
        return self.read.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys attention reads, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def _joined(self, beginning: Tensor, own: Tensor) -> Tensor:
        """[I, H, P, D] and [B, H, T, D] -> [B, H, P + T, D]. Equal numbers need one copy, and a plain sum for the gradient, not two and an index."""
        if self.each is None:
            return torch.cat([beginning[self.which], own], -2)
        spread = beginning[:, None].expand(-1, self.each, -1, -1, -1)
        return torch.cat([spread, own.unflatten(0, (-1, self.each))], -2).flatten(0, 1)


def caches(n_layers: int, which: Tensor, each: int | None) -> tuple[Cache, Cache]:
    """The cache that beginnings are read into, and the one that is given with what comes after them.

    Neither drops what a window does not reach: masks are made for all keys, by the model or by us.
    """
    read = [Read() for _ in range(n_layers)]
    return Cache(layers=list(read)), Cache(layers=[After(layer, which, each) for layer in read])
