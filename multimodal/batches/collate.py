"""Rows of several images, padded into tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adalink import PAD
from adalink.attachment.existing import NO_LABEL
from multimodal.batches.prepared import ImageBatch, Prepared, placed
from multimodal.batches.tokenize import Row

__all__ = ["FLEX", "NO_TARGET", "Batch", "SharedPrefix", "additive", "shared_prefix_of", "block_mask", "collate", "packed_attention", "stacked"]


# ----------------------------------------
# What the rows about an image begin with, read in a call of its own: once for all of them, or without gradient where nothing learns there.


@dataclass(frozen=True, kw_only=True)
class SharedPrefix:
    """The first `length` tokens of every row of a batch, alike in all rows about an image, and the targets of both parts of the rows.

    first            int64 [I]      the row that each image's prefix is taken from
    which            int64 [B]      the prefix of each row, counted in `first`
    each             how many rows every prefix has; None where they differ
    source, target   int64 [I, M]   what the prefixes predict, for all rows of their image; as in Batch
    own_source, own_target   int64 [B, M]   what the rest of each row predicts; positions are counted from `length`
    domains, own_domains     the domains that occur in the prefixes, and in the rest
    """

    length: int
    first: Tensor
    which: Tensor
    each: int | None
    source: Tensor
    target: Tensor
    own_source: Tensor
    own_target: Tensor
    domains: frozenset[int]
    own_domains: frozenset[int]

    @property
    def is_shared(self) -> bool:
        """Whether any prefix is that of several rows."""
        return len(self.first) < len(self.which)

    def to(self, device: torch.device) -> SharedPrefix:
        """The same on a device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: placed(value, device) for name, value in own.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def shared_prefix_of(rows: Sequence[Row], image: Sequence[int]) -> SharedPrefix | None:
    """The prefix of right-padded rows, as long as the shortest of their own. None where one of them has none.

    It ends inside no block, whose tokens read later ones: those of all rows' images, where an image is one.
    """
    length = min(row.shared_prefix for row in rows)
    while length and any(0 <= row.block[length - 1] == row.block[length] for row in rows if row.block[length:]):
        length -= 1
    if not length:
        return None
    images = list(dict.fromkeys(image))
    first = [list(image).index(number) for number in images]
    which = [images.index(number) for number in image]
    assert all(row.ids[:length] == rows[first[i]].ids[:length] for i, row in zip(which, rows, strict=True))
    pairs = [list(zip(row.source, row.target, strict=True)) for row in rows]
    shared = [[pair for i, own in zip(which, pairs, strict=True) if i == n for pair in own if pair[0] < length] for n in range(len(first))]
    rest = [[(source - length, target) for source, target in own if source >= length] for own in pairs]
    source, target = _columns(shared)
    own_source, own_target = _columns(rest)
    return SharedPrefix(
        length=length,
        first=torch.tensor(first),
        which=torch.tensor(which),
        each=len(rows) // len(first) if which == sorted(which) and len({which.count(n) for n in which}) == 1 else None,
        source=source,
        target=target,
        own_source=own_source,
        own_target=own_target,
        domains=frozenset().union(*(row.domain[:length] for row in rows)),
        own_domains=frozenset().union(*(row.domain[length:] for row in rows)),
    )


def _columns(pairs: Sequence[Sequence[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Sources and targets, int64 [rows, longest] each; padding is source 0 without a target."""
    sources = [torch.tensor([source for source, _ in row], dtype=torch.int64) for row in pairs]
    targets = [torch.tensor([target for _, target in row], dtype=torch.int64) for row in pairs]
    return pad_sequence(sources, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=NO_LABEL)


# ----------------------------------------
# What a token of a packed row may read: what its text shares with the others about its image, and its own text before it.


ALIGNED = 8  # numbers: torch's mem_eff_alignment


def additive(
    segment: Tensor,
    is_padding: Tensor,
    dtype: torch.dtype,
    *,
    token_image: Tensor | None = None,
    position: Tensor | None = None,
    window: int | None = None,
    start: int = 0,
    block: Tensor | None = None,
) -> Tensor:
    """float [B, 1, T - start, T]: 0 where a token from `start` on may read another, the dtype's minimum elsewhere.

    Not boolean: eager attention would add 0 and 1 to its scores, and torch's kernels make a float mask of a boolean one anew in each layer. On a
    GPU rows lie a multiple of 8 numbers apart in memory, without which the memory-efficient kernel copies the mask in each layer. Every token
    reads itself, padding too: a softmax over nothing is NaN.

    segment           int64 [B, T]: 0 for what all texts about an image share
    image           int64 [B, T]: which image each token is about; None where each row is about one
    position, window  int64 [B, T]: each token's place in its own text; a token reads `window` places back, itself among them
    block             int64 [B, T]: tokens of one block read each other, later ones too (an image's, in Gemma 3); -1 for those of none. A window
                      limits how far back they read, as for all tokens
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    may_read = (order[start:, None] >= order) & ((segment[:, None, :] == 0) | (segment[:, start:, None] == segment[:, None, :]))
    if block is not None:
        may_read = may_read | ((block[:, start:, None] == block[:, None, :]) & (block[:, None, :] >= 0) & (segment[:, start:, None] == segment[:, None, :]))
    may_read = may_read & ~is_padding[:, None, :]
    if token_image is not None:
        may_read = may_read & (token_image[:, start:, None] == token_image[:, None, :])
    if window is not None and position is not None:
        may_read = may_read & (position[:, start:, None] - position[:, None, :] < window)
    may_read = may_read | (order[start:, None] == order)
    n_rows, n_queries, length = may_read.shape
    spare = -length % ALIGNED if segment.device.type != "cpu" else 0
    mask = torch.zeros(n_rows, n_queries, length + spare, dtype=dtype, device=segment.device)[..., :length]
    return mask.masked_fill_(~may_read, torch.finfo(dtype).min)[:, None]


def block_mask(
    segment: Tensor,
    is_padding: Tensor,
    *,
    position: Tensor,
    token_image: Tensor | None = None,
    window: int | None = None,
    start: int = 0,
    block: Tensor | None = None,
) -> Any:
    """The same as a BlockMask [B, 1, T - start, T] for flex attention, which skips blocks that nothing reads and needs a GPU to learn."""
    from torch.nn.attention.flex_attention import create_block_mask  # late: it loads the compiler

    about = torch.zeros_like(segment) if token_image is None else token_image
    both_ways = torch.full_like(segment, -1) if block is None else block

    def may_read(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + start
        is_same_text = segment[b, k] == segment[b, q]
        own = (q > k) & ((segment[b, k] == 0) | is_same_text)
        own = own | ((both_ways[b, k] == both_ways[b, q]) & (both_ways[b, k] >= 0) & is_same_text)
        near = position[b, q] - position[b, k] < (window or segment.shape[1])
        return (q == k) | (own & (about[b, k] == about[b, q]) & near & ~is_padding[b, k])

    n_rows, length = segment.shape
    return create_block_mask(may_read, n_rows, None, length - start, length, device=segment.device)


FLEX = "flex_attention"


def packed_attention(
    implementation: str,
    windows: Mapping[str, int | None],
    segment: Tensor,
    is_padding: Tensor,
    position: Tensor,
    dtype: torch.dtype,
    start: int = 0,
    token_image: Tensor | None = None,
    block: Tensor | None = None,
) -> Any:
    """What the model takes as `attention_mask`: one mask, or one for each kind of layer where kinds have names.

    windows: kind of layer -> how far it reads back; {"": None} where all layers are alike
    """
    masks: dict[str, Any] = {
        kind: block_mask(segment, is_padding, position=position, token_image=token_image, window=window, start=start, block=block)
        if implementation == FLEX
        else additive(segment, is_padding, dtype, token_image=token_image, position=position, window=window, start=start, block=block)
        for kind, window in windows.items()
    }
    return masks.get("", masks)


NO_TARGET = -100  # torch's cross entropy ignores it


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows about I images; an image with five captions is encoded once.

    ids          int64 [B, T]
    domain       int64 [B, T]        PAD for padding
    source       int64 [B, M]        position of the hidden state that predicts ...
    target       int64 [B, M]        ... this id; NO_TARGET for padding. Explicit pairs, so that one row may hold several texts
    image        int64 [B]           which image the row, or the first part of it, is about
    pixels       float [I, 3, H, W]  the images, or
    patches      float [I, N + L, Dv]  their features, where they are cached: patches, then the pooled vector of each block (or none), or
    taps         float [I, L, Dv]    pooled vectors alone, of the last blocks
    decoder_ids  int64 [B, U]        encoder-decoder models only; sources are positions in it
    position     int64 [B, T]        each token's position in its own text, padding skipped
    segment      int64 [B, T]        which of several packed texts about its image a token belongs to; None where no row is packed
    token_image  int64 [B, T]        which image a token is about; None where each row is about one
    shared_prefix  the first tokens of the rows, where they can be read in a call of their own
    prepared     the images of an existing model, one entry for each of I, in the place of pixels or their features
    vector       int64 [B, T]        which of the vectors of `prepared`, joined, a token takes; -1 for none
    kind         int64 [B, T]        the processor's token types, where it gives them
    block        int64 [B, T]        tokens of one block read each other, later ones too; -1 for those of none; None where no token reads a later one
    rope         int64 [3, B, T]     positions in time, height and width; None where the model counts tokens
    weight       float [B, M]        of each target in the loss; None where all are 1
    score        float [B, M]        where a head chooses the answer: what each target, the number of an answer, would score; padding too
    n_targets    what the loss is divided by; the batch's own number of targets (of rows, where a head chooses) unless a training loop knows better
    keys         of the I images
    tasks        of the B rows, where they are named; empty where none is
    is_padded    whether a row is known to be shorter than another, without reading a tensor
    """

    ids: Tensor
    domain: Tensor
    source: Tensor
    target: Tensor
    image: Tensor
    n_targets: float
    position: Tensor
    segment: Tensor | None = None
    token_image: Tensor | None = None
    shared_prefix: SharedPrefix | None = None
    pixels: Tensor | None = None
    patches: Tensor | None = None
    taps: Tensor | None = None
    decoder_ids: Tensor | None = None
    weight: Tensor | None = None
    score: Tensor | None = None
    prepared: ImageBatch | None = None
    vector: Tensor | None = None
    kind: Tensor | None = None
    block: Tensor | None = None
    rope: Tensor | None = None
    keys: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    is_padded: bool = False

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in own.items() if isinstance(value, SharedPrefix | ImageBatch)}
        moved |= {name: placed(value, device) for name, value in own.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def attention_mask(self) -> Tensor:
        """int64 [B, T]: 1 for every token that is not padding."""
        return (self.domain != PAD).long()

    def attention(self, dtype: torch.dtype) -> Tensor:
        """The mask that a model without windows takes: int64 [B, T], or additive [B, 1, T, T] where rows are packed."""
        return self.attention_mask if self.segment is None else additive(self.segment, self.domain == PAD, dtype, token_image=self.token_image)


def collate(
    rows: Sequence[Row],
    image: Sequence[int],
    images: Tensor | ImageBatch,
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
    weights = [row.weights for row in rows] if any(row.weight for row in rows) else []
    prepared, given = (images, None) if isinstance(images, ImageBatch) else (None, images)
    return Batch(
        ids=_padded([row.ids for row in rows], pad_id, left),
        domain=_padded([row.domain for row in rows], PAD, left),
        source=_padded([tuple(s + offset for s in row.source) for row, offset in zip(rows, shift, strict=True)], 0),
        target=_padded([row.target for row in rows], NO_TARGET),
        image=torch.tensor(image, dtype=torch.int64),
        n_targets=sum(map(sum, weights)) if weights else sum(len(row.target) if row.score is None else 1 for row in rows),
        weight=_padded(weights, 0, dtype=torch.float32) if weights else None,
        pixels=given if kind == "pixels" else None,
        patches=given if kind == "patches" else None,
        taps=given if kind == "taps" else None,
        position=_padded([row.position or tuple(range(len(row.ids))) for row in rows], 0, left),
        segment=_padded([row.segment or (0,) * len(row.ids) for row in rows], 0, left) if any(row.segment for row in rows) else None,
        token_image=_padded([row.token_image for row in rows], 0, left) if rows[0].token_image else None,
        shared_prefix=shared_prefix_of(rows, image) if side == "right" and not weights else None,
        decoder_ids=_padded([row.decoder_ids for row in rows], pad_id) if rows[0].decoder_ids else None,
        score=_padded(scores, 0, dtype=torch.float32) if scores else None,
        prepared=prepared,
        vector=None if prepared is None else _padded([_vectors(row, about, prepared.starts) for row, about in zip(rows, image, strict=True)], -1, left),
        kind=_padded([row.kind for row in rows], 0, left) if prepared is not None or any(row.kind for row in rows) else None,
        block=_padded([row.block for row in rows], -1, left) if rows[0].block else None,
        rope=torch.stack([_padded([tuple(one[axis] for one in row.rope) for row in rows], 0, left) for axis in range(3)]) if rows[0].rope else None,
        keys=tuple(keys),
        tasks=tuple(row.task for row in rows) if any(row.task for row in rows) else (),
        is_padded=any(len(row.ids) < length for row in rows),
    )


def _vectors(row: Row, image: int, starts: Sequence[int]) -> tuple[int, ...]:
    """A row's vectors counted among those of the whole batch."""
    about = row.token_image or (image,) * len(row.vector)
    return tuple(vector if vector < 0 else starts[number] + vector for vector, number in zip(row.vector, about, strict=True))


def stacked(images: Sequence[Tensor | Prepared]) -> Tensor | ImageBatch:
    """The images of a batch in one: tensors of one shape, or what an existing model's processor made of each."""
    if images and isinstance(images[0], Prepared):
        return ImageBatch(samples=tuple(images))  # type: ignore[arg-type]  # all are
    return torch.stack(list(images))  # type: ignore[arg-type]


def _padded(rows: Sequence[tuple[float, ...]], value: int, left: Sequence[int] | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
    """[len(rows), longest]: each row after `left` values of padding (none by default), the rest padding too."""
    result = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=dtype)
    for i, row in enumerate(rows):
        start = left[i] if left else 0
        result[i, start : start + len(row)] = torch.tensor(row, dtype=dtype)
    return result
