"""The parts of a running server, made once and used by every route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from multimodal.images import ImageLimits
from multimodal.model import VisionLanguageModel
from tasks.serve.decoders import Decoders, n_cores
from tasks.serve.job import Picture
from tasks.serve.keys import Keys
from tasks.serve.metrics import Metrics
from tasks.serve.reading import Reader, Source
from tasks.serve.remote import RemotePictures
from tasks.serve.served import Served
from tasks.serve.settings import ServeSettings
from tasks.serve.uploads import Uploads
from tasks.serve.worker import Worker

__all__ = ["Service"]

Result = TypeVar("Result")
READERS = 2  # threads that read texts, numbers and base64, which nobody else waits for long
FETCHERS = 16  # threads that wait for pictures from elsewhere


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
    image_readers: ThreadPoolExecutor  # one for each core: what they take off the others is memory for decoded pictures
    fetchers: ThreadPoolExecutor
    remote: RemotePictures

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
            remote=RemotePictures(access.image_hosts, limits.image_bytes),
        )

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of something that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    async def picture(self, source: Source) -> Picture:
        """A picture, fetched where it is elsewhere; one whose features are known is not decoded again. Raises Refused."""
        loop, field = asyncio.get_running_loop(), source.field
        if source.file_id is not None:
            data = self.uploads.get(source.file_id, field).data
        elif source.url is not None:
            url = source.url
            data = await loop.run_in_executor(self.fetchers, lambda: self.remote.fetch(url, field))
        else:
            data = source.data or b""
        picture = await self.in_thread(lambda: self.reader.known(data))
        if picture.features is not None:
            return picture
        return await loop.run_in_executor(self.image_readers, lambda: self.reader.decoded(data, picture.key, field))

    def close(self) -> None:
        """End the threads and processes that read."""
        for pool in (self.readers, self.image_readers, self.fetchers):
            pool.shutdown(cancel_futures=True)
        self.decoders.close()
