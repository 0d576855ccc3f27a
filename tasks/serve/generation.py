"""A batch that begins and ends together: beams, and models whose rows cannot come and go (see `tasks.serve.running`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adalink import TokenMap
from adalink.recompute import needs_whole_sequence
from multimodal.batch import Batch
from multimodal.generate import GenerationSettings, run_generation
from multimodal.model import VisionLanguageModel
from tasks.serve.job import Job
from tasks.serve.row import JobRow
from tasks.serve.sampling import DrawnRows

__all__ = ["run_beams", "run_greedy"]


class _Rows(StoppingCriteria):  # type: ignore[misc]  # untyped here
    """Gives each row its new token, and ends the rows that have ended or that nobody waits for."""

    def __init__(self, rows: Sequence[JobRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """bool [B]: which rows have ended"""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        return torch.tensor([row.has_ended for row in self.rows], dtype=torch.bool, device=input_ids.device)


def run_greedy(model: VisionLanguageModel, batch: Batch, token_map: TokenMap, jobs: Sequence[Job]) -> None:
    """Generate step by step, and tell each its answer: the tokens that `VisionLanguageModel.generate` gives."""
    asks, rows = [job.ask for job in jobs], [JobRow(job, model.language, n_rows=len(jobs)) for job in jobs]
    with model.adapted.attachment.bind(token_map):
        run_generation(
            model.language,
            batch,
            GenerationSettings(max_new_tokens=max(ask.settings.max_new_tokens for ask in asks)),
            use_cache=not needs_whole_sequence(model.adapted.attachment, token_map),
            stopping=StoppingCriteriaList([_Rows(rows)]),
            processors=LogitsProcessorList([DrawnRows([ask.sampling for ask in asks])] if any(ask.sampling for ask in asks) else []),
        )


def run_beams(model: VisionLanguageModel, batch: Batch, jobs: Sequence[Job]) -> None:
    """Tell each job the text that `VisionLanguageModel.generate_batch` gives, with beams that are the same for all."""
    rows = [JobRow(job, model.language, n_rows=len(jobs)) for job in jobs]
    for row, text in zip(rows, model.generate_batch(batch, jobs[0].ask.settings, [job.ask.adapter for job in jobs]), strict=True):
        row.end(text)
