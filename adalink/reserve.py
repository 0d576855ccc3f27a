"""Slots of each row's own adapter, put into a batch of plain ids: rows served by other adapters have others, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adalink.edit import Slots
from adalink.errors import ConfigError
from adalink.tokens import IMAGE, PAD, PERCEPT

__all__ = ["Reserved"]


class Reserved:
    """Where slots and tokens of a batch are once every row has the slots of its own adapter.

    Slots come right before a row's first real token, after its padding. Rows with fewer slots are filled up on the right to be read
    (each then has the positions that it has alone), on the left to generate (where the next token must follow the last one).

        mask [0 1 1], 1 slot S;  mask [1 1 1], 2 slots      left:  [. . S a b]  [S S a b c]
                                                            right: [. S a b .]  [S S a b c]
    """

    def __init__(self, mask: Tensor, slots: Sequence[Sequence[Slots]], side: Literal["left", "right"]) -> None:
        """`mask`: int64 [B, T], 1 where a token is real; `slots`: what the adapter of each row reserves."""
        kinds = [[slot.domain for slot in row for _ in range(slot.count)] for row in slots]
        if any(domain in row for row in kinds for domain in (IMAGE, PERCEPT)):
            raise ConfigError(
                "an adapter with a bridge or with percepts needs pictures, and plain ids bring none: use a model composed with a vision tower, "
                "or pass a token_map"
            )
        n_slots = max((len(row) for row in kinds), default=0)
        device = mask.device
        self.n_tokens, self.n_slots = mask.shape[1], n_slots
        self.domains = torch.tensor([row + [PAD] * (n_slots - len(row)) for row in kinds], dtype=torch.int64, device=device)
        self.count = torch.tensor([[len(row)] for row in kinds], dtype=torch.int64, device=device)
        self.first = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1]
        place = torch.arange(self.n_tokens + n_slots, device=device) - (n_slots - self.count if side == "left" else 0)
        self.ordinal = place - self.first
        self.is_slot = (self.ordinal >= 0) & (self.ordinal < self.count)
        column = torch.where(self.ordinal < 0, place, place - self.count)
        self.is_token = ~self.is_slot & (column >= 0) & (column < self.n_tokens)
        self.column = column.clamp(0, self.n_tokens - 1)
        own = torch.arange(self.n_tokens, device=device)
        self.place = own + (n_slots - self.count if side == "left" else 0) + self.count * (own >= self.first)

    def widened(self, value: Tensor, slot: int | Tensor, padding: int) -> Tensor:
        """[B, T] -> [B, T + S]: `slot` (one value, or [B, T + S]) at the slots, `padding` where a row was filled up."""
        moved = torch.take_along_dim(value, self.column, 1)
        filler = torch.where(self.is_slot, torch.as_tensor(slot, dtype=value.dtype, device=value.device), padding)
        return torch.where(self.is_token, moved, filler.to(value.dtype))

    def widened_domains(self, domain: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T + S]: the slots have their own domains."""
        if not self.n_slots:
            return domain
        return self.widened(domain, torch.take_along_dim(self.domains, self.ordinal.clamp(0, self.n_slots - 1), 1), PAD)

    def widened_positions(self, position: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T + S]: the first slot takes the position of the row's first token, and what follows moves on."""
        start = torch.take_along_dim(position, self.first.clamp(max=self.n_tokens - 1), 1)
        own = torch.arange(self.n_tokens, device=position.device)
        return self.widened(position + self.count * (own >= self.first), start + self.ordinal, 0)

    def own(self, value: Tensor) -> Tensor:
        """[B, T + S, ...] -> [B, T, ...]: what stands at the row's own tokens; with beams B is a multiple of the rows."""
        place = self.place.to(value.device).repeat_interleave(len(value) // len(self.place), 0)
        return torch.take_along_dim(value, place.view(*place.shape, *[1] * (value.ndim - 2)), 1)
