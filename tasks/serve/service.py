"""The parts of a running server, made once and used by every route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from multimodal.data.images.decode import ImageLimits
from multimodal.model import VisionLanguageModel
from tasks.serve.access import Keys
from tasks.serve.engine import Worker
from tasks.serve.images import Decoders, RemoteImages, Uploads, n_cores
from tasks.serve.registry import Served
from tasks.serve.request import Reader, Source
from tasks.serve.scheduler import Answer, Job, ServedImage
from tasks.serve.settings import ServeSettings

__all__ = ["Metrics", "Service"]


# ----------------------------------------
# What a server counts, for Prometheus.


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.n_accepted = self.n_answered = 0
        by = ("model", "status")
        self._requests = Counter("adalink_requests", "requests by model (empty where refused) and status", by, registry=self.registry)
        self._seconds = Histogram("adalink_request_seconds", "from the queue to the end of the text", by[:1], buckets=SECONDS, registry=self.registry)
        self._waited = Histogram("adalink_queue_seconds", "from the queue to the batch", buckets=SECONDS, registry=self.registry)
        self._rows = Histogram("adalink_batch_rows", "requests in the running batch when some join it", buckets=ROWS, registry=self.registry)
        self._adapters = Histogram("adalink_batch_adapters", "different adapters in the running batch when some join it", buckets=ROWS, registry=self.registry)
        self._tokens = Counter("adalink_tokens", "tokens of prompts, of these known from before, and new ones", ("kind",), registry=self.registry)
        self.waiting = Gauge("adalink_waiting", "requests that wait for a batch", registry=self.registry)
        self.models = Gauge("adalink_adapters", "adapters that are served", registry=self.registry)

    def status(self, model: str, status: int) -> None:
        """Count a request that ended with a status."""
        self._requests.labels(model, str(status)).inc()

    def answer(self, model: str, answer: Answer) -> None:
        """Count an answer."""
        self.n_answered += 1
        self._seconds.labels(model).observe(answer.waited + answer.generated)
        self._waited.observe(answer.waited)
        self._tokens.labels("prompt").inc(answer.n_prompt)
        self._tokens.labels("known").inc(answer.n_known)
        self._tokens.labels("new").inc(answer.n_new)

    def batch(self, jobs: Sequence[Job]) -> None:
        """Count the running batch, with the jobs that join it now."""
        self._rows.observe(len(jobs))
        self._adapters.observe(len({job.ask.adapter for job in jobs}))

    def text(self) -> bytes:
        """All counts, in Prometheus' text format."""
        return generate_latest(self.registry)


Result = TypeVar("Result")
READERS = 2  # threads that read texts, numbers and base64, which nobody else waits for long
FETCHERS = 16  # threads that wait for images from elsewhere


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that routes need."""

    model: VisionLanguageModel
    settings: ServeSettings
    metrics: Metrics
    worker: Worker
    served: Served
    uploads: Uploads
    reader: Reader
    keys: Keys
    admin_keys: Keys
    decoders: Decoders
    readers: ThreadPoolExecutor
    image_readers: ThreadPoolExecutor  # one for each core: what they take off the others is memory for decoded images
    fetchers: ThreadPoolExecutor
    remote: RemoteImages

    @staticmethod
    def of(model: VisionLanguageModel, settings: ServeSettings) -> Service:
        """The parts for a model with the adapters that it has. Raises ConfigError for a file of keys that cannot be read."""
        metrics, limits, access = Metrics(), settings.limits, settings.access
        worker = Worker(model, settings.batching, limits, metrics.batch)
        decoders = Decoders(n_cores(), ImageLimits(max_bytes=limits.image_bytes, max_pixels=limits.pixels), limits.decode_seconds)
        served = Served(model, worker)
        metrics.waiting.set_function(lambda: len(worker.waiting.jobs))
        metrics.models.set_function(lambda: len(served.cards) - 1)
        return Service(
            model=model,
            settings=settings,
            metrics=metrics,
            worker=worker,
            served=served,
            uploads=Uploads(limits.upload_bytes),
            reader=Reader(model, limits, settings.generation, features=worker.features.get, decode=decoders.decode),
            keys=Keys(access.api_keys),
            admin_keys=Keys(access.admin_keys or access.api_keys),
            decoders=decoders,
            readers=ThreadPoolExecutor(READERS, thread_name_prefix="reader"),
            image_readers=ThreadPoolExecutor(n_cores(), thread_name_prefix="image-reader"),
            fetchers=ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetcher"),
            remote=RemoteImages(access.image_hosts, limits.image_bytes),
        )

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of something that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    async def image(self, source: Source) -> ServedImage:
        """An image, fetched where it is elsewhere; one whose features are known is not decoded again. Raises Refused."""
        loop, field = asyncio.get_running_loop(), source.field
        if source.file_id is not None:
            data = self.uploads.get(source.file_id, field).data
        elif source.url is not None:
            url = source.url
            data = await loop.run_in_executor(self.fetchers, lambda: self.remote.fetch(url, field))
        else:
            data = source.data or b""
        image = await self.in_thread(lambda: self.reader.known(data))
        if image.features is not None:
            return image
        return await loop.run_in_executor(self.image_readers, lambda: self.reader.decoded(data, image.key, field))

    def close(self) -> None:
        """End the threads and processes that read."""
        for pool in (self.readers, self.image_readers, self.fetchers):
            pool.shutdown(cancel_futures=True)
        self.decoders.close()
