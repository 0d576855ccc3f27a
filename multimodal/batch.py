"""Rows of several pictures, padded into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from adalink import PAD
from multimodal.beginning import Beginning, beginning_of
from multimodal.encode import Row
from multimodal.packed_mask import additive

__all__ = ["NO_TARGET", "Batch", "collate"]

NO_TARGET = -100  # torch's cross entropy ignores it


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows about I pictures; a picture with five captions is encoded once.

    ids          int64 [B, T]
    domain       int64 [B, T]        PAD for padding
    source       int64 [B, M]        position of the hidden state that predicts ...
    target       int64 [B, M]        ... this id; NO_TARGET for padding. Explicit pairs, so that one row may hold several texts
    image        int64 [B]           which picture the row, or the first part of it, is about
    pixels       float [I, 3, H, W]  the pictures, or
    patches      float [I, N + L, Dv]  their features, where they are kept: patches, then the pooled vector of each block (or none), or
    taps         float [I, L, Dv]    pooled vectors alone, of the last blocks
    decoder_ids  int64 [B, U]        encoder-decoder models only; sources are positions in it
    position     int64 [B, T]        each token's position in its own text, padding skipped
    segment      int64 [B, T]        which of several packed texts about its picture a token belongs to; None where no row is packed
    picture      int64 [B, T]        which picture a token is about; None where each row is about one
    beginning    what the rows begin with, where that can be read in a call of its own
    score        float [B, M]        where a head chooses the answer: what each target, the number of an answer, would score; padding too
    n_targets    what the loss is divided by; the batch's own number of targets (of rows, where a head chooses) unless a training loop knows better
    keys         of the I pictures
    """

    ids: Tensor
    domain: Tensor
    source: Tensor
    target: Tensor
    image: Tensor
    n_targets: float
    position: Tensor
    segment: Tensor | None = None
    picture: Tensor | None = None
    beginning: Beginning | None = None
    pixels: Tensor | None = None
    patches: Tensor | None = None
    taps: Tensor | None = None
    decoder_ids: Tensor | None = None
    score: Tensor | None = None
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in own.items() if isinstance(value, Tensor | Beginning)}
        return replace(self, **moved)

    @property
    def attention_mask(self) -> Tensor:
        """int64 [B, T]: 1 for every token that is not padding."""
        return (self.domain != PAD).long()

    def attention(self, dtype: torch.dtype) -> Tensor:
        """The mask that a model without windows takes: int64 [B, T], or additive [B, 1, T, T] where rows are packed."""
        return self.attention_mask if self.segment is None else additive(self.segment, self.domain == PAD, dtype, picture=self.picture)


def collate(
    rows: Sequence[Row],
    image: Sequence[int],
    pictures: Tensor,
    *,
    kind: Literal["pixels", "patches", "taps"],
    side: Literal["left", "right"],
    pad_id: int,
    keys: Sequence[str] = (),
) -> Batch:
    """Pad rows into a batch: on the right to learn, on the left to generate, where the next token must follow the last one."""
    length = max(len(row.ids) for row in rows)
    left = [length - len(row.ids) if side == "left" else 0 for row in rows]
    # With a decoder, sources are positions in decoder_ids, which start at the left on either side.
    shift = [0 if row.decoder_ids else offset for row, offset in zip(rows, left, strict=True)]
    scores = [row.score for row in rows if row.score is not None]
    return Batch(
        ids=_padded([row.ids for row in rows], pad_id, left),
        domain=_padded([row.domain for row in rows], PAD, left),
        source=_padded([tuple(s + offset for s in row.source) for row, offset in zip(rows, shift, strict=True)], 0),
        target=_padded([row.target for row in rows], NO_TARGET),
        image=torch.tensor(image, dtype=torch.int64),
        n_targets=sum(len(row.target) if row.score is None else 1 for row in rows),
        pixels=pictures if kind == "pixels" else None,
        patches=pictures if kind == "patches" else None,
        taps=pictures if kind == "taps" else None,
        position=_padded([row.position or tuple(range(len(row.ids))) for row in rows], 0, left),
        segment=_padded([row.segment or (0,) * len(row.ids) for row in rows], 0, left) if any(row.segment for row in rows) else None,
        picture=_padded([row.picture for row in rows], 0, left) if rows[0].picture else None,
        beginning=beginning_of(rows, image) if side == "right" else None,
        decoder_ids=_padded([row.decoder_ids for row in rows], pad_id) if rows[0].decoder_ids else None,
        score=_padded(scores, 0, dtype=torch.float32) if scores else None,
        keys=tuple(keys),
    )


def _padded(rows: Sequence[tuple[float, ...]], value: int, left: Sequence[int] | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
    """[len(rows), longest]: each row after `left` values of padding (none by default), the rest padding too."""
    result = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=dtype)
    for i, row in enumerate(rows):
        start = left[i] if left else 0
        result[i, start : start + len(row)] = torch.tensor(row, dtype=dtype)
    return result
