"""Rows that are being written, each with its own adapter; they come and go between two tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adalink import PAD, TokenMap
from adalink.attachment.attachment import Attachment
from adalink.attachment.recompute import needs_whole_sequence
from multimodal.batches.collate import Batch
from multimodal.batches.prefix_sharing import has_row_cache
from multimodal.generation.prefill import KnownPrompt, known_prompts, left_padded, prefill, read, read_on
from multimodal.language import Language

__all__ = ["Decoding", "may_decode"]

# What a model's own generation config may ask for that changes a greedy text, and the value that changes nothing; None does not either.
NEUTRAL = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None, "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None, "stop_strings": None, "max_time": None,
}  # fmt: skip


def may_decode(model: Any, attachment: Attachment, token_map: TokenMap) -> bool:
    """Whether `Decoding` writes what transformers' generation would: a cache that is exact row by row, and no wishes of the model's own."""
    own = model.generation_config
    asks = any(getattr(own, name, None) not in (None, neutral) for name, neutral in NEUTRAL.items())
    return has_row_cache(model) and not asks and not needs_whole_sequence(attachment, token_map)


class Decoding:
    """A running batch: one token for every row with each step.

    Rows are padded on the left to the longest and all end in the same column, so a row that comes takes no column from the others, and
    the columns that only one row had go with it. Whoever calls chooses the tokens, from the scores that `join` and `step` give.
    """

    def __init__(self, language: Language, attachment: Attachment) -> None:
        self.language = language
        self.attachment = attachment
        self._cache: Any = None  # None while there are no rows
        self._map: TokenMap  # of the tokens when a row last came or went; those since then are generated ones
        self._mask: Tensor  # int64 [B, K], of all tokens that the cache holds

    def join(self, batch: Batch, token_map: TokenMap, *, may_share: bool) -> Tensor:
        """float32 [B, V]: scores for the first token of new rows, which stand after the others from now on. Their prompts are read.

        may_share: whether rows about one image have the same beginning (see `multimodal.generation.prefill`).
        """
        return self._add(batch, token_map, *prefill(self.language, self.attachment, batch, token_map, n_left=0, may_share=may_share))

    def join_known(self, batch: Batch, token_map: TokenMap, known: Sequence[KnownPrompt], n_last: int) -> Tensor:
        """As `join`, where each row but for its last `n_last` tokens begins like a prompt that was read before."""
        return self._add(batch, token_map, *read_on(self.language, self.attachment, batch, token_map, known, n_last))

    def prompts(self, batch: Batch, rows: Sequence[int]) -> list[KnownPrompt]:
        """The prompts of some rows of the batch that has joined last, before the next step."""
        return known_prompts(self._cache, batch, rows)

    def _add(self, batch: Batch, token_map: TokenMap, cache: Any, scores: Tensor) -> Tensor:
        if self._cache is None:
            self._cache, self._map, self._mask = cache, token_map, batch.attention_mask
            return scores
        before, retained, n_old = self._now(), self.attachment.retained, len(self._mask)
        length = max(before.domain.shape[1], batch.ids.shape[1])
        states = _joined(self._cache, cache)
        beside = _beside(retained.get(self._cache, {}), n_old, retained.get(cache, {}), len(scores))
        joined = TokenMap(
            torch.cat([_padded(before.domain, length, PAD), _padded(token_map.domain, length, PAD)]),
            torch.cat([before.row, token_map.row]),
            {name: torch.cat([value, token_map.inputs[name]]) for name, value in before.inputs.items()},
            serving=None if before.serving is None or token_map.serving is None else before.serving | token_map.serving,
        )
        self._set(states, beside, joined)
        return scores

    def step(self, ids: Tensor) -> Tensor:
        """float32 [B, V]: scores for the token after `ids`, int64 [B], the newest of each row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        with self.attachment.bind(self._map):
            return read(self.language, self._cache, ids[:, None], self._mask)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go."""
        if not rows:
            self._cache = None
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        now, retained = self._now(), self.attachment.retained
        n_empty = int(self._mask[chosen].any(0).long().argmax())  # columns on the left that only rows which go had
        states = [(layer.keys[chosen, :, n_empty:], layer.values[chosen, :, n_empty:]) for layer in self._cache.layers]
        beside = {edit: value[chosen] for edit, value in retained.get(self._cache, {}).items()}
        row = now.row[chosen]
        inputs = {name: value[chosen] for name, value in now.inputs.items()}
        serving = None if now.serving is None else now.serving & frozenset(row.tolist())
        self._set(states, beside, TokenMap(now.domain[chosen, n_empty:], row, inputs, serving=serving))

    def _now(self) -> TokenMap:
        """The map with the tokens that were generated since it was made."""
        n_new = self._mask.shape[1] - self._map.domain.shape[1]
        return replace(self._map, domain=nn.functional.pad(self._map.domain, (0, n_new), value=self._map.generated))

    def _set(self, states: Sequence[tuple[Tensor, Tensor]], beside: Mapping[nn.Module, Tensor], token_map: TokenMap) -> None:
        """Take keys and values, what edits keep, and a map, once all of them are made: where memory ends before, the rows stay as they were."""
        mask = (token_map.domain != PAD).long()
        for layer, (keys, values) in zip(self._cache.layers, states, strict=True):
            layer.keys, layer.values = keys, values
        self.attachment.retained[self._cache] = dict(beside)
        self._map, self._mask = token_map, mask


def _joined(cache: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer: the rows of a cache, then those of another, the shorter rows padded on the left."""
    length = max(cache.get_seq_length(), other.get_seq_length())
    return [
        (
            torch.cat([left_padded(mine.keys, length), left_padded(new.keys, length)]),
            torch.cat([left_padded(mine.values, length), left_padded(new.values, length)]),
        )
        for mine, new in zip(cache.layers, other.layers, strict=True)
    ]


def _beside(old: Mapping[nn.Module, Tensor], n_old: int, new: Mapping[nn.Module, Tensor], n_new: int) -> dict[nn.Module, Tensor]:
    """What edits keep of the prompts of both; a row that an edit does not serve has zeros, which nothing reads."""
    joined = {}
    for edit, like in {**old, **new}.items():
        parts = [part.get(edit, like.new_zeros(n, *like.shape[1:])) for part, n in ((old, n_old), (new, n_new))]
        joined[edit] = torch.cat(parts)
    return joined


def _padded(value: Tensor, length: int, padding: int) -> Tensor:
    return nn.functional.pad(value, (length - value.shape[1], 0), value=padding)
