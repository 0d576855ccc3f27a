"""Several texts about one picture in one row: the picture is read once, and each text sees it and itself alone.

A picture of 256 tokens with five captions of twelve costs 316 tokens instead of 1,340. Loss and gradients equal those of separate
rows: attention is told by a 4D mask which tokens a text may see, and positions restart after what the texts share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adalink import Adapter
from adalink.recompute import reads_later_tokens
from multimodal.encode import Row

__all__ = ["PACKING_FAMILIES", "Arrange", "arrangement", "pack_rows", "packed_mask", "separate_rows"]

Arrange = Callable[[Sequence[Row]], Sequence[Row]]
"""From the rows of one sample to the rows that are trained on."""

# Families that take a 4D mask with position_ids, each proven equal in tests/multimodal/test_packing.py. In others a 4D mask may be
# refused (Bloom) or be silently wrong (MPT), so nothing is packed there.
PACKING_FAMILIES = frozenset({"opt", "gpt2", "llama", "qwen2"})


def arrangement(model: Any, adapter: Adapter | None = None) -> tuple[Arrange, str]:
    """How this language model's rows are arranged for an adapter, and a line for the log that says so."""
    if adapter is not None and reads_later_tokens(adapter):
        return separate_rows, "one row per text: a slot of the adapter reads later tokens, or a gate the row, and would read every text of a packed row"
    config = model.config
    sliding = getattr(config, "use_sliding_window", False)
    if config.model_type in PACKING_FAMILIES and not sliding and config._attn_implementation in ("sdpa", "eager"):
        return pack_rows, "one row per picture: its texts share it"
    return separate_rows, f"one row per text: packing is not proven for {config.model_type} with {config._attn_implementation} attention"


def separate_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows as they are."""
    return rows


def pack_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """One row that holds the common beginning of the rows once, and then what is left of each.

    [a b c], [a b d] with sources on b -> [a b c d], segments [0 0 1 2], positions [0 1 2 2].
    """
    if len(rows) == 1:
        return rows
    shared = _shared(rows)
    ids, domain, segment, position = list(rows[0].ids[:shared]), list(rows[0].domain[:shared]), [0] * shared, list(range(shared))
    source: list[int] = []
    for number, row in enumerate(rows, start=1):
        offset = len(ids) - shared
        source += [s if s < shared else s + offset for s in row.source]
        ids += row.ids[shared:]
        domain += row.domain[shared:]
        segment += [number] * (len(row.ids) - shared)
        position += range(shared, len(row.ids))
    target = tuple(t for row in rows for t in row.target)
    return [Row(tuple(ids), tuple(domain), tuple(source), target, segment=tuple(segment), position=tuple(position))]


def packed_mask(segment: Tensor, is_padding: Tensor, dtype: torch.dtype) -> Tensor:
    """float [B, 1, T, T]: 0 where a token may be read, the dtype's minimum elsewhere. Additive, which every attention here takes.

    segment: int64 [B, T], 0 for what all texts share. Every token sees itself, padding too: a softmax over nothing is NaN.
    """
    length = segment.shape[1]
    order = torch.arange(length, device=segment.device)
    is_earlier = order[:, None] >= order
    is_own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    may_read = is_earlier & is_own & ~is_padding[:, None, :] | (order[:, None] == order)
    return torch.zeros_like(may_read, dtype=dtype).masked_fill(~may_read, torch.finfo(dtype).min)[:, None]


def _shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with."""
    shortest = min(len(row.ids) for row in rows)
    first = rows[0]
    for i in range(shortest):
        if any(row.ids[i] != first.ids[i] or row.domain[i] != first.domain[i] for row in rows):
            return i
    return shortest
