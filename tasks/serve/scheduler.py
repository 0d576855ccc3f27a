"""Requests on their way through the model: which of those that wait make the next batch, or join the one that runs, and what is written for each."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from multimodal.batches.tokenize import Row
from multimodal.generation.settings import GenerationSettings
from multimodal.language import Language
from tasks.serve.sampling import Draw, Sampling
from tasks.serve.settings import Batching

__all__ = [
    "Answer", "Ask", "Job", "JobRow", "ServedImage", "Waiting", "Written", "chosen",
    "joining", "keys_of", "n_tokens",
]  # fmt: skip


# ----------------------------------------
# One request on its way through the model.


@dataclass(frozen=True)
class ServedImage:
    """An image: a key that identifies it, and either float32 [3, H, W] (or a Prepared) as the encoder takes it, or what the encoder gave before."""

    key: str
    pixels: Any
    features: Any = None

    @property
    def prepared(self) -> Any:
        """What is known of it: its features where they are."""
        return self.pixels if self.features is None else self.features


def keys_of(images: Sequence[ServedImage]) -> tuple[str, ...]:
    """The keys that identify a list of images."""
    return tuple(image.key for image in images)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of the model."""

    adapter: str
    row: Row
    images: tuple[ServedImage, ...]  # in their order; a composed model reads one
    settings: GenerationSettings
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None
    owner: str = ""  # whose request it is: cached prompts are shared within one owner, so their counts reveal nothing of the requests of others

    @property
    def kind(self) -> object:
        """Rows of one batch are of one kind: greedy and drawn ones go together, beams only with beams that are the same in everything."""
        return self.settings if self.settings.num_beams > 1 else "greedy"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, and what it took."""

    text: str
    reason: str  # "stop" or "length"
    n_prompt: int  # tokens of the prompt, the image's among them
    n_known: int  # of these, tokens that were known from a prompt before and not read
    n_new: int  # tokens written, the end token among them
    waited: float  # seconds from the queue to the batch
    generated: float  # seconds from the batch to the end of the row
    n_rows: int  # of the batch


@dataclass(eq=False)
class Job:
    """An ask, and the way back to the request that waits for it. Pieces of text come before the answer where `streams` is set."""

    ask: Ask
    streams: bool
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[str | Answer | Exception] = field(default_factory=asyncio.Queue)
    queued: float = field(default_factory=time.perf_counter)
    cancelled: bool = False  # the client has gone: the row ends at the next token
    ended: bool = False

    def report(self, event: str | Answer | Exception) -> None:
        """Send a piece of text, the answer or an error to the request; called from the generation thread. Nothing follows an end."""
        if self.ended:
            return
        self.ended = not isinstance(event, str)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


# ----------------------------------------
# The queue.


def chosen(jobs: Sequence[Job], batching: Batching, fits: Callable[[int, int], bool]) -> list[Job]:
    """The next batch: the oldest job, and those after it that may go with it, in order.

    fits   whether a model has positions for (the longest prompt, the most new tokens): where rows cannot come and go, one that has ended
           goes on with padding until the batch ends, so all rows must have room for the longest text of any
    """
    batch: list[Job] = []
    n_prompt = n_new = 0
    for job in jobs:
        ask = job.ask
        longest, most = max(n_prompt, len(ask.row.ids)), max(n_new, ask.settings.max_new_tokens)
        is_too_much = batch and not (fits(longest, most) and n_tokens([*batch, job]) <= batching.tokens)
        if is_too_much or not _go_together(job, jobs[0], batching):
            continue
        batch.append(job)
        n_prompt, n_new = longest, most
        if len(batch) == batching.size:
            break
    return batch


def joining(jobs: Sequence[Job], running: Sequence[Job], batching: Batching, fits: Callable[[int, int], bool]) -> list[Job]:
    """The jobs that may join a running batch, in order. None is overtaken: behind one that cannot join, all wait until the batch has ended."""
    alike = list(itertools.takewhile(lambda job: _go_together(job, running[0], batching), jobs[: max(batching.size - len(running), 0)]))
    while alike and n_tokens([*running, *alike]) > batching.tokens:
        alike.pop()
    return chosen(alike, batching, fits)


def n_tokens(jobs: Sequence[Job]) -> int:
    """What a batch of jobs holds when it is longest: its rows, each beam one, times the longest of them with its new tokens."""
    rows = sum(job.ask.settings.num_beams for job in jobs)
    return rows * max(len(job.ask.row.ids) + job.ask.settings.max_new_tokens for job in jobs)


def _go_together(job: Job, other: Job, batching: Batching) -> bool:
    return job.ask.kind == other.ask.kind and (batching.mixing == "mixed" or job.ask.adapter == other.ask.adapter)


class Waiting:
    """Jobs between the threads that prepare them and the one that generates.

    A batch starts when it is full, when some job has to wait for the next one anyway, or when the model has been free and the oldest job
    there for `wait_ms`. It does not wait at all where no other request is being read and the batch before was of one row: nobody would come.
    Jobs join a running batch in the same way, since reading their prompts holds up its rows: when they fill it, or after `wait_ms`.
    """

    def __init__(self, batching: Batching, fits: Callable[[int, int], bool]) -> None:
        self.batching = batching
        self.fits = fits
        self.jobs: list[Job] = []
        self.errands: list[tuple[str, Callable[[], None]]] = []
        self.n_arriving = 0
        self._free_since, self._n_last = 0.0, 0  # when the batch before ended, and its rows, whose clients may ask again at once
        self._was_busy = True  # a batch was taken since the model was last free
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> None:
        """Queue a job."""
        with self._changed:
            self.jobs.append(job)
            self._changed.notify()

    def put_errand(self, errand: Callable[[], None], after: str = "") -> None:
        """Have something done between two batches, before the next one; where `after` names an adapter, once none of its jobs waits."""
        with self._changed:
            self.errands.append((after, errand))
            self._changed.notify()

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """A request is being prepared inside the block, and may be worth waiting for."""
        with self._changed:
            self.n_arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self.n_arriving -= 1
                self._changed.notify()

    def take(self, running: Sequence[Job] = ()) -> list[Job] | Callable[[], None] | None:
        """The next batch, or errand; waits for one, but where jobs are running: then those that join them, or none.

        None once it is closed and all jobs are done.
        """
        with self._changed:
            if not running and self._was_busy:  # an errand is none of a batch
                self._free_since, self._was_busy = time.perf_counter(), False
            while True:
                self.jobs = [job for job in self.jobs if not job.cancelled]
                waited_for = {job.ask.adapter for job in (*self.jobs, *running)}
                if ready := next((entry for entry in self.errands if entry[0] not in waited_for), None):
                    self.errands.remove(ready)
                    return ready[1]
                if not self.jobs and self._closed and not running:
                    return None
                batch = joining(self.jobs, running, self.batching, self.fits) if running else chosen(self.jobs, self.batching, self.fits)
                left = self._patience(batch, len(running)) if batch else None
                if left is not None and left <= 0:
                    self.jobs = [job for job in self.jobs if job not in batch]
                    self._n_last, self._was_busy = len(running) + len(batch), True
                    return batch
                if running:
                    return []
                self._changed.wait(left)

    def close(self) -> None:
        """Let `take` end once nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _patience(self, batch: Sequence[Job], n_running: int) -> float:
        """Seconds until this batch starts, or joins, with what there is."""
        now, bound = time.perf_counter(), self.batching.wait_ms / 1000
        since = self.jobs[0].queued if n_running else max(self.jobs[0].queued, self._free_since)
        is_settled = self.n_arriving == 0 and (self._n_last < 2 or (not n_running and now > self._free_since + bound))
        others_wait = not n_running and len(batch) < len(self.jobs)
        is_full = n_running + len(batch) == self.batching.size
        return 0.0 if self._closed or is_settled or is_full or others_wait else since + bound - now


# ----------------------------------------
# What has been written for one row so far: its tokens, its text, and where it ends.


AT_ONCE = 16  # tokens that are decoded again with each new one, at most twice as many


class _GrowingText:
    """The text of tokens of which more come: the last ones alone are decoded, after some whose text is known."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start, self._end = 0, 0  # tokens before `_end` are decoded; those from `_start` on are decoded again, for the spaces between words
        self._known, self._context = "", ""  # the text of all tokens before `_end`, and of those from `_start` to there

    def of(self, ids: Sequence[int]) -> str:
        """The text of all of them; each call has those of the call before, and one more at least."""
        recent = self._decode(ids[self._start :])
        # A word may be written another way once the next token is there: then all is decoded anew.
        follows = recent.startswith(self._context) and (self._context or not self._end)
        text = self._known + recent[len(self._context) :] if follows else self._decode(ids)
        if len(ids) - self._end >= AT_ONCE and not text.endswith("\ufffd"):  # half of a letter
            self._start, self._end, self._known = self._end, len(ids), text
            self._context = self._decode(ids[self._start :])
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


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
        self._growing = _GrowingText(tokenizer)

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        if token in self.ends or (self.stop and self._stop_at(self._growing.of(self.ids)) is not None):
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
        if self.reason is None:
            return self._growing.of(self.ids)
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
    """Takes the tokens of a job as they come, sends what is to be sent, and reports the end.

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
        """Take a whole text. Beam search does not report how the best beam ended; a text of all its tokens was cut."""
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
