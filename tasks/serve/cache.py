"""Features of the images that were asked about last, so that a second question about one costs neither decoder nor encoder.

Of an adapted encoder no features are kept, but the pixels that it reads: a second question costs the encoder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from multimodal.generation.prefill import KnownPrompt
from multimodal.model import VisionLanguageModel
from tasks.serve.scheduler import Job, ServedImage

__all__ = ["FeatureLRU", "PromptCache", "Part"]


class FeatureLRU:
    """Encodes images, each once; above a number and a sum of bytes, those least recently asked about are forgotten.

    `get` is for any thread, `of` for the generation thread.
    """

    def __init__(self, model: VisionLanguageModel, n_retained: int, most_bytes: int = 2**28) -> None:
        self.model = model
        self.n_retained = n_retained
        self.most_bytes = most_bytes
        self.n_bytes = 0
        self._retained: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def kind(self) -> Literal["patches", "pixels"]:
        """What `of` gives."""
        return "patches" if self.model.tower.adapter is None else "pixels"

    def get(self, key: str) -> Tensor | None:
        """float [N + L, Dv], or [3, H, W] of pixels, where the image is known."""
        with self._lock:
            if key in self._retained:
                self._retained.move_to_end(key)
            return self._retained.get(key)

    def of(self, images: Sequence[ServedImage]) -> tuple[Tensor, list[int]]:
        """float [I, N + L, Dv], or [I, 3, H, W] of pixels, of the different images, and for each of `images` which of them it is."""
        different = {image.key: image for image in images}
        features = {key: found for key, image in different.items() if (found := self.get(key) if image.features is None else image.features) is not None}
        if new := [image for key, image in different.items() if key not in features]:
            pixels = torch.stack([image.pixels for image in new if image.pixels is not None])
            encoded = pixels if self.kind == "pixels" else self.model.encode(pixels)
            # Copies: a row of the batch would keep all of it in memory.
            features |= {image.key: row.clone() for image, row in zip(new, encoded, strict=True)}
        with self._lock:
            for key, value in features.items():
                self.n_bytes += value.nbytes - (self._retained[key].nbytes if key in self._retained else 0)
                self._retained[key] = value
            while len(self._retained) > self.n_retained or self.n_bytes > self.most_bytes:
                self.n_bytes -= self._retained.popitem(last=False)[1].nbytes
        order = {key: i for i, key in enumerate(different)}
        return torch.stack([features[key] for key in different]), [order[image.key] for image in images]


# ----------------------------------------
# Prompts that were read last, so that a second question about an image is read from where it differs.


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


class PromptCache:
    """One prompt for each image, adapter that was asked about it and owner; the least recently used are forgotten.

    Used by the generation thread alone.

    most   bytes of keys and values
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.n_bytes = 0
        self._retained: OrderedDict[tuple[str, str, str], KnownPrompt] = OrderedDict()

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
        self._retained[_key(job)] = prompt
        self.n_bytes += prompt.n_bytes
        while self.n_bytes > self.most:
            self._forget(next(iter(self._retained)))

    def forget(self, adapter: str) -> None:
        """Forget what was read under an adapter, which goes: another may get its name."""
        for key in [key for key in self._retained if key[0] == adapter]:
            self._forget(key)

    def _known(self, job: Job) -> KnownPrompt | None:
        prompt = self._retained.get(_key(job))
        if prompt is None or prompt.n_alike(_tokens(job)) < WORTH * len(job.ask.row.ids):
            return None
        self._retained.move_to_end(_key(job))
        return prompt

    def _forget(self, key: tuple[str, str, str]) -> None:
        if (prompt := self._retained.pop(key, None)) is not None:
            self.n_bytes -= prompt.n_bytes


def _key(job: Job) -> tuple[str, str, str]:
    return job.ask.adapter, job.ask.image.key, job.ask.owner


def _tokens(job: Job) -> list[tuple[int, int]]:
    return list(zip(job.ask.row.ids, job.ask.row.domain, strict=True))
