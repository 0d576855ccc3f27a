"""One batch of jobs through the model: rows of any adapters, each told its text as it comes and its end as it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adalink.recompute import needs_whole_sequence
from multimodal.batch import Batch, collate
from multimodal.model import VisionLanguageModel
from tasks.serve.job import Answer, Job
from tasks.serve.kept_features import KeptFeatures
from tasks.serve.sampling import DrawnRows
from tasks.serve.written import Written

__all__ = ["run_jobs"]


class _Rows(StoppingCriteria):  # type: ignore[misc]  # untyped here
    """Gives each row its new token, sends what is to be sent, and ends the rows that have ended or that nobody waits for."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Any) -> None:
        self.jobs = jobs
        self.rows = [Written(tokenizer, job.ask.settings.max_new_tokens, job.ask.stop) for job in jobs]
        self.started = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """bool [B]: which rows have ended"""
        for job, row, token in zip(self.jobs, self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.reason is None and not job.cancelled:
                row.add(token)
                if job.streams and (piece := row.fresh()):
                    job.tell(piece)
                if row.reason is not None:
                    job.tell(_answer(job, row.text, row.reason, len(row.ids), self.started, len(self.jobs)))
        done = [row.reason is not None or job.cancelled for job, row in zip(self.jobs, self.rows, strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def run_jobs(model: VisionLanguageModel, features: KeptFeatures, jobs: Sequence[Job]) -> None:
    """Generate for jobs that may go together (see `tasks.serve.waiting.chosen`), and tell each its answer."""
    started = time.perf_counter()
    patches, image = features.of([job.ask.picture for job in jobs])
    pad_id = model.language.tokenizer.pad_token_id
    batch = collate([job.ask.row for job in jobs], image, patches, kind="patches", side="left", pad_id=pad_id).to(model.device)
    names = [job.ask.adapter for job in jobs]
    if jobs[0].ask.settings.num_beams == 1:
        _step_by_step(model, batch, names, _Rows(jobs, model.language.tokenizer))
        return
    for job, text in zip(jobs, model.generate_batch(batch, jobs[0].ask.settings, names), strict=True):
        # Beams do not tell how the best of them ended; a text of all its tokens was cut.
        n_new = len(model.language.tokenizer(text, add_special_tokens=False)["input_ids"])
        if job.streams and text:
            job.tell(text)
        job.tell(_answer(job, text, "length" if n_new >= job.ask.settings.max_new_tokens else "stop", n_new, started, len(jobs)))


def _step_by_step(model: VisionLanguageModel, batch: Batch, names: Sequence[str], rows: _Rows) -> None:
    """As `VisionLanguageModel.generate_batch` without beams, watched: the same calls with the same numbers, so the same tokens."""
    language, asks = model.language, [job.ask for job in rows.jobs]
    token_map = model.token_map(batch, names)
    drawn = [DrawnRows([ask.sampling for ask in asks])] if any(ask.sampling for ask in asks) else []
    with model.adapted.attachment.bind(token_map):
        language.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max(ask.settings.max_new_tokens for ask in asks),
            do_sample=False,
            num_beams=1,
            use_cache=not needs_whole_sequence(model.adapted.attachment, token_map),
            pad_token_id=language.tokenizer.pad_token_id,
            eos_token_id=language.tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([rows]),
            logits_processor=LogitsProcessorList(drawn),
        )


def _answer(job: Job, text: str, reason: str, n_new: int, started: float, n_rows: int) -> Answer:
    return Answer(
        text=text, reason=reason, n_prompt=len(job.ask.row.ids), n_new=n_new, waited=started - job.queued,
        generated=time.perf_counter() - started, n_rows=n_rows,
    )  # fmt: skip
