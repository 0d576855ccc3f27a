"""What a token of a packed row may read: what its text shares with the others about its picture, and its own text before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["additive", "block_mask", "packed_attention"]


def additive(
    segment: Tensor,
    is_padding: Tensor,
    dtype: torch.dtype,
    *,
    picture: Tensor | None = None,
    position: Tensor | None = None,
    window: int | None = None,
    start: int = 0,
) -> Tensor:
    """float [B, 1, T - start, T]: 0 where a token from `start` on may read another, the dtype's minimum elsewhere.

    Not boolean: eager attention would add 0 and 1 to its scores. Every token reads itself, padding too: a softmax over nothing is NaN.

    segment           int64 [B, T]: 0 for what all texts about a picture share
    picture           int64 [B, T]: which picture each token is about; None where each row is about one
    position, window  int64 [B, T]: each token's place in its own text; a token reads `window` places back, itself among them
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    may_read = (order[start:, None] >= order) & ((segment[:, None, :] == 0) | (segment[:, start:, None] == segment[:, None, :]))
    may_read = may_read & ~is_padding[:, None, :]
    if picture is not None:
        may_read = may_read & (picture[:, start:, None] == picture[:, None, :])
    if window is not None and position is not None:
        may_read = may_read & (position[:, start:, None] - position[:, None, :] < window)
    may_read = may_read | (order[start:, None] == order)
    return torch.zeros_like(may_read, dtype=dtype).masked_fill(~may_read, torch.finfo(dtype).min)[:, None]


def block_mask(
    segment: Tensor, is_padding: Tensor, *, position: Tensor, picture: Tensor | None = None, window: int | None = None, start: int = 0
) -> Any:
    """The same as a BlockMask [B, 1, T - start, T] for flex attention, which skips blocks that nothing reads and needs a GPU to learn."""
    from torch.nn.attention.flex_attention import create_block_mask  # late: it loads the compiler

    about = torch.zeros_like(segment) if picture is None else picture

    def may_read(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + start
        own = ((segment[b, k] == 0) | (segment[b, k] == segment[b, q])) & (about[b, k] == about[b, q])
        near = position[b, q] - position[b, k] < (window or segment.shape[1])
        return (q == k) | ((q > k) & own & near & ~is_padding[b, k])

    n_rows, length = segment.shape
    return create_block_mask(may_read, n_rows, None, length - start, length, device=segment.device)


def packed_attention(
    implementation: str,
    windows: Mapping[str, int | None],
    segment: Tensor,
    is_padding: Tensor,
    position: Tensor,
    dtype: torch.dtype,
    start: int = 0,
    picture: Tensor | None = None,
) -> Any:
    """What the model takes as `attention_mask`: one mask, or one for each kind of layer where kinds have names.

    windows: kind of layer -> how far it reads back; {"": None} where all layers are alike
    """
    masks: dict[str, Any] = {
        kind: block_mask(segment, is_padding, position=position, picture=picture, window=window, start=start)
        if implementation == "flex_attention"
        else additive(segment, is_padding, dtype, picture=picture, position=position, window=window, start=start)
        for kind, window in windows.items()
    }
    return masks.get("", masks)
