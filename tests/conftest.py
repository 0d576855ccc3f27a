"""Settings of every test: no hub, few threads, seeded, the same whatever ran before and however slow the machine is."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import multimodal  # noqa: F401  (first: it makes torchvision importable before a test imports transformers, timm or open_clip)

# The same examples each time, and however slow the machine is; `pytest --hypothesis-profile anew` draws others.
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("anew"), derandomize=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files marked long go first: begun last, each would leave the other processes without work."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays in one process, for the fixtures of its module; tests/tasks/serve does too, for its server."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # not the files of most tests first, but those marked long

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            folder = path.rsplit("/", 1)[0]
            return folder if folder.endswith("/serve") else path

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """What a fixture of several tests draws does not depend on the tests before it, nor do theirs on it."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (yield)
