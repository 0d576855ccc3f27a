"""Attention masks at the mask port: hide the keys of some domains from every query but themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from adalink.tokens import Tokens

__all__ = ["hide_keys"]


def hide_keys(mask: Tensor | None, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
    """The mask with the keys of `domains` hidden, on rows served by `adapter`.

    mask: what the frozen model made, [B or 1, 1, T, K]: bool (sdpa; True may be read), additive (eager), or None (sdpa's causal skip).
    A hidden key still sees itself: a softmax over nothing would give NaN, which spreads through `0 * NaN`.
    """
    n_keys = tokens.keys.shape[1]
    keys = torch.arange(n_keys, device=tokens.keys.device)
    is_self = tokens.position[:, None] == keys  # [T, K]
    is_hidden = torch.stack([tokens.keys == domain for domain in domains]).any(0) & (tokens.row == adapter)[:, None]  # [B, K]
    is_hidden = is_hidden[:, None, None, :] & ~is_self
    if mask is None:
        mask = (tokens.position[:, None] >= keys)[None, None]
    if mask.dtype == torch.bool:
        return mask & ~is_hidden
    return mask.masked_fill(is_hidden, torch.finfo(mask.dtype).min)
