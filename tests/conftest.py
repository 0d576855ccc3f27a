"""Settings of every test: no hub, few threads, seeded, the same whatever ran before and however slow the machine is."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

from collections.abc import Generator
from typing import Any

import pytest
import torch
from forkserver import use_one_forkserver
from hypothesis import HealthCheck, settings

import multimodal  # noqa: F401  (first: it makes torchvision importable before a test imports transformers, timm or open_clip)

# The same examples each time, and however slow the machine is; `pytest --hypothesis-profile anew` draws others.
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("anew"), derandomize=True)
settings.load_profile("same")
use_one_forkserver()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two runs can share the cases between them."""
    parser.addoption("--half", type=int, choices=(0, 1), help="of tests with four cases or more, every second case: the even ones, or the odd ones")


def _place(nodeid: str) -> str:
    """What stays in one process: a file, for the fixtures of its module, and tests/tasks/serve, for its server."""
    path = nodeid.split("::", 1)[0]
    folder = path.rsplit("/", 1)[0]
    return folder if folder.endswith("/serve") else path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files marked long go first: begun last, each would leave the other processes without work."""
    long = {_place(item.nodeid) for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: _place(item.nodeid) not in long)
    half = config.getoption("half")
    if half is not None:
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            cases.setdefault(item.nodeid.split("[", 1)[0], []).append(item)
        left = {id(item) for test in cases.values() if len(test) >= 4 for item in test[1 - half :: 2]}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
        items[:] = [item for item in items if id(item) not in left]


def pytest_collection() -> None:
    """What is imported lives to the end, so nothing is looked for meanwhile, nor later in what is there then."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on in what tests make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What stays in one process is handed out together, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # else those of most tests first

    class ByPlace(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _place(nodeid)

    return ByPlace(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes a stack for each kind of device that is not there: a thousand times as long


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """What a fixture of several tests draws does not depend on the tests before it, nor do theirs on it."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return (yield)
