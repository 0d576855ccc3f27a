"""Prompts that were read last, so that a second question about a picture is read from where it differs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from multimodal.known_prompt import KnownPrompt
from tasks.serve.job import Job

__all__ = ["KeptPrompts", "Part"]

WORTH = 0.5  # of a prompt must be known to be read in a call of its own; a round figure, not a measured one


@dataclass(frozen=True)
class Part:
    """Jobs whose prompts are read in one call.

    known   of each, a prompt that begins alike; empty where all are new
    """

    jobs: Sequence[Job]
    known: Sequence[KnownPrompt] = ()

    @cached_property
    def n_last(self) -> int:
        """How many tokens of each prompt are read, where they begin like known ones."""
        return max(len(job.ask.row.ids) - prompt.n_alike(_tokens(job)) for job, prompt in zip(self.jobs, self.known, strict=True))

    def n_known(self, job: Job) -> int:
        """How many tokens of a job's prompt are not read."""
        return max(len(job.ask.row.ids) - self.n_last, 0) if self.known else 0


class KeptPrompts:
    """One prompt for each picture, adapter that was asked about it and owner; the least recently used are forgotten.

    Used by the generation thread alone.

    most   bytes of keys and values
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.n_bytes = 0
        self._kept: OrderedDict[tuple[str, str, str], KnownPrompt] = OrderedDict()

    def parts(self, jobs: Sequence[Job]) -> list[Part]:
        """The jobs whose prompts are new, and those that begin like a known one."""
        known = {job: prompt for job in jobs if (prompt := self._known(job)) is not None}
        parts = [Part([job for job in jobs if job not in known]), Part(list(known), list(known.values()))]
        return [part for part in parts if part.jobs]

    def add(self, job: Job, prompt: KnownPrompt) -> None:
        """Keep the prompt of a job, unless it alone is too much."""
        self._forget(_key(job))
        if prompt.n_bytes > self.most:
            return
        self._kept[_key(job)] = prompt
        self.n_bytes += prompt.n_bytes
        while self.n_bytes > self.most:
            self._forget(next(iter(self._kept)))

    def forget(self, adapter: str) -> None:
        """Forget what was read under an adapter, which goes: another may get its name."""
        for key in [key for key in self._kept if key[0] == adapter]:
            self._forget(key)

    def _known(self, job: Job) -> KnownPrompt | None:
        prompt = self._kept.get(_key(job))
        if prompt is None or prompt.n_alike(_tokens(job)) < WORTH * len(job.ask.row.ids):
            return None
        self._kept.move_to_end(_key(job))
        return prompt

    def _forget(self, key: tuple[str, str, str]) -> None:
        if (prompt := self._kept.pop(key, None)) is not None:
            self.n_bytes -= prompt.n_bytes


def _key(job: Job) -> tuple[str, str, str]:
    return job.ask.adapter, job.ask.picture.key, job.ask.owner


def _tokens(job: Job) -> list[tuple[int, int]]:
    return list(zip(job.ask.row.ids, job.ask.row.domain, strict=True))
