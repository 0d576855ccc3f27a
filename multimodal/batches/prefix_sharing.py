"""The calls of the language model in a training step: one, or one for the prefix that rows about an image share and one for the rest.

    rows  [image, prompt, caption 1]        prefixes    [image, prompt]       once, or without gradient
          [image, prompt, caption 2]        the rest    [caption 1], [caption 2] after its keys and values

Equal in loss and gradients to one call wherever no token reads a later one. With gradient it pays where a row cannot hold several texts;
without, wherever nothing that is trained reads or writes the prefixes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from adalink import ANSWER, BASE_ROW, TEXT, AdaptedModel, Adapter, TokenMap
from adalink.anatomy import text_config
from adalink.errors import ConfigError
from adalink.methods.budgets.hyper import Tasks
from adalink.methods.unipelt import Gate
from multimodal.batches.collate import FLEX, Batch, SharedPrefix, collate, packed_attention
from multimodal.batches.tokenize import Row

__all__ = [
    "EAGER_FAMILIES", "REFUSALS", "SDPA_FAMILIES", "ModelCall", "agree", "caches", "calls_of", "check_packed", "forks_exactly",
    "gates_of", "has_row_cache", "may_fork", "may_pack", "mixes_texts", "packs_exactly", "reads_in_chunks", "trained_domains", "trial_call", "unadapted",
    "windows",
]  # fmt: skip


# ----------------------------------------
# The keys and values of shared prefixes, as a cache that texts are read after: gradients flow through it, and reading it again changes nothing.


class Read(DynamicLayer):  # a layer of transformers' Cache, which asks for its class
    """A layer's keys and values of the shared prefixes, stored the first time: checkpointing computes them again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[Hashable, Read] = {}  # of networks beside the model (adalink.attachment.beside)

    def further(self, mark: Hashable) -> Read:
        """The layer of a network beside the model."""
        return self.others.setdefault(mark, Read())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, [I, H, T, D] each: these keys and values."""
        if self.get_seq_length() == 0:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class After(DynamicLayer):
    """The keys and values that a text comes after; those of the text are not stored, so that a layer may be run twice.

    which   int64 [B], the prefix of each row
    each    how many consecutive rows have the same prefix; None where images have several numbers of texts
    """

    def __init__(self, read: Read, which: Tensor, each: int | None) -> None:
        super().__init__()
        self.read, self.which, self.each = read, which, each

    def further(self, mark: Hashable) -> After:
        """The layer of a network beside the model, which reads what that network made of the prefixes."""
        return After(self.read.further(mark), self.which, self.each)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, [B, H, T, D] each: the row's prefix, then these."""
        assert self.read.keys is not None
        assert self.read.values is not None
        return self._joined(self.read.keys, key_states), self._joined(self.read.values, value_states)

    def get_seq_length(self) -> int:
        """Tokens of the prefix."""
        return self.read.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys attention reads, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def _joined(self, shared_prefix: Tensor, own: Tensor) -> Tensor:
        """[I, H, P, D] and [B, H, T, D] -> [B, H, P + T, D]. Equal numbers need one copy, and a plain sum for the gradient, not two and an index."""
        if self.each is None:
            return torch.cat([shared_prefix[self.which], own], -2)
        spread = shared_prefix[:, None].expand(-1, self.each, -1, -1, -1)
        return torch.cat([spread, own.unflatten(0, (-1, self.each))], -2).flatten(0, 1)


def caches(n_layers: int, which: Tensor, each: int | None) -> tuple[Cache, Cache]:
    """The cache that prefixes are read into, and the one that is given with what comes after them.

    Neither drops what a window does not reach: masks are made for all keys, by the model or by us.
    """
    read = [Read() for _ in range(n_layers)]
    return Cache(layers=list(read)), Cache(layers=[After(layer, which, each) for layer in read])


# ----------------------------------------
# What each family of language models lets its texts share: a row, a cache, or nothing.


# Families that take a 4D mask with position ids, each proven equal in tests/multimodal/batches/test_packing_families.py. Others may refuse one
# (Bloom), or take it and be silently wrong (MPT, and Gemma2 where sdpa drops its cap).
SDPA_FAMILIES = frozenset(
    "biogpt falcon gemma gemma3_text gpt2 gpt_neox llama mistral olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm".split()
)
EAGER_FAMILIES = frozenset("gemma2 gpt_neo gptj xglm".split())

_ROTATES_BY_LENGTH = ("dynamic", "longrope")  # rotations that depend on how long the call's rows are


def may_pack(model: Any) -> bool:
    """Whether the model is exact with several texts in a row, separated by a 4D mask and position ids."""
    config = model.config
    if config.model_type in SDPA_FAMILIES:
        implementations: tuple[str, ...] = ("sdpa", "eager", FLEX)
    else:
        implementations = ("eager",) if config.model_type in EAGER_FAMILIES else ()
    if config._attn_implementation not in implementations:
        return False
    # Falcon's ALiBi and GPT-Neo's local layers count from the row's first token, whatever the positions are.
    counts_columns = getattr(config, "alibi", False) or "local" in (getattr(config, "attention_layers", None) or ())
    return not counts_columns and not getattr(config, "use_bidirectional_attention", False)


def may_fork(model: Any) -> bool:
    """Whether the model reads a text after the cached keys and values of its prefix as it would read both at once.

    Not where attention looks ahead (an encoder; images and prompts of PaliGemma), where the cache holds states and not tokens (Mamba), and
    where rotations change with a row's length.
    """
    config = model.config
    # Composite models mark images that are read both ways.
    if config.get_text_config() is not config or not model.can_generate() or not has_row_cache(model):
        return False
    looks_ahead = not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False)
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return not looks_ahead and not _is_encoder(model) and rotation not in _ROTATES_BY_LENGTH


def has_row_cache(model: Any) -> bool:
    """Whether the model keeps keys and values of each token and nothing else, so that rows can come, go and be copied."""
    if model.config.is_encoder_decoder or model._is_stateful or not model._supports_default_dynamic_cache():
        return False
    if reads_in_chunks(model.config):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers)


def reads_in_chunks(config: Any) -> bool:
    """Whether a layer reads chunks of a row (Llama 4). They are counted from the first column, padding and other texts too."""
    return "chunked_attention" in (getattr(text_config(config), "layer_types", None) or ())


def windows(config: Any) -> Mapping[str, int | None]:
    """Kind of layer -> how many places back it reads, itself among them; {"": None} where all layers are alike and read everything.

    The names are those under which the model takes its masks.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention", "sliding_attention"} or kinds == {"sliding_attention"}:
        return {"full_attention": None, "sliding_attention": window}
    return {"": window if not kinds and getattr(config, "use_sliding_window", True) else None}


def _is_encoder(model: Any) -> bool:
    """Whether the model's attention says that it is not causal."""
    stated = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(stated) and not any(stated)


@dataclass(frozen=True)
class ModelCall:
    """One call of the language model: its tokens, its arguments, and what its hidden states predict.

    source, target   int64 [B, M], as in Batch; positions are those of the call's tokens
    learns           whether a gradient goes through it
    """

    token_map: TokenMap
    arguments: Mapping[str, Any]
    source: Tensor
    target: Tensor
    learns: bool = True

    @contextlib.contextmanager
    def bound(self, adapted: AdaptedModel) -> Iterator[None]:
        """Where the call is to be made."""
        with adapted.attachment.bind(self.token_map), contextlib.nullcontext() if self.learns else torch.no_grad():
            yield


def calls_of(adapted: AdaptedModel, batch: Batch, token_map: TokenMap) -> list[ModelCall]:
    """The calls to be made, in this order: the second reads what the first left in its cache."""
    start, token_map = batch.shared_prefix, token_map if batch.segment is None else replace(token_map, segment=batch.segment)
    if start is None:
        return [_whole(adapted.base, batch, token_map)]
    learns = not _is_untouched(adapted, start, token_map)
    if learns and (batch.segment is not None or not start.is_shared):
        return [_whole(adapted.base, batch, token_map)]
    first, after = caches(len(adapted.anatomy.layers), start.which, start.each)
    return [_shared_prefixes(adapted.base, batch, token_map, start, first, learns), _rest(adapted.base, batch, token_map, start, after)]


def trained_domains(adapter: Adapter) -> frozenset[int]:
    """The domains whose tokens something trained reads or writes."""
    found: set[int] = set()
    for placement in adapter.placements:
        if any(parameter.requires_grad for module in (placement.edit, *placement.shared.values()) for parameter in module.parameters()):
            found.update(placement.domains)
    return frozenset(found)


def _is_untouched(adapted: AdaptedModel, start: SharedPrefix, token_map: TokenMap) -> bool:
    """Whether no gradient could reach anything trained through the prefixes."""
    served = [adapter for name, adapter in adapted.adapters.items() if token_map.serving is None or adapted.indices[name] in token_map.serving]
    edited = any(not trained_domains(adapter).isdisjoint(start.domains) for adapter in served)  # type: ignore[arg-type]
    given = any(value.requires_grad for value in token_map.inputs.values()) or (token_map.host is not None and token_map.host.learns)
    return not edited and not given and not any(parameter.requires_grad for parameter in adapted.base.parameters())


def _whole(base: Any, batch: Batch, token_map: TokenMap) -> ModelCall:
    arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    if batch.decoder_ids is not None:
        arguments |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.decoder_ids}
    else:
        arguments |= {"attention_mask": _attention(base, batch, 0), "position_ids": batch.position}
    return ModelCall(token_map, _accepted(base, arguments), batch.source, batch.target)


def _shared_prefixes(base: Any, batch: Batch, token_map: TokenMap, start: SharedPrefix, cache: Any, learns: bool) -> ModelCall:
    first, n = start.first, start.length
    own = token_map.cut(first, n, start.domains)
    ids = batch.ids[first, :n]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": batch.position[first, :n], "past_key_values": cache}
    return ModelCall(own, _accepted(base, {**arguments, "use_cache": False}), start.source, start.target, learns)


def _rest(base: Any, batch: Batch, token_map: TokenMap, start: SharedPrefix, cache: Any) -> ModelCall:
    n = start.length
    arguments = {"input_ids": batch.ids[:, n:], "attention_mask": _attention(base, batch, n), "position_ids": batch.position[:, n:], "past_key_values": cache}
    # Only the rest's own domains: the bridge is not run again for every row.
    return ModelCall(replace(token_map, present=start.own_domains), _accepted(base, {**arguments, "use_cache": False}), start.own_source, start.own_target)


def _attention(base: Any, batch: Batch, start: int) -> Any:
    """int64 [B, T]: 1 where a token is none of the padding; where rows are packed, what each of the tokens from `start` on may read."""
    segment = _one_text(base, batch) if batch.segment is None else batch.segment
    if segment is None:
        return batch.attention_mask
    is_padding = batch.attention_mask == 0
    config = base.config.get_text_config()
    dtype = _computed_in(base, is_padding.device.type)
    return packed_attention(
        config._attn_implementation, windows(config), segment, is_padding, batch.position, dtype, start, batch.token_image, batch.block
    )


def _computed_in(base: Any, device: str) -> torch.dtype:
    """The dtype of the model's queries: a mask in another one would be cast in each layer, and each cast stored for the backward pass."""
    is_cast = torch.is_autocast_enabled(device) and base.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if is_cast else base.dtype


def _one_text(base: Any, batch: Batch) -> Tensor | None:
    """int64 [B, T] of zeros, the segments of rows of one text each, where the whole mask is better made here; None elsewhere.

    Under sdpa transformers asks a mask of two dimensions whether it has padding, which waits for all that a device has still to do. It is known here,
    and with padding the mask that transformers makes of it is as large.
    """
    is_far = batch.ids.device.type != "cpu" and batch.is_padded and batch.prepared is None
    return torch.zeros_like(batch.ids) if is_far and base.config._attn_implementation == "sdpa" and may_pack(base) else None


def _accepted(base: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without position ids, where the model takes none: it counts distances."""
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    return {name: value for name, value in arguments.items() if name != "position_ids" or takes_positions}


# ----------------------------------------
# Small calls of a language model without its adapters, to try out whether the model supports being run in another way.


# What models raise that do not support it.
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def trial_call(adapted: AdaptedModel) -> ModelCall:
    """Two rows, one padded, that ask for their tokens in no order, and for one of them twice."""
    texts = (((1, 2, 3, 4, 5, 6, 7, 8), (6, 2, 2, 0)), ((1, 5, 3, 7, 8), (3, 4, 1, 0)))
    rows = [Row(ids, (TEXT, *(ANSWER,) * (len(ids) - 1)), source, source) for ids, source in texts]
    batch = collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(adapted.device)
    (call,) = calls_of(adapted, batch, unadapted(batch))
    return call


def unadapted(batch: Batch) -> TokenMap:
    """The batch's tokens, served by no adapter."""
    return TokenMap(batch.domain, torch.full_like(batch.image, BASE_ROW), serving=frozenset())


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether scores are the same but for rounding: of float32 at least, which norms and softmax compute in."""
    near = max(torch.finfo(torch.float32).eps, torch.finfo(wanted.dtype).eps) ** 0.5
    exact = torch.promote_types(wanted.dtype, torch.float32)  # not float64, which some devices lack
    return bool((found.to(exact) - wanted.to(exact)).norm() <= near * wanted.to(exact).norm())


# ----------------------------------------
# A trial of a language model that nobody tested: does it read a text after a cache as it reads the whole row?


SHARED = 3
NEAR = 0.05  # of the scores' norm: bfloat16 rounds by 0.01, what is wrong is off by 1


@torch.no_grad()
def packs_exactly(adapted: AdaptedModel) -> bool:
    """Whether two short texts get the same scores in one row and apart. Runs the model on twenty tokens, without its adapters."""
    whole = _batch(0).to(adapted.device)
    packed = Row((1, 2, 3, 4, 5, 6, 7, 8), (TEXT,) * SHARED + (ANSWER,) * 5, segment=(0, 0, 0, 1, 1, 1, 2, 2), position=(0, 1, 2, 3, 4, 5, 3, 4))
    together = collate([packed], [0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(whole.ids.device)
    is_text = whole.attention_mask[:, SHARED:] == 1
    try:
        return agree(_scores(adapted, together)[0, SHARED:], _scores(adapted, whole)[:, SHARED:][is_text])
    except REFUSALS:
        return False


@torch.no_grad()
def forks_exactly(adapted: AdaptedModel) -> bool:
    """Whether two short texts get the same scores forked and apart. Runs the model on twenty tokens, without its adapters."""
    whole, forked = (_batch(shared_prefix).to(adapted.device) for shared_prefix in (0, SHARED))
    is_text = whole.attention_mask[:, SHARED:] == 1
    try:
        apart, after = (_scores(adapted, batch)[:, -is_text.shape[1] :][is_text].float() for batch in (whole, forked))
    except REFUSALS:  # a cache of another kind
        return False
    return bool((after - apart).norm() <= NEAR * apart.norm())


def _batch(shared_prefix: int) -> Batch:
    texts = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7, 8))
    rows = [Row(ids, (TEXT,) * SHARED + (ANSWER,) * (len(ids) - SHARED), shared_prefix=shared_prefix) for ids in texts]
    return collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0)


def _scores(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """[B, T, V]: of the last call."""
    for one in calls_of(adapted, batch, unadapted(batch)):
        with one.bound(adapted):
            scores: Tensor = adapted.base(**one.arguments).logits
    return scores


# ----------------------------------------
# What must not share a row.


def check_packed(adapter: Adapter, domain: Tensor, segment: Tensor, token_image: Tensor | None = None) -> None:
    """Raise ConfigError where the adapter would mix the texts, or the images, of a row; int64 [B, T] each, as in Batch."""
    if mixes_texts(adapter):
        raise ConfigError(
            "the batch has several texts in a row, and a slot of the adapter reads later tokens, or a gate the row, so it would read all of them: "
            "collate one row for each text, or train with mask='causal'"
        )
    if gates_of(adapter) and token_image is not None:
        raise ConfigError(
            "the batch has several images in a row, and a gate of the adapter reads the whole prompt, so it would read all of them: "
            "collate one row for each image"
        )
    if gates_of(adapter) and bool(((segment > 0) & (domain != ANSWER)).any()):
        raise ConfigError(
            "the batch has several texts with questions of their own in a row, and a gate of the adapter reads the whole prompt, so it would read "
            "all of them: collate one row for each text"
        )


def mixes_texts(adapter: Adapter) -> bool:
    """Whether tokens depend on later ones, or on all of their row, or a row has one task."""
    has_task = any(isinstance(module, Tasks) for module in adapter.modules())
    return has_task or "sequence" in gates_of(adapter) or any(placement.port.side == "cache" for placement in adapter.placements)


def gates_of(adapter: Adapter) -> set[str]:
    """What the adapter's gates take the mean of."""
    return {module.mean for module in adapter.modules() if isinstance(module, Gate)}
