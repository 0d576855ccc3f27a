"""Slots that take no position: the text after them starts at 0, as it did when the frozen model was trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Port
from adalink.errors import AttachError
from adalink.tokens import PAD, Tokens, counted

__all__ = ["Uncounted", "ZeroVector", "without_positions"]


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
