"""One served process for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server, save_adapters, serving
from shared import PATIENCE

from multimodal.model import VisionLanguageModel


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def model(adapters: Path) -> VisionLanguageModel:
    """The same adapters in this process, for what `generate` gives."""
    return save_adapters(adapters)


@pytest.fixture(scope="session")
def server(model: VisionLanguageModel, adapters: Path) -> Iterator[Server]:
    """A server of four adapters, with small limits, and time for whoever shares a slow machine with it."""
    limits = ("--limits.seconds", PATIENCE, "--limits.body_bytes", "3000000", "--limits.image_bytes", "2000000", "--limits.pixels", "4000000")
    with serving(adapters, "--access.adapters_folder", adapters, *limits, fresh=True) as running:
        yield running
