"""Prompts into a key-value cache: what several rows begin with is read once, then the rest of each row.

Five questions about an image of 256 tokens cost 256 + 5 x 12 tokens instead of 5 x 268. Rows stay padded on the left without a gap, so
any model that generates in batches reads them: after the shared part, each row is given its LAST n tokens, the same n for all. Where a
row has a shorter question, the last tokens of what it shares are read once more, in place of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adalink import PAD, TokenMap
from adalink.attachment.attachment import Attachment
from multimodal.batches.collate import Batch
from multimodal.language import Language

__all__ = [
    "Fork", "KnownPrompt", "known_prompts", "left_padded", "n_alike", "plan_fork", "prefill", "read", "read_on",
    "read_rest", "tokens_of",
]  # fmt: skip


AT_ONCE = 2**25  # rows x tokens x keys of one call: what a mask or attention holds grows with it. 128 MiB of float32 for each head, at most
WORTH = 0.8  # of the tokens of a plain prefill: above it, a second call of the model costs more than it saves


@dataclass(frozen=True)
class Fork:
    """How prompts are read in two calls: the beginnings of some rows, then the last `n_last` tokens of every row.

    leaders   the rows whose beginnings are read
    leader    [B]: which of `leaders` each row begins as
    shift     [B]: how many tokens longer its leader is
    """

    leaders: tuple[int, ...]
    leader: tuple[int, ...]
    shift: tuple[int, ...]
    n_last: int


def prefill(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, *, n_left: int, may_share: bool) -> tuple[Any, Tensor]:
    """The cache of a left-padded batch without the last `n_left` tokens of its rows, and float32 [B, V] after the last that was read.

    may_share: False where what a token becomes depends on later ones, so that rows have nothing in common.
    """
    n = batch.ids.shape[1] - n_left
    ids, domain = batch.ids[:, :n], batch.domain[:, :n]
    fork = plan_fork(tokens_of(ids, domain), list(zip(batch.image.tolist(), token_map.row.tolist(), strict=True))) if may_share else None
    whole: Any = DynamicCache()  # without the config: a cache with a sliding window drops tokens, and rows are not of one length
    if not may_share:
        with attachment.bind(token_map):
            return whole, read(language, whole, ids, (domain != PAD).long())
    if fork is None:
        return whole, read_rest(language, attachment, whole, ids, domain, token_map)
    n_first = n - fork.n_last
    leaders = torch.tensor(fork.leaders, device=ids.device)
    shared_prefixes = _shared_prefixes(token_map, leaders, n_first)
    read_rest(language, attachment, whole, ids[leaders, :n_first], shared_prefixes.domain, shared_prefixes)
    _spread(whole, torch.tensor(fork.leader, device=ids.device), torch.tensor(fork.shift, device=ids.device))
    return whole, read_rest(language, attachment, whole, ids, domain, token_map)


def read_rest(language: Language, attachment: Attachment, past: Any, ids: Tensor, domain: Tensor, token_map: TokenMap) -> Tensor:
    """As `read` of the tokens after those that `past` holds; ids, domain: int64 [B, T], of all of them.

    Long prompts are read in pieces, so that memory grows with their length and not with its square.
    """
    n, mask = ids.shape[1], (domain != PAD).long()
    size = max(AT_ONCE // (len(ids) * n), 1)
    scores = torch.empty(0)
    for start in range(past.get_seq_length(), n, size):
        end = min(start + size, n)
        with attachment.bind(replace(token_map, present=_present(domain[:, start:end]))):
            scores = read(language, past, ids[:, start:end], mask[:, :end])
    return scores


def read(language: Language, past: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """float32 [B, V]: what the model says after `ids`, int64 [B, T], which `past`, the cache, then holds too.

    mask: int64 [B, K], 1 for each token that is none of the padding on the left, the cached ones and these.
    """
    model: Any = language.model
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": past, "use_cache": True}
    accepted = _parameters(model.__class__)
    if "position_ids" in accepted:  # as transformers' generation counts them
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    logits: Tensor = model(**arguments).logits[:, -1]
    return logits.float()


def plan_fork(rows: Sequence[Sequence[Hashable]], key: Sequence[Hashable]) -> Fork | None:
    """How rows, each a list of tokens, are read in the fewest tokens; None where a plain prefill is as good.

    key: of each row; rows of one key may share what they begin with.

    [1 2 3 4], [1 2 3 5] of one key -> [1 2 3] once, and then the last token of each.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, one in enumerate(key):
        groups.setdefault(one, []).append(i)
    longest = max(len(row) for row in rows)
    # How many tokens each row of a group has to read for itself.
    own = {one: max(max(len(rows[i]) for i in group) - n_alike([rows[i] for i in group]), 1) for one, group in groups.items()}
    best, least = 0, WORTH * len(rows) * longest
    for n_last in sorted({own[one] for one, group in groups.items() if len(group) > 1}):
        n_shared_prefixes = sum(1 if own[one] <= n_last else len(group) for one, group in groups.items())
        if (cost := n_shared_prefixes * (longest - n_last) + len(rows) * n_last) < least:
            best, least = n_last, cost
    if not best:
        return None
    leading = {i: max(group, key=lambda j: len(rows[j])) if own[one] <= best else i for one, group in groups.items() for i in group}
    leaders = tuple(dict.fromkeys(leading[i] for i in range(len(rows))))
    return Fork(
        leaders=leaders,
        leader=tuple(leaders.index(leading[i]) for i in range(len(rows))),
        shift=tuple(len(rows[leading[i]]) - len(rows[i]) for i in range(len(rows))),
        n_last=best,
    )


def n_alike(rows: Sequence[Sequence[Hashable]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(len(row) for row in rows))


def tokens_of(ids: Tensor, domain: Tensor) -> list[list[tuple[int, int]]]:
    """Id and domain of each token of each row, without padding."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(ids.tolist(), domain.tolist(), strict=True)]
    return [[pair for pair in row if pair[1] != PAD] for row in pairs]


def _shared_prefixes(token_map: TokenMap, leaders: Tensor, n_first: int) -> TokenMap:
    domain = token_map.domain[leaders, :n_first]
    inputs = {name: value[leaders] for name, value in token_map.inputs.items()}
    return replace(token_map, domain=domain, row=token_map.row[leaders], inputs=inputs, present=_present(domain))


def _present(domain: Tensor) -> frozenset[int]:
    """The domains that occur: a bridge is not run where no image is read."""
    return frozenset(domain.unique().tolist()) - {PAD}


def _spread(cache: Any, leader: Tensor, shift: Tensor) -> None:
    """Give each row its leader's keys and values, moved to the right by `shift`; what is left over on the left is padding there."""
    n = cache.get_seq_length()
    place = (torch.arange(n, device=shift.device) - shift[:, None]).clamp(min=0)[:, None, :, None]  # [B, 1, T, 1]
    moves = bool(shift.any())
    for layer in cache.layers:
        for name in ("keys", "values"):
            value = getattr(layer, name)[leader]
            setattr(layer, name, torch.take_along_dim(value, place, 2) if moves else value)


@cache
def _parameters(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


# ----------------------------------------
# Prompts that were read before: one that begins like a known one is read from there on.


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt about one image under one adapter, of which no token becomes another by what follows.

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
        """How many tokens of a prompt about the same image need not be read again: the last is, since what follows it is asked for."""
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
    """As `multimodal.generation.prefill.prefill` of a left-padded batch, where each row but for its last `n_last` tokens begins like a known prompt."""
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
