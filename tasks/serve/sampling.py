"""Drawing tokens for some rows of a batch, in one operation on their device, which leaves the other rows as they are.

The largest of log p + Gumbel noise is a sample of p, exactly (Gumbel-max). The noise of a word is a function of the row's seed, of how many tokens
the row has drawn, and of the word's number: so a seed gives the same text in any company, and there is no generator to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from multimodal.batches.prepared import placed

__all__ = ["Draw", "DrawnRows", "Sampling", "drawn"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a row's tokens are drawn; with the same seed, the same text in any company."""

    temperature: float  # above 0; at 1 the model's own probabilities
    top_p: float  # 0 < p <= 1: only the most probable tokens that together have this probability
    seed: int


class Draw:
    """The draws of one row. n: how many tokens it has drawn."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.n = sampling, 0

    def next_key(self) -> int:
        """An int64 that seed and number of the draw decide; the next call gives that of the next draw."""
        key = hashlib.sha256(f"{self.sampling.seed} {self.n}".encode()).digest()[:8]
        self.n += 1
        return int.from_bytes(key, signed=True)


def drawn(scores: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """float [B, V] -> float [B, V], whose largest score in each row is the row's token; rows without a draw are not changed by one bit."""
    rows = [(i, draw) for i, draw in enumerate(draws) if draw is not None]
    if not rows:
        return scores
    numbers = placed(torch.tensor([(i, draw.next_key()) for i, draw in rows], dtype=torch.int64), scores.device)
    settings = placed(torch.tensor([(draw.sampling.temperature, draw.sampling.top_p) for _, draw in rows], dtype=torch.float32), scores.device)
    index, temperature, top_p = numbers[:, 0], settings[:, :1], settings[:, 1:]
    log_p = torch.log_softmax(scores[index].float() / temperature, -1)
    if any(draw.sampling.top_p < 1 for _, draw in rows):
        log_p = _nucleus(log_p, top_p)
    return scores.index_copy(0, index, (log_p + _gumbel(numbers[:, 1:], scores.shape[1])).to(scores.dtype))


class DrawnRows(LogitsProcessor):  # type: ignore[misc]  # untyped here
    """The same for a batch that transformers generates."""

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self.draws = [None if row is None else Draw(row) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float [B, V] -> float [B, V]"""
        return drawn(scores, self.draws)


def _nucleus(log_p: Tensor, top_p: Tensor) -> Tensor:
    """float [n, V] -> float [n, V]: -inf outside the fewest tokens whose probabilities reach the row's top_p, float [n, 1]."""
    ordered, index = log_p.sort(descending=True, stable=True)
    p = ordered.exp()
    stays = (p.cumsum(-1) - p < top_p) | (top_p >= 1)  # what stands before a token is not enough yet
    return torch.full_like(log_p, float("-inf")).scatter(-1, index, torch.where(stays, ordered, float("-inf")))


GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as an int64, and the other constants of SplitMix64 (Steele, Lea and Flood, 2014)
FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
MOST = 1 - 2**-24  # the largest float32 below 1


def _gumbel(keys: Tensor, n_words: int) -> Tensor:
    """float32 [n, V]: Gumbel noise of each word under keys, int64 [n, 1]. SplitMix64's 53 bits, whose last places are the large values' own."""
    z = keys + GOLDEN * torch.arange(1, n_words + 1, device=keys.device)
    z = (z ^ _shifted(z, 30)) * FACTORS[0]
    z = (z ^ _shifted(z, 27)) * FACTORS[1]
    uniform = (_shifted(z ^ _shifted(z, 31), 11).float() + 0.5) * 2**-53
    return -(-torch.log1p(-uniform.clamp(max=MOST))).log()


def _shifted(z: Tensor, n: int) -> Tensor:
    """int64 shifted to the right by n bits, with zeros from the left."""
    return (z >> n) & ((1 << (64 - n)) - 1)
