"""Generation as transformers 4.24 did it, the version that the eP-ALM fixtures were computed with.

Its beam search divides a text's log probability by the length of the whole sequence, prompt and padding counted; later versions
divide by what was generated, so that where prompts are padded or long another beam may win. Greedy is a search with one beam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["search"]

Step = Callable[[Tensor, Tensor], Tensor]
"""ids [B * beams, T], mask [B * beams, T] -> logits [B * beams, V] of the next token."""


@dataclass
class Hypotheses:
    """The best finished texts of one row."""

    n_beams: int
    penalty: float
    stops_early: bool
    held: list[tuple[float, Tensor]] = field(default_factory=list)
    is_done: bool = False

    def add(self, ids: Tensor, log_probability: float) -> None:
        score = log_probability / len(ids) ** self.penalty
        if len(self.held) < self.n_beams or score > self.worst:
            self.held.append((score, ids.clone()))
            self.held.sort(key=lambda item: item[0])
            self.held = self.held[-self.n_beams :]

    @property
    def worst(self) -> float:
        return self.held[0][0] if self.held else 1e9

    def settle(self, best_log_probability: float, length: int) -> None:
        """Done once enough are held (where it stops early), or no beam that goes on can become better than the worst of them."""
        full = len(self.held) == self.n_beams
        self.is_done = self.is_done or (full and self.stops_early) or (full and self.worst >= best_log_probability / length**self.penalty)


def search(
    step: Step, ids: Tensor, mask: Tensor, *, beams: int, max_length: int, end: int, pad: int, penalty: float, stops_early: bool = False
) -> tuple[Tensor, Tensor]:
    """ids [B, T'], prompt first and padded; score [B] of each. One beam is greedy search: its score is 0."""
    if beams == 1:
        return _greedy(step, ids, mask, max_length, end, pad), torch.zeros(len(ids))
    rows = [Hypotheses(beams, penalty, stops_early) for _ in ids]
    ids, mask = ids.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1), dtype=torch.float64).repeat(len(rows))
    while ids.shape[1] < max_length and not all(row.is_done for row in rows):
        log_probability = torch.log_softmax(step(ids, mask), -1) + scores[:, None]
        n_words = log_probability.shape[1]
        best, flat = log_probability.view(len(rows), -1).topk(2 * beams, dim=1)
        chosen = [_next(row, i * beams, ids, best[i], flat[i], n_words, end, pad) for i, row in enumerate(rows)]
        source, token, score = (list(column) for column in zip(*(item for row in chosen for item in row), strict=True))
        for i, row in enumerate(rows):
            row.settle(float(best[i].max()), ids.shape[1])
        scores = torch.tensor(score, dtype=torch.float64)
        ids = torch.cat([ids[source], torch.tensor(token)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    for i, row in enumerate(rows):
        if not row.is_done:
            for j in range(i * beams, (i + 1) * beams):
                row.add(ids[j], float(scores[j]))
    return _filled([row.held[-1] for row in rows], max_length, end, pad)


def _next(
    row: Hypotheses, first: int, ids: Tensor, best: Tensor, flat: Tensor, n_words: int, end: int, pad: int
) -> list[tuple[int, int, float]]:
    """(beam it continues, token, score) of the beams that go on."""
    if row.is_done:
        return [(first, pad, 0.0)] * row.n_beams
    going: list[tuple[int, int, float]] = []
    for rank, (score, index) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
        beam, token = first + index // n_words, index % n_words
        if token != end:
            going.append((beam, token, score))
        elif rank < row.n_beams:
            row.add(ids[beam], score)
        if len(going) == row.n_beams:
            break
    return going


def _filled(best: list[tuple[float, Tensor]], max_length: int, end: int, pad: int) -> tuple[Tensor, Tensor]:
    length = min(max(len(ids) for _, ids in best) + 1, max_length)
    result = torch.full((len(best), length), pad)
    for i, (_, ids) in enumerate(best):
        result[i, : len(ids)] = ids
        if len(ids) < length:
            result[i, len(ids)] = end
    return result, torch.tensor([score for score, _ in best], dtype=torch.float64)


def _greedy(step: Step, ids: Tensor, mask: Tensor, max_length: int, end: int, pad: int) -> Tensor:
    is_going = torch.ones(len(ids), dtype=torch.bool)
    while ids.shape[1] < max_length and is_going.any():
        token = torch.where(is_going, step(ids, mask).argmax(-1), pad)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        is_going &= token != end
    return ids
