"""Slots that every token may read and that are no part of the sequence: prefix tuning concatenates them to keys and values alone.

The frozen model counts them nowhere: not in positions (adalink.positions), not in the distances between tokens that T5 adds to its
scores, and not in what a decoder reads of an encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Port
from adalink.errors import AttachError
from adalink.host_config import text_config
from adalink.positions import without_positions
from adalink.tokens import Tokens

__all__ = ["HiddenFromReader", "NoDistance", "check_reach", "outside_sequence"]


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


def outside_sequence(anatomy: Anatomy, domains: tuple[int, ...]) -> list[Placement]:
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
