"""The one thread that runs the model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adalink import BASE_NAME, TokenMap
from adalink.attachment.recompute import may_share_prompts, needs_whole_sequence, reads_later_tokens
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.tokenize import TextTooLong
from multimodal.generation.decoding import Decoding, may_decode
from multimodal.generation.generate import check_room, run_generation
from multimodal.generation.settings import GenerationSettings
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from tasks.serve.cache import FeatureLRU, Part, PromptCache
from tasks.serve.scheduler import Answer, Draw, DrawnRows, Job, Waiting
from tasks.serve.settings import Batching, RequestLimits

__all__ = ["JobRow", "Running", "Worker", "Written", "run_beams", "run_greedy"]


# ----------------------------------------
# What has been written for one row so far: its tokens, its text, and where it ends.


class Written:
    """The tokens of one row as they come.

    The text is what `VisionLanguageModel.generate` gives for the same tokens, cut before the first stop string. `fresh` gives it in
    pieces that join to the same text: whole words, because a later token may change the last one (half of a letter, a space before a mark).
    """

    def __init__(self, tokenizer: Any, max_tokens: int, stop: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
        """`ends`: the tokens that end a text, beside the tokenizer's own."""
        self.tokenizer = tokenizer
        self.ends = frozenset([tokenizer.eos_token_id, *ends])
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.ids: list[int] = []
        self.reason: Literal["stop", "length"] | None = None  # why it ended; None while it goes on
        self._sent = ""

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        if token in self.ends or (self.stop and self._stop_at(self._decoded()) is not None):
            self.reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.reason = "length"

    @property
    def text(self) -> str:
        """All that was written, up to the first stop string."""
        decoded = self._decoded()
        return decoded[: self._stop_at(decoded)].strip()

    def fresh(self) -> str:
        """What can be sent now that was not sent before; the rest, once it has ended."""
        text = self.text
        if self.reason is None:
            text = text[: self._settled(text)].rstrip()
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def _decoded(self) -> str:
        written = self.ids[:-1] if self.ids and self.ids[-1] in self.ends else self.ids
        decoded: str = self.tokenizer.decode(written, skip_special_tokens=True)
        return decoded

    def _stop_at(self, text: str) -> int | None:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found) if found else None

    def _settled(self, text: str) -> int:
        """How many characters no later token can change: none of the last word, none of what may become a stop string."""
        settled = max(text.rfind(space) for space in (" ", "\n")) + 1
        for stop in self.stop:
            starts = [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
            settled = min(settled, len(text) - max(starts, default=0))
        return settled


# ----------------------------------------
# One row of a batch: the job that it is for, and what has been written.


class JobRow:
    """Takes the tokens of a job as they come, sends what is to be sent, and tells the end.

    n_rows    of the batch, when the row came
    n_known   tokens of its prompt that were not read
    """

    def __init__(self, job: Job, language: Language, *, n_rows: int, n_known: int = 0) -> None:
        self.job = job
        self.draw = None if job.ask.sampling is None else Draw(job.ask.sampling)
        self._tokenizer, self._n_rows, self._n_known, self._started = language.tokenizer, n_rows, n_known, time.perf_counter()
        self._written = Written(language.tokenizer, job.ask.settings.max_new_tokens, job.ask.stop, language.end_ids)

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens are wanted: the text has ended, or its client has gone."""
        return self._written.reason is not None or self.job.cancelled

    def add(self, token: int) -> None:
        """Take the next token, unless the row has ended."""
        if self.has_ended:
            return
        written = self._written
        written.add(token)
        if self.job.streams and (piece := written.fresh()):
            self.job.report(piece)
        if written.reason is not None:
            self._report(written.text, written.reason, len(written.ids))

    def end(self, text: str) -> None:
        """Take a whole text. Beams do not tell how the best of them ended; a text of all its tokens was cut."""
        n_new = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.job.streams and text:
            self.job.report(text)
        self._report(text, "length" if n_new >= self.job.ask.settings.max_new_tokens else "stop", n_new)

    def _report(self, text: str, reason: str, n_new: int) -> None:
        job, now = self.job, time.perf_counter()
        self.job.report(
            Answer(
                text=text, reason=reason, n_prompt=len(job.ask.row.ids), n_known=self._n_known, n_new=n_new, waited=self._started - job.queued,
                generated=now - self._started, n_rows=self._n_rows,
            )
        )  # fmt: skip


# ----------------------------------------
# A batch that begins and ends together: beams, and models whose rows cannot come and go (see `tasks.serve.engine`).


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


# ----------------------------------------
# The batch that is running: rows of any adapters, which join and leave it between two tokens.


class Running:
    """Rows that are being written. Each is told its text as it comes and its end as it ends, and makes room for another at once."""

    def __init__(self, model: VisionLanguageModel, features: FeatureLRU, prompts: PromptCache) -> None:
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
        retained = [
            i
            for i, job in enumerate(jobs)
            if self.prompts.most and (job.ask.adapter == BASE_NAME or not reads_later_tokens(adapters[job.ask.adapter]))  # type: ignore[arg-type]
        ]
        for i, prompt in zip(retained, self._decoding.prompts(batch, retained), strict=True):
            self.prompts.add(jobs[i], prompt)

    def _batch(self, jobs: Sequence[Job]) -> Batch:
        patches, image = self.features.of([job.ask.image for job in jobs])
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


Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Worker:
    """Takes jobs from `waiting` into the running batch, between two tokens; what changes the model is run there too, on the same thread.

    So nothing is locked around the model, and no call of it ever sees an adapter come or go.
    """

    def __init__(self, model: VisionLanguageModel, batching: Batching, limits: RequestLimits, seen: Callable[[Sequence[Job]], None]) -> None:
        self.model = model
        self.waiting = Waiting(batching, self._fits)
        self.seen = seen  # called with the jobs of the running batch whenever some join it
        self.features = FeatureLRU(model, limits.cached_images, limits.feature_bytes)
        self.prompts = PromptCache(limits.prompt_bytes)
        self.running = Running(model, self.features, self.prompts)
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether batches are run."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end."""
        self.waiting.close()
        self._thread.join()

    def between_batches(self, errand: Callable[[], Result], after: str = "") -> Future[Result]:
        """The result of a function that is run on the generation thread, after the jobs of an adapter where one is named."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(errand())
            except BaseException as error:
                future.set_exception(error)

        self.waiting.put_errand(run, after)
        return future

    def join(self, jobs: Sequence[Job]) -> None:
        """Add jobs to the running batch; where that fails, they are told, and those that run already are not touched."""
        self.seen([*self.running.jobs, *jobs])
        try:
            self.running.join(jobs)
        except Exception as error:
            _failed(jobs, error)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter from the model, with what was read under it; an errand."""
        self.model.delete_adapter(name)
        self.prompts.forget(name)

    def _work(self) -> None:
        running = self.running
        while (taken := self.waiting.take(running.jobs)) is not None:
            if callable(taken):
                taken()
                continue
            if taken:
                self.join(taken)
            try:
                running.step()
            except Exception as error:
                _failed(running.jobs, error)
                running.clear()

    def _fits(self, n_prompt: int, n_new: int) -> bool:
        try:
            check_room(self.model.language, n_prompt, GenerationSettings(max_new_tokens=n_new))
        except (TextTooLong, ConfigError):
            return False
        return True


def _failed(jobs: Sequence[Job], error: Exception) -> None:
    logger.error("a batch of %d failed", len(jobs), exc_info=error)
    for job in jobs:
        job.report(error)
        job.cancelled = True  # a row that it has already goes with the next token
