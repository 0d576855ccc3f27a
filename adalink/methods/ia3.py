"""IA3 (arXiv 2205.05638), with a group of gains for each token domain as Context-PEFT has it (arXiv 2312.08900).

    keys and values   y = g * (W x + b)
    feed-forward      y = W (g * x) + b         at its down projection
    g = product over groups of (1 + m l)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Placement, Port, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.targets import TokenDropout, added, checked_groups, domains_of, dropouts, every_token, find_targets
from adalink.tokens import Tokens, without_autocast

__all__ = ["IA3", "Gain"]


class Gain(nn.Module):
    """h * (1 + gain) in features [start, start + width) of n. It starts as the identity: the gain is zero."""

    def __init__(self, n: int, start: int, width: int, dropout: TokenDropout) -> None:
        super().__init__()
        self.around, self.dropout = (start, n - start - width), dropout
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h * (1 + nn.functional.pad(self.dropout(self.gain, tokens), self.around))

    def joins(self, other: object) -> bool:
        """Whatever its features."""
        return isinstance(other, Gain)

    def joint(self, edits: Sequence[Gain], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Each token's shares of all gains as one product, and h scaled once. See `adalink.edit.Joint`."""
        shares = [edit.dropout(share, tokens) for edit, share in zip(edits, shares, strict=True)]
        with without_autocast(h.device):  # 1 + gain needs the gain's own digits
            one = shares[0].new_ones(1, 1, 1).expand(*h.shape)
            return h * added(one, shares, [nn.functional.pad(edit.gain[None], edit.around) for edit in edits])


@dataclass(frozen=True, kw_only=True)
class IA3:
    """Trained gains of keys, values and the feed-forward's inner features; one set for each group of token domains."""

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=every_token)  # domains of each: text (prompt, answer), image, all, answer, prompt, prefix
    attention: tuple[str, ...] = ("key", "value")  # linears whose outputs are scaled: last path components, or query, key, value
    feed_forward: tuple[str, ...] = ("down",)  # linears whose inputs are scaled: last path components, or down
    exclude: tuple[str, ...] = ()  # linears that are left alone, named as targets are
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    dropout: float | Mapping[str, float] = 0.0  # share of a group's tokens without its change, drawn once for all layers

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "IA3's")
        object.__setattr__(self, "groups", checked_groups("IA3", self.groups))
        dropouts("IA3", self.dropout, self.groups)
        if not self.attention and not self.feed_forward:
            raise ConfigError("IA3 scales neither attention nor feed_forward: name linears for one of them, for instance attention=('key', 'value')")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One gain for each group and linear: at the output of `attention`, at the input of `feed_forward`."""
        outputs = find_targets(anatomy, self.attention, self.exclude, self.exclude_layers) if self.attention else ()
        inputs = find_targets(anatomy, self.feed_forward, self.exclude, self.exclude_layers) if self.feed_forward else ()
        by_group = dropouts("IA3", self.dropout, self.groups)
        placed = []
        for group, names in self.groups.items():
            dropout, domains = by_group[group], domains_of(names)
            for target in outputs:
                gain = Gain(target.linear.n_out, target.start, target.width, dropout)
                placed.append(Placement(f"{group}.{target.role}", Port(target.linear.name, "output"), gain, domains))
            for target in inputs:
                gain = Gain(target.linear.n_in, 0, target.linear.n_in, dropout)
                placed.append(Placement(f"{group}.{target.role}", Port(target.linear.name, "input"), gain, domains))
        return placed
