"""What slots and edits do to the tokens around them: attention masks, positions, slots outside the sequence, and the lowest edit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, text_config
from adalink.edit import Adapter, Placement, Port
from adalink.errors import AttachError
from adalink.tokens import PAD, Tokens, counted

__all__ = [
    "HiddenFromReader", "HideKeys", "NoDistance", "ReadAll", "Uncounted", "ZeroVector", "check_alone", "check_attention", "check_reach",
    "depth_of", "hide_keys", "lowest_edit", "virtual_tokens", "read_all", "whole_mask", "without_positions",
]  # fmt: skip


# ----------------------------------------
# Attention masks at the mask port: which keys a token may read, changed for the slots of some domains.
#
# A mask is what the frozen model made, [B or 1, 1, T or 1, K]: bool (sdpa; True may be read), additive (eager), or None (sdpa's own skip).


SERVED = ("sdpa", "eager")  # the attention implementations whose masks can be edited


class HideKeys(nn.Module):
    """The edit at a mask port that hides the keys of its domains from every query but themselves."""

    def forward(self, mask: Tensor | None, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        return hide_keys(mask, tokens, domains, adapter)


class ReadAll(nn.Module):
    """The edit at a mask port that lets the tokens of its domains read everything after them: later text, and padding on the right."""

    def forward(self, mask: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        return read_all(mask, tokens, domains, adapter)


def hide_keys(mask: Tensor | None, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
    """The mask with the keys of `domains` hidden, on rows served by `adapter`. None means causal here.

    A hidden key still sees itself: a softmax over nothing would give NaN, which spreads through `0 * NaN`.
    """
    order = torch.arange(tokens.keys.shape[1], device=tokens.keys.device)
    is_hidden = _of(tokens.keys, domains) & (tokens.row == adapter)[:, None]  # [B, K]
    is_hidden = is_hidden[:, None, None, :] & (_queries(tokens) != order)
    if mask is None:
        mask = whole_mask(tokens, "causal")
    if mask.dtype == torch.bool:
        return mask & ~is_hidden
    return mask.masked_fill(is_hidden, torch.finfo(mask.dtype).min)


def read_all(mask: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
    """The mask with everything after them opened to the tokens of `domains`, on rows served by `adapter`.

    Padding before them stays closed: it is there in left-padded batches alone, and a text would depend on its neighbours' lengths.
    """
    order = torch.arange(tokens.keys.shape[1], device=tokens.keys.device)
    is_reader = tokens.select(domains, adapter)[:, None]  # [B, 1, T, 1]
    is_open = is_reader & (order >= _queries(tokens)) & (order < tokens.end)  # a static cache holds empty keys at the end
    return mask | is_open if mask.dtype == torch.bool else mask.masked_fill(is_open, 0.0)


def whole_mask(tokens: Tokens, attention: Literal["causal", "bidirectional"]) -> Tensor:
    """bool [1 or B, 1, T, K]: what a mask of None stands for."""
    order = torch.arange(tokens.keys.shape[1], device=tokens.keys.device)
    is_earlier = order <= _queries(tokens)
    return is_earlier if attention == "causal" else torch.ones_like(is_earlier)


def check_attention(stack: nn.Module) -> None:
    """Raise AttachError where the model's attention takes no mask that can be edited."""
    found = getattr(getattr(stack, "config", None), "_attn_implementation", None)
    if found is not None and found not in SERVED:
        raise AttachError(
            f"the model's attention is {found}, which takes no mask for each token, and this method hides or opens some: "
            f"call model.set_attn_implementation with one of {', '.join(SERVED)} before attaching"
        )


def _queries(tokens: Tokens) -> Tensor:
    """int64 [1 or B, 1, T, 1]: the place of each token in its sequence."""
    position = tokens.position if tokens.position.ndim == 2 else tokens.position[None]
    return position[:, None, :, None]


def _of(domain: Tensor, domains: tuple[int, ...]) -> Tensor:
    return torch.stack([domain == one for one in domains]).any(0)


# ----------------------------------------
# Slots that take no position: the text after them starts at 0, as it did when the frozen model was trained.


class Uncounted(nn.Module):
    """Position ids that do not count the tokens of some domains, on the rows of one adapter; those tokens themselves get 0.

    [slot, slot, text, text] at 0, 1, 2, 3 -> 0, 0, 0, 1. Padding keeps its id.

    padding_row  where the model counts from the ids (RoBERTa), tokens that hold the padding id were not counted in the first place: slots and text alike
    """

    def __init__(self, padding_row: int | None = None) -> None:
        super().__init__()
        self.padding_row = padding_row

    def forward(self, position: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        is_slot = torch.stack([tokens.keys == domain for domain in domains]).any(0)  # [B, K]
        if self.padding_row is not None and position.shape[1] == is_slot.shape[1]:
            is_slot = is_slot & (position != self.padding_row)
        place = tokens.position.expand(len(tokens.row), -1)
        before = counted(is_slot, tokens.entry).gather(1, place)  # [B, T], the token itself with them
        moved = torch.where(tokens.select(domains, adapter)[..., 0], 0, (position - before).clamp(min=0))
        is_moved = (tokens.row == adapter)[:, None] & (tokens.domain != PAD)
        if self.padding_row is not None:
            is_moved = is_moved & (position != self.padding_row)
        return torch.where(is_moved, moved, position)


class ZeroVector(nn.Module):
    """No position vector: the slot holds what its method wrote and nothing else."""

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return torch.zeros_like(h)


def without_positions(anatomy: Anatomy, domains: tuple[int, ...]) -> list[Placement]:
    """The placements that keep the tokens of `domains` out of the model's count of positions.

    A learned table (OPT, GPT-2): they get no vector. Rotations (Llama, Qwen2): they are not rotated, as at position 0. Relative
    distances (T5, Bloom): nothing to do, since text is as far from text as it was.
    Raises AttachError where positions are counted in a place that was not found.
    """
    if anatomy.positions is None:
        return []
    if not anatomy.positions.module:
        raise AttachError(
            "this model takes position ids, and neither a table nor a rotary module for them was found beside its layers: "
            "choose a prompt with positions='counted', or a model like OPT, GPT-2, Llama or Qwen2"
        )
    placed = [Placement("positions", Port(anatomy.positions.module, "position"), Uncounted(anatomy.positions.padding_row), domains)]
    if anatomy.positions.kind == "table":
        placed.append(Placement("no_vector", Port(anatomy.positions.module, "vectors"), ZeroVector(), domains))
    return placed


# ----------------------------------------
# Slots that every token may read and that are no part of the sequence: prefix tuning concatenates them to keys and values alone.
#
# The frozen model counts them nowhere: not in positions (adalink.attachment.slots), not in the distances between tokens that T5 adds to its
# scores, and not in what a decoder reads of an encoder.


class NoDistance(nn.Module):
    """Position biases that are 0 at the keys of some domains, on the rows of one adapter: a concatenated key has no distance."""

    def forward(self, bias: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        """bias: [1 or B, H, T, K] -> [B, H, T, K]."""
        return bias.masked_fill(_is_slot(tokens, domains, adapter)[:, None, None, :], 0.0)


class HiddenFromReader(nn.Module):
    """The mask of a decoder that reads an encoder's output, closed at the slots: the published encoder has none there."""

    def forward(self, mask: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        """mask: [B, K], 1 where a token may be read."""
        return mask.masked_fill(_is_slot(tokens, domains, adapter), 0)


def virtual_tokens(anatomy: Anatomy, domains: tuple[int, ...]) -> list[Placement]:
    """The placements that keep the tokens of `domains` out of the sequence. Raises AttachError where positions are counted out of reach."""
    distances = dict.fromkeys(one.distances for one in anatomy.projections if one.distances)
    return [
        *without_positions(anatomy, domains),
        *(Placement(f"no_distance{i}", Port(module, "distances"), NoDistance(), domains) for i, module in enumerate(distances)),
        *([Placement("hidden_from_reader", Port("", "reader"), HiddenFromReader(), domains)] if anatomy.reader else []),
    ]


def check_reach(stack: nn.Module) -> None:
    """Raise AttachError where attention has a window: tokens beyond it would not read slots at the start of their row, and nobody would know."""
    config = text_config(getattr(stack, "config", None))
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise AttachError(
            f"this model's attention sees {window} tokens back, and every token must read a prefix, which is at the start of the row: "
            "use Prompt, or a model without a sliding window"
        )


def _is_slot(tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
    """bool [B, K]"""
    return torch.stack([tokens.keys == domain for domain in domains]).any(0) & (tokens.row == adapter)[:, None]


# ----------------------------------------
# How deep an adapter begins: below its lowest edit, hidden states depend on the tokens alone, whatever is trained.


# Edits without trained weights that read no image: domains alone decide what they do.
FIXED = (HideKeys, Uncounted, ZeroVector)


def lowest_edit(anatomy: Anatomy, adapter: Adapter) -> tuple[int, Placement]:
    """The number of the lowest layer that the adapter acts in, and the edit that does: -1 before the layers, as many as there are after them.

    What hides a slot and keeps it out of the count of positions is passed over. eP-ALM in the layers 6 to 12 -> 6, and its first tap.
    """
    found = [(depth_of(anatomy, placement.port), placement) for placement in adapter.placements if not isinstance(placement.edit, FIXED)]
    return min(found, key=lambda one: one[0])


def depth_of(anatomy: Anatomy, port: Port) -> int:
    """The number of the layer that a port is in: -1 before the layers, as many as there are at the final norm."""
    if port.module == anatomy.final_norm:
        return len(anatomy.layers)
    return next((number for number, layer in enumerate(anatomy.layers) if f"{port.module}.".startswith(f"{layer}.")), -1)


def check_alone(adapter: Adapter) -> None:
    """Raise AttachError where another method of the adapter edits inside the layers, which pass no gradient back."""
    own = next((placement.role.split(".")[0] for placement in adapter.placements if placement.port.side == "detached"), None)
    for placement in adapter.placements if own is not None else ():
        method = placement.role.split(".")[0]
        if method != own and not isinstance(placement.edit, FIXED) and depth_of(adapter.anatomy, placement.port) >= 0:
            raise AttachError(
                f"{own} passes no gradient through the frozen layers, and {method} of the same adapter edits inside them, so it would not be trained: "
                "give it an adapter of its own, or choose a method at the embedding (AdaLink, DePT, a prompt, a bridge)"
            )
