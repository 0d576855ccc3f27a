"""One server that every test forks its processes from: a process that has imported what they import, which takes each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from unittest import mock

from shared import SUPPORT

IMPORTED = [
    "multimodal", "torch.distributed.fsdp", "torch._dynamo", "accelerate.utils.fsdp_utils", "peft",  # multimodal before any library of encoders
    "timm", "uvicorn", "tasks.commands.train", "tasks.serve.server", "tasks.bench.clock", "composed", "ranks", "rank_jobs", "feature_jobs", "cli_run", "warmed",
]  # fmt: skip


def use_one_forkserver() -> None:
    """A server imports its modules as it starts, and no others later: those that came second would find one that has imported nothing of theirs."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    start = server.ensure_running

    def started() -> None:
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(SUPPORT), OMP_NUM_THREADS="1"):
            start()

    multiprocessing.set_forkserver_preload(IMPORTED)
    forkserver.set_forkserver_preload = lambda modules: None
    server.ensure_running = forkserver.ensure_running = started
