"""Requests that wait for the model, and which of them make the next batch, or join the one that runs."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from tasks.serve.job import Job
from tasks.serve.settings import Batching

__all__ = ["Waiting", "chosen", "joining", "n_tokens"]


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
            if not running:
                self._free_since = time.perf_counter()
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
                    self._n_last = len(running) + len(batch)
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
