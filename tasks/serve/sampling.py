"""Drawing tokens for some rows of a batch, which leaves the other rows as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["Draw", "DrawnRows", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a row's tokens are drawn; with the same seed, the same text in any company."""

    temperature: float  # above 0; at 1 the model's own probabilities
    top_p: float  # 0 < p <= 1: only the most probable tokens that together have this probability
    seed: int


class Draw:
    """Makes the greedy choice of one row a draw: the largest of log p + Gumbel noise is a sample of p, exactly (Gumbel-max).

    Each row has a generator of its own.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # Drawn on the CPU, so that a seed means the same text on every device.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, scores: Tensor) -> Tensor:
        """float [V] -> float [V]"""
        gumbel = -torch.empty(len(scores)).exponential_(generator=self._generator).log()
        return _nucleus(torch.log_softmax(scores / self.sampling.temperature, -1), self.sampling.top_p) + gumbel.to(scores)


class DrawnRows(LogitsProcessor):  # type: ignore[misc]  # untyped here
    """Draws for some rows of a batch that transformers generates; greedy rows of it are not changed by one bit."""

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self.draws = [(i, Draw(row)) for i, row in enumerate(rows) if row is not None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float [B, V] -> float [B, V]"""
        scores = scores.clone()
        for i, draw in self.draws:
            scores[i] = draw(scores[i])
        return scores


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """float [V] -> float [V]: -inf outside the fewest tokens whose probabilities reach top_p."""
    if top_p >= 1:
        return log_p
    ordered, index = log_p.sort(descending=True)
    p = ordered.exp()
    keep = p.cumsum(0) - p < top_p  # what stands before a token is not enough yet
    return torch.full_like(log_p, float("-inf")).scatter(0, index, torch.where(keep, ordered, float("-inf")))
