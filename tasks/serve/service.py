"""The parts of a running server, made once and used by every route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from multimodal.model import VisionLanguageModel
from tasks.serve.keys import Keys
from tasks.serve.metrics import Metrics
from tasks.serve.reading import Reader, Sources
from tasks.serve.remote import RemotePictures
from tasks.serve.served import Served
from tasks.serve.settings import ServeSettings
from tasks.serve.uploads import Uploads
from tasks.serve.worker import Worker

__all__ = ["Service"]

Result = TypeVar("Result")
READERS = 2  # threads that decode pictures; more would hold more decoded ones at once


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
    readers: ThreadPoolExecutor

    @staticmethod
    def of(model: VisionLanguageModel, settings: ServeSettings) -> Service:
        """The parts for a model with the adapters that it has. Raises ConfigError for a file of keys that cannot be read."""
        metrics, limits, access = Metrics(), settings.limits, settings.access
        worker = Worker(model, settings.batching, limits, metrics.batch)
        uploads, remote = Uploads(limits.upload_bytes), RemotePictures(access.image_hosts, limits.image_bytes)
        sources = Sources(lambda file_id, field: uploads.get(file_id, field).data, remote.fetch, worker.features.get)
        served = Served(model, worker)
        metrics.waiting.set_function(lambda: len(worker.waiting.jobs))
        metrics.models.set_function(lambda: len(served.cards) - 1)
        return Service(
            model=model,
            settings=settings,
            metrics=metrics,
            worker=worker,
            served=served,
            uploads=uploads,
            reader=Reader(model, limits, settings.generation, sources),
            keys=Keys(access.api_keys),
            admin_keys=Keys(access.admin_keys or access.api_keys),
            readers=ThreadPoolExecutor(READERS, thread_name_prefix="reader"),
        )

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of something that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)
