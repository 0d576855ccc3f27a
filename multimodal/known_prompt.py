"""Prompts that were read before: one that begins like a known one is read from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adalink import PAD, TokenMap
from adalink.attach import Attachment
from multimodal.batch import Batch
from multimodal.language import Language
from multimodal.prefill import n_alike, present, read

__all__ = ["KnownPrompt", "known_prompts", "read_on"]


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


def known_prompts(cache: Any, batch: Batch) -> list[KnownPrompt]:
    """The prompts of a batch, which were just read as the last rows of a cache. Copies: nothing else of the cache is kept in memory."""
    found = []
    for i, (ids, domain) in enumerate(zip(batch.ids.tolist(), batch.domain.tolist(), strict=True), start=-len(batch.ids)):
        tokens = tuple((token, one) for token, one in zip(ids, domain, strict=True) if one != PAD)
        states = tuple((layer.keys[i, :, -len(tokens) :].clone(), layer.values[i, :, -len(tokens) :].clone()) for layer in cache.layers)
        found.append(KnownPrompt(tokens, states))
    return found


def read_on(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, known: Sequence[KnownPrompt], n_last: int) -> tuple[Any, Tensor]:
    """As `multimodal.prefill.prefill` of a left-padded batch, where each row but for its last `n_last` tokens begins like a known prompt."""
    n_first = batch.ids.shape[1] - n_last
    lengths = batch.attention_mask[:, :n_first].sum(1).tolist()
    cache: Any = DynamicCache()
    for index, layer in enumerate(zip(*(prompt.states for prompt in known), strict=True)):
        keys, values = (torch.stack([_last(value[:, :n], n_first) for value, n in zip(side, lengths, strict=True)]) for side in zip(*layer, strict=True))
        cache.update(keys, values, index)
    with attachment.bind(replace(token_map, present=present(batch.domain[:, n_first:]))):
        return cache, read(language, cache, batch.ids[:, n_first:], batch.attention_mask)


def _last(value: Tensor, length: int) -> Tensor:
    """[heads, length, Dh]: padded on the left."""
    return nn.functional.pad(value, (0, 0, length - value.shape[1], 0))
