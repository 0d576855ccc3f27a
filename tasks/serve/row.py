"""One row of a batch: the job that it is for, and what has been written."""

from __future__ import annotations

import time

from multimodal.language import Language
from tasks.serve.job import Answer, Job
from tasks.serve.sampling import Draw
from tasks.serve.written import Written

__all__ = ["JobRow"]


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
            self.job.tell(piece)
        if written.reason is not None:
            self._tell(written.text, written.reason, len(written.ids))

    def end(self, text: str) -> None:
        """Take a whole text. Beams do not tell how the best of them ended; a text of all its tokens was cut."""
        n_new = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.job.streams and text:
            self.job.tell(text)
        self._tell(text, "length" if n_new >= self.job.ask.settings.max_new_tokens else "stop", n_new)

    def _tell(self, text: str, reason: str, n_new: int) -> None:
        job, now = self.job, time.perf_counter()
        self.job.tell(
            Answer(
                text=text, reason=reason, n_prompt=len(job.ask.row.ids), n_known=self._n_known, n_new=n_new, waited=self._started - job.queued,
                generated=now - self._started, n_rows=self._n_rows,
            )
        )  # fmt: skip
