"""The batch that is running: rows of any adapters, which join and leave it between two tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalink import BASE_NAME, TokenMap
from adalink.recompute import may_share_prompts, reads_later_tokens
from multimodal.batch import Batch, collate
from multimodal.decoding import Decoding, may_decode
from multimodal.model import VisionLanguageModel
from tasks.serve.generation import run_beams, run_greedy
from tasks.serve.job import Job
from tasks.serve.kept_features import KeptFeatures
from tasks.serve.kept_prompts import KeptPrompts, Part
from tasks.serve.row import JobRow

__all__ = ["Running"]


class Running:
    """Rows that are being written. Each is told its text as it comes and its end as it ends, and makes room for another at once."""

    def __init__(self, model: VisionLanguageModel, features: KeptFeatures, prompts: KeptPrompts) -> None:
        self.model = model
        self.features = features
        self.prompts = prompts
        self.rows: list[JobRow] = []
        self._decoding = Decoding(model.language, model.adapted.attachment)
        self._newest = torch.zeros(0, dtype=torch.long)  # int64 [B]: the token of each row that is read next

    @property
    def jobs(self) -> list[Job]:
        """Whose rows are running."""
        return [row.job for row in self.rows]

    @torch.no_grad()
    def join(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs of one kind (see `Ask.kind`) and add their rows.

        Where rows cannot come and go (beams, a model without a cache of rows), they are answered before this returns.
        """
        model = self.model
        if jobs[0].ask.settings.num_beams > 1:
            run_beams(model, self._batch(jobs), jobs)
            return
        n_rows = len(self.rows) + len(jobs)
        for part in self.prompts.parts(jobs):
            batch = self._batch(part.jobs)
            token_map = model.token_map(batch, [job.ask.adapter for job in part.jobs])
            if may_decode(model.language.model, model.adapted.attachment, token_map):
                rows = [JobRow(job, model.language, n_rows=n_rows, n_known=part.n_known(job)) for job in part.jobs]
                self._add(rows, part, batch, token_map)
            else:
                run_greedy(model, batch, token_map, part.jobs)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        self._let_go()  # clients may have gone since the last one
        if self.rows:
            self._newest = _chosen(self.rows, self._decoding.step(self._newest))
            self._let_go()

    def clear(self) -> None:
        """Let every row go."""
        self.rows, self._decoding = [], Decoding(self.model.language, self.model.adapted.attachment)

    def _add(self, rows: Sequence[JobRow], part: Part, batch: Batch, token_map: TokenMap) -> None:
        if part.known:
            scores = self._decoding.join_known(batch, token_map, part.known, part.n_last)
        else:
            scores = self._decoding.join(batch, token_map, may_share=may_share_prompts(self.model.adapted.attachment, token_map))
        newest = self._newest if self.rows else None
        self.rows += rows  # first: where anything below fails, these rows go with the next token, and the others stay
        chosen = _chosen(rows, scores)
        self._newest = chosen if newest is None else torch.cat([newest, chosen])
        if not part.known:
            self._keep_prompts(part.jobs, batch)
        self._let_go()

    def _keep_prompts(self, jobs: Sequence[Job], batch: Batch) -> None:
        adapters = self.model.adapted.adapters
        kept = [
            i
            for i, job in enumerate(jobs)
            if self.prompts.most and (job.ask.adapter == BASE_NAME or not reads_later_tokens(adapters[job.ask.adapter]))  # type: ignore[arg-type]
        ]
        for i, prompt in zip(kept, self._decoding.prompts(batch, kept), strict=True):
            self.prompts.add(jobs[i], prompt)

    def _batch(self, jobs: Sequence[Job]) -> Batch:
        patches, image = self.features.of([job.ask.picture for job in jobs])
        pad_id = self.model.language.tokenizer.pad_token_id
        return collate([job.ask.row for job in jobs], image, patches, kind=self.features.kind, side="left", pad_id=pad_id).to(self.model.device)

    def _let_go(self) -> None:
        left = [i for i, row in enumerate(self.rows) if not row.has_ended]
        if len(left) < len(self.rows):
            self._decoding.keep(left)
            self.rows, self._newest = [self.rows[i] for i in left], self._newest[left]


def _chosen(rows: Sequence[JobRow], scores: Tensor) -> Tensor:
    """int64 [B]: the next token of each row, which has it now."""
    for i, row in enumerate(rows):
        if row.draw is not None:
            scores[i] = row.draw(scores[i])
    chosen = scores.argmax(-1)
    for row, token in zip(rows, chosen.tolist(), strict=True):
        row.add(token)
    return chosen
