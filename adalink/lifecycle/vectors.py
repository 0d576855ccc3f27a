"""Merges of weights as functions of vectors: adapters of one start, each a row of tau [n, P], what its training moved it by.

    average, task arithmetic   sums of rows
    TIES                       arXiv 2306.01708, as the authors' code trims: over the whole vector
    DARE                       arXiv 2311.03099: a random share of the entries, divided by that share
    PCB                        arXiv 2410.02396, as pcb-merging.py computes it

All in float64. P is the number of entries: the tensors sorted by name, each flattened (adalink.lifecycle.flat).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Balanced", "balanced", "by_parts", "dare_masks", "disjoint_mean", "elected_signs", "rescaled", "ties", "trimmed", "weighted"]

TAILS = 1e-4  # share of the magnitudes at either end that PCB clips


def weighted(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """[n, P] -> [P]: the sum of the rows, each times its weight."""
    return torch.tensor(weights, dtype=torch.float64) @ rows


def trimmed(tau: Tensor, keep: float) -> Tensor:
    """[n, P] -> [n, P]: each row's greatest share `keep` of magnitudes, int(P keep) + 1 entries and every tie; the others are 0."""
    n_dropped = tau.shape[1] - int(tau.shape[1] * keep)
    if n_dropped < 1:
        return tau
    least = torch.stack([row.kthvalue(n_dropped).values for row in tau.abs()])
    return torch.where(tau.abs() >= least[:, None], tau, 0.0)


def elected_signs(rows: Tensor) -> Tensor:
    """[n, P] -> [P] of -1 and 1: the sign of each entry's sum; where that is 0, the sign of most entries."""
    signs = rows.sum(0).sign()
    return torch.where(signs == 0, signs.sum().sign(), signs)


def disjoint_mean(rows: Tensor, signs: Tensor) -> Tensor:
    """[P]: each entry's mean over the rows that have the sign of `signs` there; rows of 0 do not count."""
    agreeing = torch.where(torch.where(signs > 0, rows > 0, rows < 0), rows, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def ties(tau: Tensor, keep: float) -> Tensor:
    """[n, P] -> [P]: trimmed, signs elected, the mean of those that agree."""
    rows = trimmed(tau, keep)
    return disjoint_mean(rows, elected_signs(rows))


def dare_masks(shape: torch.Size | tuple[int, int], keep: float, seed: int) -> Tensor:
    """bool [n, P]: which entries stay, each with probability `keep`."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < keep


def rescaled(tau: Tensor, masks: Tensor, keep: float) -> Tensor:
    """[n, P]: the entries that stay, divided by the share that does; their mean over draws is tau."""
    return tau * masks / keep


@dataclass(frozen=True)
class Balanced:
    """What PCB makes of n task vectors.

    merged   [P]
    scores   [n, P], 0 to 1: what each clipped entry is weighted by; 0 where it was dropped
    clipped  [n, P]: the task vectors without their extreme magnitudes
    """

    merged: Tensor
    scores: Tensor
    clipped: Tensor


def balanced(tau: Tensor, keep: float, scales: Sequence[float]) -> Balanced:
    """PCB: entries compete within each task and between the tasks, and the greatest share `keep` of each task's scores takes part.

    scales: each task's lambda. Not linear in tau: it passes a tanh.
    """
    n, size = tau.shape
    clipped = torch.stack([_clipped(row) for row in tau])
    within = torch.exp(n * _unit(clipped.abs()) ** 2)
    between = torch.tanh(tau * tau.sum(0))
    scores = within * between
    least = scores.sort(1).values[:, int(size * (1 - keep)), None]
    scores = _unit(torch.maximum(scores, least))
    merged = (scores * torch.tensor(scales, dtype=torch.float64)[:, None] * clipped).sum(0) / scores.sum(0).clamp(min=1e-12)
    return Balanced(merged, scores, clipped)


def by_parts(function: Callable[[Tensor], Tensor], tau: Tensor, parts: Iterable[slice]) -> Tensor:
    """[n, P] -> [P]: a merge of each part of the vectors by itself, put together. The parts cover P in order."""
    return torch.cat([function(tau[:, part]) for part in parts])


def _clipped(row: Tensor) -> Tensor:
    magnitudes = row.abs()
    ordered = magnitudes.sort().values
    low, high = ordered[int(len(row) * TAILS)], ordered[int(len(row) * (1 - TAILS) - 1)]
    return row.sign() * magnitudes.clamp(low, high)


def _unit(rows: Tensor) -> Tensor:
    """Each row from 0 to 1; ones where all its entries are equal."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return torch.where(high > low, (rows - low) / (high - low).clamp(min=1e-300), 1.0)
