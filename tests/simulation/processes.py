"""Processes that are not there: torch's fake process group, whose collectives move nothing, so that one process takes its part of two on the simulated GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from device import GPU
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from multimodal.model import VisionLanguageModel

__all__ = ["sharded"]


@contextlib.contextmanager
def sharded(model: VisionLanguageModel) -> Iterator[None]:
    """Inside the block the model's weights are split over two processes by FSDP2, layer by layer. What the other process holds is not there."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    # A simulated tensor has its memory on the host, which cannot be given back; and the device has one stream.
    nothing: Any = lambda tensor: None
    with (
        mock.patch.object(_fsdp_param, "free_storage", nothing),
        mock.patch.object(_fsdp_param, "alloc_storage", nothing),
        mock.patch.object(torch.accelerator, "current_stream", torch.get_device_module(GPU).current_stream),
    ):
        mesh = init_device_mesh(GPU, (2,))
        stack = model.adapted.attachment.stack
        for part in (*(stack.get_submodule(name) for name in model.adapted.anatomy.layers), model):
            fully_shard(part, mesh=mesh)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
