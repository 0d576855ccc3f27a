"""Cached generation with a slot that reads later tokens: its keys and values are made anew at each step.

A slot that reads everything (eP-ALM as released) changes with each new token, while a cache assumes that nothing does. Where only
the last layer reads what changed, the rest of the cache is right: the layer before the last is run on the slot alone, over all
cached keys, and the slot's keys and values in the last layer are replaced. Elsewhere there is no exact cache, and none is used.

Both layers are called as modules, so that edits inside them act on the slot; who records what layers give (`output_hidden_states`)
finds two entries more at each of these steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalink.attachment.attachment import Attachment
from adalink.edit import Adapter, Placement, Port
from adalink.errors import AttachError
from adalink.tokens import PAD, TokenMap, Tokens

__all__ = ["Recomputed", "WholeSequence", "may_share_prompts", "needs_whole_sequence", "reads_later_tokens", "recompute", "with_exact_cache"]


class Recomputed(nn.Module):
    """The edit at a layer's cache port: before the layer runs on new tokens, its slot's keys and values are made anew.

    before: dotted name of the layer that runs before it, whose output for the slot depends on the new tokens.
    """

    def __init__(self, before: str) -> None:
        super().__init__()
        self.before = before


class WholeSequence(nn.Module):
    """The edit at a layer's cache port where no cache is exact: every step must read the whole sequence."""


def needs_whole_sequence(attachment: Attachment, token_map: TokenMap) -> bool:
    """Whether a row of the map is served by a method that no cache is exact for: generate with use_cache=False."""
    return any(
        isinstance(placement.edit, WholeSequence) and _serves(token_map, index)
        for port, placed in attachment.at.items()
        if port.side == "cache"
        for index, placement in placed
    )


def may_share_prompts(attachment: Attachment, token_map: TokenMap) -> bool:
    """Whether rows that begin alike are alike there, whatever follows: no served adapter has a slot that reads on, or a gate over the row."""
    return not any(
        (port.side == "cache" or placement.reads_row) and _serves(token_map, index) for port, placed in attachment.at.items() for index, placement in placed
    )


def with_exact_cache(attachment: Attachment, token_map: TokenMap, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, without a cache where none is exact; a `use_cache` that is given stays, and is refused when it is used."""
    return {**({"use_cache": False} if needs_whole_sequence(attachment, token_map) else {}), **arguments}


def reads_later_tokens(adapter: Adapter) -> bool:
    """Whether a slot of the adapter depends on tokens after it, or a gate on its whole row: then each text needs a row of its own."""
    return any(placement.port.side == "cache" or placement.reads_row for placement in adapter.placements)


def recompute(
    attachment: Attachment, port: Port, names: tuple[str, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The hook at a cache port. It acts on new tokens after cached ones alone; a whole sequence needs no help.

    Raises AttachError where no cache is exact.
    """
    tokens, token_map = attachment.tokens, attachment.map
    if tokens is None or token_map is None or not tokens.n_before:
        return
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    for index, placement in attachment.at[port]:
        if not _serves(token_map, index):
            continue
        if not isinstance(placement.edit, Recomputed):
            raise AttachError(
                "a slot of this adapter reads later tokens and more than one layer reads the slot afterwards, so no cache is exact: "
                "generate with use_cache=False, or train with mask='causal'"
            )
        _recompute(attachment, layer, placement, index, tokens, token_map, call)


def _recompute(
    attachment: Attachment, layer: nn.Module, placement: Placement, index: int, tokens: Tokens, token_map: TokenMap, call: Mapping[str, Any]
) -> None:
    """Run two layers on the slot alone: the one before, reading the cache, then this one, writing its keys and values there.

    The layer before has cached this call's tokens already, this one has not; what it makes of the slot beside keys and values is dropped.
    """
    assert isinstance(placement.edit, Recomputed)
    h, cache, like = call["hidden_states"][:, :1], call["past_key_values"], call.get("attention_mask")
    place = attachment.anatomy.layers.index(placement.edit.before)
    before = attachment.stack.get_submodule(placement.edit.before)
    for module, end, number in ((before, tokens.end, place), (layer, tokens.n_before, place + 1)):
        slot = token_map.first_of(placement.domains[0], len(h), end, cache.layers[number].keys.shape[2])
        with attachment._rebound(slot):
            arguments = {**call, **_own_arguments(attachment, slot, call, h, like)}
            is_slot = _is_slot(slot, index) if module is layer else None
            h = module(**{**arguments, "hidden_states": h, "past_key_values": _SlotCache(cache, is_slot)})
            h = h[0] if isinstance(h, tuple) else h


def _own_arguments(attachment: Attachment, slot: Tokens, call: Mapping[str, Any], h: Tensor, like: Tensor | None) -> dict[str, Any]:
    """The layer's arguments for the slot, in place of those for the new tokens."""
    own: dict[str, Any] = {"attention_mask": _own_mask(slot, like)}
    if call.get("position_ids") is not None:
        own["position_ids"] = slot.position
    if call.get("position_embeddings") is not None:
        assert attachment.anatomy.positions is not None
        rotary = attachment.stack.get_submodule(attachment.anatomy.positions.module)
        own["position_embeddings"] = rotary(h, position_ids=slot.position)
    return own


class _SlotCache:
    """A cache for one token that is already in it: new keys and values replace its old ones (is_slot), or are dropped (None)."""

    def __init__(self, cache: Any, is_slot: Tensor | None) -> None:
        self.cache, self.is_slot = cache, is_slot

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer = self.cache.layers[layer_idx]
        if self.is_slot is not None:
            layer.keys, layer.values = torch.where(self.is_slot, keys, layer.keys), torch.where(self.is_slot, values, layer.values)
        return layer.keys, layer.values


def _is_slot(slot: Tokens, index: int) -> Tensor:
    """bool [B, 1, K, 1]: the slot's place in the cache, on the rows that the adapter serves."""
    order = torch.arange(slot.keys.shape[1], device=slot.keys.device)
    is_slot = (order == slot.position) & (slot.row == index)[:, None] & (slot.domain != PAD)
    return is_slot[:, None, :, None]


def _own_mask(slot: Tokens, like: Tensor | None) -> Tensor:
    """[B, 1, 1, K]: what the slot may read before its method's mask port opens more; bool, or additive where the model's masks are."""
    order = torch.arange(slot.keys.shape[1], device=slot.keys.device)
    may_read = ((order <= slot.position) & (slot.keys != PAD) | (order == slot.position))[:, None, None, :]
    if like is None or like.dtype == torch.bool:
        return may_read
    return torch.zeros_like(may_read, dtype=like.dtype).masked_fill(~may_read, torch.finfo(like.dtype).min)


def _serves(token_map: TokenMap, index: int) -> bool:
    return index in token_map.serving if token_map.serving is not None else bool((token_map.row == index).any())
