"""Settings of every test: no hub, few threads, seeded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import pytest
import torch

import multimodal  # noqa: F401  (first: it makes torchvision importable before a test imports transformers, timm or open_clip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
