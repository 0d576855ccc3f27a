"""Attention masks at the mask port: which keys a token may read, changed for the slots of some domains.

A mask is what the frozen model made, [B or 1, 1, T or 1, K]: bool (sdpa; True may be read), additive (eager), or None (sdpa's own skip).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from adalink.errors import AttachError
from adalink.tokens import Tokens

__all__ = ["HideKeys", "ReadAll", "check_attention", "hide_keys", "read_all", "whole_mask"]

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
