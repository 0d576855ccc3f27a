"""Prompts that were read before: one that begins like a known one is read from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adalink import TokenMap
from adalink.attach import Attachment
from multimodal.batch import Batch
from multimodal.language import Language
from multimodal.prefill import n_alike, read_rest, tokens_of

__all__ = ["KnownPrompt", "known_prompts", "left_padded", "read_on"]


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt about one picture under one adapter, of which no token becomes another by what follows.

    tokens   id and domain of each
    states   keys and values of each layer, [heads, T, Dh]
    """

    tokens: tuple[tuple[int, int], ...]
    states: tuple[tuple[Tensor, Tensor], ...]

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        return sum(value.nbytes for pair in self.states for value in pair)

    def n_alike(self, tokens: Sequence[tuple[int, int]]) -> int:
        """How many tokens of a prompt about the same picture need not be read again: the last is, since what follows it is asked for."""
        return min(n_alike([self.tokens, tokens]), len(tokens) - 1)


def known_prompts(cache: Any, batch: Batch, rows: Sequence[int]) -> list[KnownPrompt]:
    """Prompts of some rows of a batch, which was just read as the last rows of a cache. Copies: nothing else of the cache is kept in memory."""
    tokens, start = tokens_of(batch.ids, batch.domain), len(cache.layers[0].keys) - len(batch.ids)
    return [
        KnownPrompt(
            tuple(tokens[i]),
            tuple((layer.keys[start + i, :, -len(tokens[i]) :].clone(), layer.values[start + i, :, -len(tokens[i]) :].clone()) for layer in cache.layers),
        )
        for i in rows
    ]


def read_on(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, known: Sequence[KnownPrompt], n_last: int) -> tuple[Any, Tensor]:
    """As `multimodal.prefill.prefill` of a left-padded batch, where each row but for its last `n_last` tokens begins like a known prompt."""
    n_first = batch.ids.shape[1] - n_last
    lengths = batch.attention_mask[:, :n_first].sum(1).tolist()
    cache: Any = DynamicCache()
    for index, layer in enumerate(zip(*(prompt.states for prompt in known), strict=True)):
        keys, values = (torch.stack([left_padded(value[:, :n], n_first) for value, n in zip(side, lengths, strict=True)]) for side in zip(*layer, strict=True))
        cache.update(keys, values, index)
    return cache, read_rest(language, attachment, cache, batch.ids, batch.domain, token_map)


def left_padded(states: Tensor, length: int) -> Tensor:
    """[..., length, Dh] of keys or values [..., T, Dh]."""
    return nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))
