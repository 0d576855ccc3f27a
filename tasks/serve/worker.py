"""The one thread that runs the model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from adalink.errors import ConfigError
from multimodal.encode import TextTooLong
from multimodal.generate import GenerationSettings, check_room
from multimodal.model import VisionLanguageModel
from tasks.serve.job import Job
from tasks.serve.kept_features import KeptFeatures
from tasks.serve.kept_prompts import KeptPrompts
from tasks.serve.running import Running
from tasks.serve.settings import Batching, RequestLimits
from tasks.serve.waiting import Waiting

__all__ = ["Worker"]

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
        self.features = KeptFeatures(model, limits.cached_pictures, limits.feature_bytes)
        self.prompts = KeptPrompts(limits.prompt_bytes)
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
        job.tell(error)
        job.cancelled = True  # a row that it has already goes with the next token
