"""The one thread that runs the model: its caches of images and prompts, and the running batch, whose rows come and go between two tokens."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adalink import BASE_NAME, TokenMap
from adalink.attachment.inputs import Route
from adalink.attachment.recompute import may_share_prompts, needs_whole_sequence, reads_later_tokens
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.prepared import ImageBatch, Prepared, joined
from multimodal.batches.tokenize import TextTooLong
from multimodal.existing.tower import ModelTower
from multimodal.generation.decoding import Decoding, KnownPrompt, check_room, may_decode
from multimodal.generation.generate import run_generation
from multimodal.generation.settings import GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.serve.sampling import DrawnRows, drawn
from tasks.serve.scheduler import Job, JobRow, ServedImage, Waiting, keys_of
from tasks.serve.settings import Batching, RequestLimits

__all__ = ["FeatureLRU", "Part", "PromptCache", "Running", "Worker", "run_beams", "run_greedy"]


# ----------------------------------------
# The thread.


Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToRoute:
    """A request whose adapter a router chooses."""

    prompt: str
    images: tuple[ServedImage, ...]
    future: Future[Route]


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
        self._to_route: queue.SimpleQueue[ToRoute] = queue.SimpleQueue()
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

    def route(self, prompt: str, images: Sequence[ServedImage]) -> Future[Route]:
        """Which adapter serves a request; those that wait for theirs are routed together, between two tokens, and their images encoded for all that follows."""
        future: Future[Route] = Future()
        self._to_route.put(ToRoute(prompt, tuple(images), future))
        self.waiting.put_errand(self._route_all)
        return future

    def _route_all(self) -> None:
        taken: list[ToRoute] = []
        with contextlib.suppress(queue.Empty):  # an earlier errand may have taken all
            while True:
                taken.append(self._to_route.get_nowait())
        try:
            routing, (images, about) = self.model.routing, self.features.of([one.images for one in taken])
            assert routing is not None
            for one, route in zip(taken, routing.routes(images, about, [one.prompt for one in taken]) if taken else [], strict=True):
                one.future.set_result(route)
        except BaseException as error:
            for one in taken:
                one.future.set_exception(error)

    def join(self, jobs: Sequence[Job]) -> None:
        """Add jobs to the running batch; where that fails, they get the error, and those that run already are not touched."""
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


# ----------------------------------------
# The batch that is running: rows of any adapters, which join and leave it between two tokens.


class Running:
    """Rows that are being written. Each gets its text as it comes and its end as it ends, and makes room for another at once."""

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
        adapters, ways = self.model.adapted.adapters, self.model.ways
        may_keep = self.prompts.most > 0 and not (ways is not None and ways.reads_prompts)
        retained = [
            i
            for i, job in enumerate(jobs)
            if may_keep and (job.ask.adapter == BASE_NAME or not reads_later_tokens(adapters[job.ask.adapter]))  # type: ignore[arg-type]
        ]
        for i, prompt in zip(retained, self._decoding.prompts(batch, retained), strict=True):
            self.prompts.add(jobs[i], prompt)

    def _batch(self, jobs: Sequence[Job]) -> Batch:
        images, about = self.features.of([job.ask.images for job in jobs])
        pad_id = self.model.language.tokenizer.pad_token_id
        return collate([job.ask.row for job in jobs], about, images, kind=self.features.kind, side="left", pad_id=pad_id).to(self.model.device)

    def _let_go(self) -> None:
        left = [i for i, row in enumerate(self.rows) if not row.has_ended]
        if len(left) < len(self.rows):
            self._decoding.keep(left)
            self.rows, self._newest = [self.rows[i] for i in left], self._newest[left]


def _chosen(rows: Sequence[JobRow], scores: Tensor) -> Tensor:
    """int64 [B]: the next token of each row, which has it now."""
    draws = [row.draw for row in rows]
    chosen = (drawn(scores, draws) if any(draws) else scores).argmax(-1)
    for row, token in zip(rows, chosen.tolist(), strict=True):
        row.add(token)
    return chosen


# ----------------------------------------
# A batch that begins and ends together: beams, and models whose rows cannot come and go (see `Running`).


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
    """Generate step by step, and give each its answer: the tokens that `VisionLanguageModel.generate` gives."""
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
    """Give each job the text that `VisionLanguageModel.generate_batch` gives, with beams that are the same for all."""
    rows = [JobRow(job, model.language, n_rows=len(jobs)) for job in jobs]
    for row, text in zip(rows, model.generate_batch(batch, jobs[0].ask.settings, [job.ask.adapter for job in jobs]), strict=True):
        row.end(text)


# ----------------------------------------
# Features of the images that were asked about last, so that a second question about one costs neither decoder nor encoder. Where an encoder is
# adapted its pixels are cached instead: a second question costs the encoder.


class FeatureLRU:
    """Encodes images, each once; above a number and a sum of bytes, those least recently asked about are forgotten.

    `get` is for any thread, `of` for the generation thread.
    """

    def __init__(self, model: VisionLanguageModel, n_retained: int, most_bytes: int = 2**28) -> None:
        self.model = model
        self.n_retained = n_retained
        self.most_bytes = most_bytes
        # Whether images are cached beside their features: an adapter with a connector of its own encodes them itself.
        self.keeps_images = model.connectors is not None and any(map(model.connectors.has_own, model.adapted.adapters))
        self.n_bytes = 0
        self._retained: OrderedDict[str, Tensor | Prepared] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def kind(self) -> Literal["patches", "pixels"]:
        """What `of` gives."""
        return "patches" if self.model.tower.adapter is None else "pixels"

    def get(self, key: str) -> Tensor | Prepared | None:
        """float [N + L, Dv], or [3, H, W] of pixels, where the image is known; of a model that sees already, the image with its vectors."""
        with self._lock:
            if key in self._retained:
                self._retained.move_to_end(key)
            return self._retained.get(key)

    def of(self, asked: Sequence[Sequence[ServedImage]]) -> tuple[Tensor | ImageBatch, list[int]]:
        """float [I, N + L, Dv], or [I, 3, H, W] of pixels, of the different images, and for each of `asked` which of them it is.

        Of a model that sees already: I different lists of images, each one entry.
        """
        different = {image.key: image for images in asked for image in images}
        features = {key: found for key, image in different.items() if (found := self.get(key) if image.features is None else image.features) is not None}
        if new := [image for key, image in different.items() if key not in features]:
            features |= dict(zip([image.key for image in new], self._encoded([image.pixels for image in new]), strict=True))
        with self._lock:
            for key, value in features.items():
                self.n_bytes += value.nbytes - (self._retained[key].nbytes if key in self._retained else 0)
                self._retained[key] = value
            while len(self._retained) > self.n_retained or self.n_bytes > self.most_bytes:
                self.n_bytes -= self._retained.popitem(last=False)[1].nbytes
        place: dict[tuple[str, ...], int] = {}
        about = [place.setdefault(keys_of(images), len(place)) for images in asked]
        return stacked([self._entry([features[key] for key in keys]) for keys in place]), about

    def _encoded(self, images: Sequence[Any]) -> list[Any]:
        """What is cached of each of these, as the tower takes them."""
        if self.kind == "pixels":
            return list(images)
        if isinstance(self.model.tower, ModelTower):
            encoded = self.model.tower.encode(ImageBatch(samples=tuple(images)))
            return [replace(image, vectors=one.vectors) for image, one in zip(images, encoded, strict=True)] if self.keeps_images else list(encoded)
        return [row.clone() for row in self.model.encode(torch.stack(list(images)))]  # copies: a row of the batch would keep all of it in memory

    def _entry(self, features: Sequence[Any]) -> Any:
        return joined(features) if isinstance(self.model.tower, ModelTower) else features[0]


# ----------------------------------------
# Prompts that were read last, so that a second question about an image is read from where it differs.


WORTH = 0.5  # of a prompt must be known to be read in a call of its own; a round number, not a measured one


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


PromptKey = tuple[str, tuple[str, ...], str]  # adapter, keys of the images, owner


class PromptCache:
    """One prompt for each image (or list of images), adapter that was asked about it and owner; the least recently used are forgotten.

    Used by the generation thread alone.

    most   bytes of keys and values
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.n_bytes = 0
        self._retained: OrderedDict[PromptKey, KnownPrompt] = OrderedDict()

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

    def _forget(self, key: PromptKey) -> None:
        if (prompt := self._retained.pop(key, None)) is not None:
            self.n_bytes -= prompt.n_bytes


def _key(job: Job) -> PromptKey:
    return job.ask.adapter, keys_of(job.ask.images), job.ask.owner


def _tokens(job: Job) -> list[tuple[int, int]]:
    return list(zip(job.ask.row.ids, job.ask.row.domain, strict=True))
