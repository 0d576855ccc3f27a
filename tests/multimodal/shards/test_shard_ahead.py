"""Shards that are fetched as a stream reads them: each once per epoch and machine, within the bound, whoever dies, and every fault told."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from bad_server import Server, served
from made_shards import made_shards
from shared import PATIENCE

from multimodal.data.order import ShardOrder, reading_plan
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings

SHARDS, EACH, WINDOW = 12, 32, 3
BYTES = 81_920  # of the largest shard
ROOM = 2 * WINDOW * BYTES  # two windows: half of the set
FAST = RemoteSettings(attempts=3, first_wait=0.01, timeout=PATIENCE, cache_bytes=ROOM)
FORK = get_context("fork")


def sizes(web: Path) -> dict[str, int]:
    return {f"set/{path.name}": path.stat().st_size for path in (web / "set").glob("*.tar")}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of 32 samples under /set."""
    folder = tmp_path_factory.mktemp("web")
    made_shards(folder / "set", SHARDS * EACH, EACH)
    assert max(sizes(folder).values()) == BYTES
    return folder


@pytest.fixture
def server(web: Path) -> Iterator[Server]:
    with served(web) as one:
        yield one


class Stream:
    """A source and its order, read by position as a loader's worker does."""

    def __init__(self, server: Server, cache: Path | None, settings: RemoteSettings = FAST, seed: int = 0) -> None:
        self.source = ShardSource(server.url + "/set", remote=replace(settings, cache=cache))
        self.order = ShardOrder(self.source.shard_sizes, WINDOW, seed)
        plan = reading_plan(self.order)[0]
        assert plan is not None
        self.ahead = self.source.follow(plan)

    def __getitem__(self, position: int) -> str:
        if self.ahead is not None:
            self.ahead.at(position)
        return self.source[self.order.sample(position)].key


def expected(web: Path, positions: range, seed: int = 0) -> list[str]:
    local = ShardSource(web / "set")
    order = ShardOrder(local.shard_sizes, WINDOW, seed)
    return [local[order.sample(position)].key for position in positions]


EPOCH = SHARDS * EACH


class Sent:
    """Bytes of each shard that a server sends from here on."""

    def __init__(self, server: Server) -> None:
        self.server, self.before = server, server.sent.copy()

    def __call__(self) -> dict[str, int]:
        return {name: count - self.before[name] for name, count in self.server.sent.items() if name.endswith(".tar")}

    def times(self, web: Path) -> dict[str, float]:
        """How often all of each shard was sent."""
        return {name: self()[name] / size for name, size in sizes(web).items()}


class Watched:
    """The most bytes that a cache's files had at a time, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.stop = folder, 0, False
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        while not self.stop:
            total = 0
            for path in list(self.folder.glob("*.tar")) + list(self.folder.glob(".*.part")):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
            self.most = max(self.most, total)
            time.sleep(0.001)

    def __enter__(self) -> Watched:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop = True
        self.thread.join()


def deleted_files(folder: Path) -> list[str]:
    """Files of a folder that this process has open though they were removed: they take room on the disk."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_three_epochs_through_half_a_cache_fetch_each_shard_at_most_once_an_epoch(server: Server, web: Path, tmp_path: Path) -> None:
    stream = Stream(server, tmp_path / "cache")
    sent = Sent(server)
    with Watched(tmp_path / "cache") as watched:
        found = [stream[position] for position in range(3 * EPOCH)]
        assert deleted_files(tmp_path / "cache") == []
    assert found == expected(web, range(3 * EPOCH))
    assert 0 < watched.most <= ROOM
    times = sent.times(web)
    assert set(times.values()) <= {1.0, 2.0, 3.0, 4.0}  # never a part, and a fourth time where it was fetched ahead of a fourth epoch
    # Files that are needed last are removed first: a part of each epoch is in the cache already.
    assert SHARDS < sum(times.values()) < 3 * SHARDS - 2


def test_without_the_plan_each_sample_is_a_request(server: Server, web: Path, tmp_path: Path) -> None:
    """The control: what is fetched in the background stays until the folder is full, and the rest is read sample by sample."""
    stream = Stream(server, tmp_path / "cache")
    plain = ShardSource(server.url + "/set", remote=replace(FAST, cache=tmp_path / "other"))
    before = sum(server.asked.values())
    assert [plain[stream.order.sample(position)].key for position in range(3 * EPOCH)] == expected(web, range(3 * EPOCH))
    assert sum(server.asked.values()) - before > EPOCH


def read_part(stream: Stream, positions: list[int], barrier: object, found: object) -> None:
    stream[positions[0]]
    barrier.wait(PATIENCE)  # type: ignore[attr-defined]
    found.put([(position, stream[position]) for position in positions])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_eight_ranks_of_eight_workers_fetch_each_shard_once(server: Server, web: Path, tmp_path: Path) -> None:
    stream = Stream(server, tmp_path / "cache")
    n = 64
    barrier, found = FORK.Barrier(n), FORK.SimpleQueue()
    processes = [FORK.Process(target=read_part, args=(stream, list(range(k, EPOCH, n)), barrier, found)) for k in range(n)]
    sent = Sent(server)
    with Watched(tmp_path / "cache") as watched:
        for process in processes:
            process.start()
        got = dict(pair for _ in processes for pair in found.get())
        for process in processes:
            process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * n
    assert [got[position] for position in range(EPOCH)] == expected(web, range(EPOCH))
    assert watched.most <= ROOM
    times = sent.times(web)
    assert set(times.values()) <= {1.0, 2.0}
    assert list(times.values()).count(2.0) <= 2 * WINDOW  # of the next epoch, whose first windows are fetched ahead
