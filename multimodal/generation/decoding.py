"""Rows that are being written, each with its own adapter: their prompts are read into a key-value cache, and they come and go between two tokens.

Five questions about an image of 256 tokens cost 256 + 5 x 12 tokens instead of 5 x 268. Rows stay padded on the left without a gap, so
any model that generates in batches reads them: after the shared part, each row is given its LAST n tokens, the same n for all. Where a
row has a shorter question, the last tokens of what it shares are read once more, in place of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adalink import PAD, TokenMap
from adalink.attachment.attachment import Attachment
from adalink.attachment.beside import set_states, states_of
from adalink.attachment.recompute import needs_whole_sequence
from multimodal.batches.collate import Batch
from multimodal.batches.prefix_sharing import has_row_cache
from multimodal.batches.tokenize import TextTooLong
from multimodal.generation.settings import GenerationSettings
from multimodal.language import Language

__all__ = [
    "Decoding", "Fork", "KnownPrompt", "check_room", "cuts_of", "known_prompts", "last_cut", "left_padded", "may_decode", "n_alike", "plan_fork",
    "prefill", "read", "read_on", "read_rest", "tokens_of",
]  # fmt: skip


def check_room(language: Language, n_prompt: int, settings: GenerationSettings) -> None:
    """Raise TextTooLong where a prompt of so many tokens, or the text after it, has more positions than the model.

    An encoder-decoder model counts them apart.
    """
    if language.model.config.is_encoder_decoder:
        limits = [(n_prompt, language.max_positions), (settings.max_new_tokens, language.max_written)]
    else:
        limits = [(n_prompt + settings.max_new_tokens - 1, language.max_positions)]  # the last token is only ever predicted, so it is not read
    for needed, limit in limits:
        if limit is not None and needed > limit:
            raise TextTooLong(
                f"a prompt of {n_prompt} tokens and {settings.max_new_tokens} new ones need {needed} positions, and the language model has {limit}: "
                "shorten the prompt or lower generation.max_new_tokens"
            )


# ----------------------------------------
# Prompts: what several rows begin with is read once, then the rest of each row.


AT_ONCE = 2**25  # rows x tokens x keys of one call: what a mask or attention holds grows with it. 128 MiB of float32 for each head, at most
WORTH = 0.8  # of the tokens of a plain prefill: above it, a second call of the model costs more than it saves


@dataclass(frozen=True)
class Fork:
    """How prompts are read in two calls: the prefixes of some rows, then the last `n_last` tokens of every row.

    leaders   the rows whose prefixes are read
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
    cuts = cuts_of(batch)
    n_first = 0 if fork is None else last_cut(cuts, n - fork.n_last)
    if fork is None or not n_first:
        return whole, read_rest(language, attachment, whole, ids, domain, token_map, cuts)
    leaders = torch.tensor(fork.leaders, device=ids.device)
    shared_prefixes = _shared_prefixes(token_map, leaders, n_first)
    read_rest(language, attachment, whole, ids[leaders, :n_first], shared_prefixes.domain, shared_prefixes, cuts)
    _spread(whole, torch.tensor(fork.leader, device=ids.device), torch.tensor(fork.shift, device=ids.device))
    return whole, read_rest(language, attachment, whole, ids, domain, token_map, cuts)


def cuts_of(batch: Batch) -> list[bool] | None:
    """T + 1 of them: whether a call may end before each column; none may inside a block, whose tokens read later ones. None: before any."""
    if batch.block is None:
        return None
    block = batch.block
    inside = ((block[:, 1:] == block[:, :-1]) & (block[:, 1:] >= 0)).any(0)
    return [True, *(~inside).tolist(), True]


def last_cut(cuts: Sequence[bool] | None, end: int) -> int:
    """The last column up to `end` before which a call may end."""
    return end if cuts is None else next(i for i in range(end, -1, -1) if cuts[i])


def read_rest(
    language: Language, attachment: Attachment, past: Any, ids: Tensor, domain: Tensor, token_map: TokenMap, cuts: Sequence[bool] | None = None
) -> Tensor:
    """As `read` of the tokens after those that `past` holds; ids, domain: int64 [B, T], of all of them. cuts: see `cuts_of`.

    Long prompts are read in pieces, so that memory grows with their length and not with its square.
    """
    n, mask = ids.shape[1], (domain != PAD).long()
    size = max(AT_ONCE // (len(ids) * n), 1)
    scores, end = torch.empty(0), past.get_seq_length()
    while end < n:
        start, end = end, last_cut(cuts, min(end + size, n))
        while end <= start or (cuts is not None and end < n and not cuts[end]):  # a block that is longer than a piece
            end = max(end, start) + 1
        with attachment.bind(replace(token_map, present=_present(domain[:, start:end]))):
            scores = read(language, past, ids[:, start:end], mask[:, :end])
    return scores


def read(language: Language, past: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """float32 [B, V]: logits of the next token after `ids`, int64 [B, T], which `past`, the cache, then holds too.

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
    return token_map.cut(leaders, n_first, _present(token_map.domain[leaders, :n_first]))


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
    states   keys and values of each layer, [heads, T, Dh], as `adalink.attachment.beside` names it
    """

    tokens: tuple[tuple[int, int], ...]
    states: Mapping[Hashable, tuple[Tensor, Tensor]]

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        return sum(value.nbytes for pair in self.states.values() for value in pair)

    def n_alike(self, tokens: Sequence[tuple[int, int]]) -> int:
        """How many tokens of a prompt about the same image need not be read again: the last is, since what follows it is asked for."""
        return min(n_alike([self.tokens, tokens]), len(tokens) - 1)


def known_prompts(cache: Any, batch: Batch, rows: Sequence[int]) -> list[KnownPrompt]:
    """Prompts of some rows of a batch, which was just read as the last rows of a cache. Copies: nothing else of the cache stays in memory."""
    tokens, start, states = tokens_of(batch.ids, batch.domain), len(cache.layers[0].keys) - len(batch.ids), states_of(cache)

    def own(states: Tensor, i: int) -> Tensor:
        return states[start + i, :, -len(tokens[i]) :].clone()

    return [KnownPrompt(tuple(tokens[i]), {mark: (own(keys, i), own(values, i)) for mark, (keys, values) in states.items()}) for i in rows]


def read_on(language: Language, attachment: Attachment, batch: Batch, token_map: TokenMap, known: Sequence[KnownPrompt], n_last: int) -> tuple[Any, Tensor]:
    """As `prefill` of a left-padded batch, where each row but for its last `n_last` tokens begins like a known prompt.

    More is read again where a block would be cut.
    """
    cuts = cuts_of(batch)
    n_first = last_cut(cuts, batch.ids.shape[1] - n_last)
    if not n_first:
        return prefill(language, attachment, batch, token_map, n_left=0, may_share=False)
    lengths = batch.attention_mask[:, :n_first].sum(1).tolist()
    cache: Any = DynamicCache()
    row_states = [
        {mark: (left_padded(keys[None, :, :n], n_first), left_padded(values[None, :, :n], n_first)) for mark, (keys, values) in prompt.states.items()}
        for prompt, n in zip(known, lengths, strict=True)
    ]
    set_states(cache, _beneath(row_states, [1] * len(known)))
    return cache, read_rest(language, attachment, cache, batch.ids, batch.domain, token_map, cuts)


def left_padded(states: Tensor, length: int) -> Tensor:
    """[..., length, Dh] of keys or values [..., T, Dh]."""
    return nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


# ----------------------------------------
# The running batch.


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

        may_share: whether rows about one image have the same prefix (see `prefill`).
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
        states = _joined([self._cache, cache], [n_old, len(scores)])
        beside = _beside(retained.get(self._cache, {}), n_old, retained.get(cache, {}), len(scores))
        joined = TokenMap(
            torch.cat([_padded(before.domain, length, PAD), _padded(token_map.domain, length, PAD)]),
            torch.cat([before.row, token_map.row]),
            {name: torch.cat([value, token_map.inputs[name]]) for name, value in before.inputs.items()},
            serving=None if before.serving is None or token_map.serving is None else before.serving | token_map.serving,
            host=None if before.host is None else before.host.beside(token_map.host),
            indices=None if before.indices is None or token_map.indices is None else before.indices + token_map.indices,
            weights=_weights_beside(before, token_map),
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
        states = {mark: (keys[chosen, :, n_empty:], values[chosen, :, n_empty:]) for mark, (keys, values) in states_of(self._cache).items()}
        beside = {edit: value[chosen] for edit, value in retained.get(self._cache, {}).items()}
        inputs = {name: value[chosen] for name, value in now.inputs.items()}
        row, indices = now.row[chosen], None if now.indices is None else tuple(now.indices[i] for i in rows)
        serving = None if now.serving is None else now.serving & frozenset(row.tolist() if indices is None else indices)
        host = None if now.host is None else now.host.after(chosen)
        weights = None if now.weights is None else now.weights[chosen]
        self._set(states, beside, TokenMap(now.domain[chosen, n_empty:], row, inputs, serving=serving, host=host, indices=indices, weights=weights))

    def _now(self) -> TokenMap:
        """The map with the tokens that were generated since it was made."""
        n_new = self._mask.shape[1] - self._map.domain.shape[1]
        host = None if self._map.host is None else self._map.host.after()
        return replace(self._map, domain=nn.functional.pad(self._map.domain, (0, n_new), value=self._map.generated), host=host)

    def _set(self, states: Mapping[Hashable, tuple[Tensor, Tensor]], beside: Mapping[nn.Module, Tensor], token_map: TokenMap) -> None:
        """Take keys and values, what edits keep, and a map, once all of them are made: where memory ends before, the rows stay as they were."""
        mask = (token_map.domain != PAD).long()
        set_states(self._cache, states)
        self.attachment.retained[self._cache] = dict(beside)
        self._map, self._mask = token_map, mask


def _joined(caches: Sequence[Any], n_rows: Sequence[int]) -> dict[Hashable, tuple[Tensor, Tensor]]:
    """Keys and values of each layer: the rows of one cache, then those of the next, the shorter rows padded on the left."""
    length = max(cache.get_seq_length() for cache in caches)
    padded = [{mark: (left_padded(keys, length), left_padded(values, length)) for mark, (keys, values) in states_of(cache).items()} for cache in caches]
    return _beneath(padded, n_rows)


def _beneath(parts: Sequence[Mapping[Hashable, tuple[Tensor, Tensor]]], n_rows: Sequence[int]) -> dict[Hashable, tuple[Tensor, Tensor]]:
    """Keys and values of the rows of several, one after the other. Rows without a layer, of an adapter with none beside the host's, have zeros there."""
    like = {mark: pair for part in parts for mark, pair in part.items()}

    def stacked(mark: Hashable, side: int) -> Tensor:
        zeros = like[mark][side][:1] * 0
        return torch.cat([part[mark][side] if mark in part else zeros.expand(n, -1, -1, -1) for part, n in zip(parts, n_rows, strict=True)])

    return {mark: (stacked(mark, 0), stacked(mark, 1)) for mark in like}


def _beside(old: Mapping[nn.Module, Tensor], n_old: int, new: Mapping[nn.Module, Tensor], n_new: int) -> dict[nn.Module, Tensor]:
    """What edits keep of the prompts of both; a row that an edit does not serve has zeros, which nothing reads."""
    joined = {}
    for edit, like in {**old, **new}.items():
        parts = [part.get(edit, like.new_zeros(n, *like.shape[1:])) for part, n in ((old, n_old), (new, n_new))]
        joined[edit] = torch.cat(parts)
    return joined


def _weights_beside(old: TokenMap, new: TokenMap) -> Tensor | None:
    """The weights of the rows of both; zeros for those of a map that has none."""
    found = [one.weights for one in (old, new) if one.weights is not None]
    if not found:
        return None
    return torch.cat([found[0].new_zeros(len(one.row), found[0].shape[1]) if one.weights is None else one.weights for one in (old, new)])


def _padded(value: Tensor, length: int, padding: int) -> Tensor:
    return nn.functional.pad(value, (length - value.shape[1], 0), value=padding)
