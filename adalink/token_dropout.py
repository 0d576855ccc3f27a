"""Dropout of a group's mask, as the released code of Context-PEFT has it: whole tokens, one draw for all layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from adalink.errors import ConfigError
from adalink.groups import per_group
from adalink.tokens import Tokens

__all__ = ["TokenDropout", "dropouts"]


class TokenDropout(nn.Module):
    """Takes a group's change from a share of the tokens, and scales the others by 1 / (1 - rate); only in training.

    One is shared by all edits of a group. The draw is kept with the call's tokens, so every layer has the same, and a layer that gradient
    checkpointing runs again has the same again.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, change: Tensor, tokens: Tokens) -> Tensor:
        """change: [B, T, D], or [D] where it is the same for every token -> the same, or [B, T, D]."""
        if not self.training or self.rate == 0:
            return change
        return change * self._share(tokens).to(change.dtype)

    def _share(self, tokens: Tokens) -> Tensor:
        """float [B, T, 1]: what is left of each token's change."""
        if self not in tokens.drawn:
            if tokens.origin is None:
                share = nn.functional.dropout(torch.ones(*tokens.domain.shape, 1, device=tokens.domain.device), self.rate)
            else:
                whole, place = tokens.origin
                share = torch.take_along_dim(self._share(whole), place[..., None], 1)
            tokens.drawn[self] = share
        return tokens.drawn[self]


def dropouts(method: str, rate: float | Mapping[str, float], groups: Iterable[str]) -> dict[str, TokenDropout]:
    """group -> its dropout. Raises ConfigError for a rate that is none."""
    rates = per_group(method, "dropout", rate, groups)
    for group, value in rates.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{method}'s dropout is {value} for the group {group}: give 0 or more and less than 1")
    return {group: TokenDropout(value) for group, value in rates.items()}
