"""The calls of the language model that a batch is learnt with: one, or one for what rows about a picture share and one for the rest.

    rows  [picture, prompt, caption 1]        beginnings  [picture, prompt]       once, or without gradient
          [picture, prompt, caption 2]        the rest    [caption 1], [caption 2] after its keys and values

Equal in loss and gradients to one call wherever no token reads a later one. With gradient it pays where a row cannot hold several texts;
without, wherever nothing that is trained reads or writes the beginnings.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adalink import AdaptedModel, Adapter, TokenMap
from multimodal.batch import Batch
from multimodal.beginning import Beginning
from multimodal.families import windows
from multimodal.kept_beginning import caches
from multimodal.packed_mask import packed_attention

__all__ = ["ModelCall", "calls_of", "trained_domains"]


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
    start = batch.beginning
    if start is None:
        return [_whole(adapted.base, batch, token_map)]
    learns = not _is_untouched(adapted, start, token_map)
    if learns and (batch.segment is not None or not start.is_shared):
        return [_whole(adapted.base, batch, token_map)]
    first, after = caches(len(adapted.anatomy.layers), start.which, start.each)
    return [_beginnings(adapted.base, batch, token_map, start, first, learns), _rest(adapted.base, batch, token_map, start, after)]


def trained_domains(adapter: Adapter) -> frozenset[int]:
    """The domains whose tokens something trained reads or writes."""
    found: set[int] = set()
    for placement in adapter.placements:
        if any(parameter.requires_grad for module in (placement.edit, *placement.shared.values()) for parameter in module.parameters()):
            found.update(placement.domains)
    return frozenset(found)


def _is_untouched(adapted: AdaptedModel, start: Beginning, token_map: TokenMap) -> bool:
    """Whether no gradient could reach anything trained through the beginnings."""
    served = [adapter for name, adapter in adapted.adapters.items() if token_map.serving is None or adapted.indices[name] in token_map.serving]
    edited = any(not trained_domains(adapter).isdisjoint(start.domains) for adapter in served)  # type: ignore[arg-type]
    given = any(value.requires_grad for value in token_map.inputs.values())
    return not edited and not given and not any(parameter.requires_grad for parameter in adapted.base.parameters())


def _whole(base: Any, batch: Batch, token_map: TokenMap) -> ModelCall:
    arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    if batch.decoder_ids is not None:
        arguments |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.decoder_ids}
    else:
        arguments |= {"attention_mask": _attention(base, batch, 0), "position_ids": batch.position}
    return ModelCall(token_map, _accepted(base, arguments), batch.source, batch.target)


def _beginnings(base: Any, batch: Batch, token_map: TokenMap, start: Beginning, cache: Any, learns: bool) -> ModelCall:
    first, n = start.first, start.length
    inputs = {name: value[first] for name, value in token_map.inputs.items()}
    own = replace(token_map, domain=batch.domain[first, :n], row=token_map.row[first], inputs=inputs, present=start.domains)
    ids = batch.ids[first, :n]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": batch.position[first, :n], "past_key_values": cache}
    return ModelCall(own, _accepted(base, {**arguments, "use_cache": False}), start.source, start.target, learns)


def _rest(base: Any, batch: Batch, token_map: TokenMap, start: Beginning, cache: Any) -> ModelCall:
    n = start.length
    arguments = {"input_ids": batch.ids[:, n:], "attention_mask": _attention(base, batch, n), "position_ids": batch.position[:, n:], "past_key_values": cache}
    # Only the rest's own domains: the bridge is not run again for every row.
    return ModelCall(replace(token_map, present=start.own_domains), _accepted(base, {**arguments, "use_cache": False}), start.own_source, start.own_target)


def _attention(base: Any, batch: Batch, start: int) -> Any:
    """int64 [B, T]: 1 where a token is none of the padding; where rows are packed, what each of the tokens from `start` on may read."""
    if batch.segment is None:
        return batch.attention_mask
    is_padding = batch.attention_mask == 0
    implementation = base.config._attn_implementation
    return packed_attention(implementation, windows(base.config), batch.segment, is_padding, batch.position, base.dtype, start, batch.picture)


def _accepted(base: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without position ids, where the model takes none: it counts distances."""
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    return {name: value for name, value in arguments.items() if name != "position_ids" or takes_positions}
