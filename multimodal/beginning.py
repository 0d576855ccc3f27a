"""What the rows about a picture begin with, read in a call of its own: once for all of them, or without gradient where nothing learns there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adalink.existing import NO_LABEL

if TYPE_CHECKING:
    from multimodal.encode import Row

__all__ = ["Beginning", "beginning_of"]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The first `length` tokens of every row of a batch, alike in all rows about a picture, and the targets of both parts of the rows.

    first            int64 [I]      the row that each picture's beginning is taken from
    which            int64 [B]      the beginning of each row, counted in `first`
    each             how many rows every beginning has; None where they differ
    source, target   int64 [I, M]   what the beginnings predict, for all rows of their picture; as in Batch
    own_source, own_target   int64 [B, M]   what the rest of each row predicts; positions are counted from `length`
    domains, own_domains     the domains that occur in the beginnings, and in the rest
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
        """Whether any beginning is that of several rows."""
        return len(self.first) < len(self.which)

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Beginning:
        """The same on a device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=non_blocking) for name, value in own.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def beginning_of(rows: Sequence[Row], image: Sequence[int]) -> Beginning | None:
    """What right-padded rows begin with: as much as the shortest of their own beginnings. None where one of them has none."""
    length = min(row.beginning for row in rows)
    if not length:
        return None
    pictures = list(dict.fromkeys(image))
    first = [list(image).index(picture) for picture in pictures]
    which = [pictures.index(picture) for picture in image]
    assert all(row.ids[:length] == rows[first[i]].ids[:length] for i, row in zip(which, rows, strict=True))
    pairs = [list(zip(row.source, row.target, strict=True)) for row in rows]
    shared = [[pair for i, own in zip(which, pairs, strict=True) if i == n for pair in own if pair[0] < length] for n in range(len(first))]
    rest = [[(source - length, target) for source, target in own if source >= length] for own in pairs]
    source, target = _columns(shared)
    own_source, own_target = _columns(rest)
    return Beginning(
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
