"""Shards that are fetched as a stream reads them: each once per epoch and machine, within the bound, whoever dies, and every fault told."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from bad_server import Server, served, until
from composed import tower, two_texts
from loader_case import ENCODER, keys
from made_shards import made_shards
from shared import PATIENCE

from adalink.errors import ConfigError, DataError
from multimodal.batches.packing import separate_rows
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.data.loader import train_loader
from multimodal.data.order import reading_plan
from multimodal.data.shards import storage
from multimodal.data.shards.cache import cached_name, live_readers
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.order import ShardOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings
from multimodal.sample import DamagedSample

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

    def name(self, shard: str) -> str:
        """Of a shard's file in the cache."""
        assert self.ahead is not None
        return next(path.name for url in self.ahead.cache.shards if url.endswith(shard) for path in [self.ahead.cache.path(url)])

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
                with suppress(FileNotFoundError):
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


@pytest.mark.parametrize("n", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_all_ranks_and_workers_of_a_machine_fetch_each_shard_once(server: Server, web: Path, tmp_path: Path, n: int) -> None:
    stream = Stream(server, tmp_path / "cache")
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


FAULTS: dict[str, list[int | str]] = {
    "it is overloaded": [503, 503], "too many requests": [429], "it ends in the middle": ["short", "short"], "it sends less": ["few"],
    "a reset": ["reset", "reset"], "it hangs up": ["hang up"], "a flipped bit": ["flipped"], "it stalls": ["stall"],
}  # fmt: skip
HASTY = replace(FAST, attempts=6, timeout=0.5)  # where the server stalls for one file, and gives another


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_loses_no_sample(server: Server, web: Path, tmp_path: Path, fault: str) -> None:
    stream = Stream(server, tmp_path / "cache", HASTY if fault == "it stalls" else FAST)
    sent = Sent(server)
    for name in list(sizes(web))[::2]:
        server.faults[name] = list(FAULTS[fault])
    assert [stream[position] for position in range(EPOCH)] == expected(web, range(EPOCH))
    assert not any(server.faults.values())
    # Only a rest is asked for again. A reset takes back what was on its way; a shard with a flipped bit is not stored, and its samples are read one by one.
    most = {"a flipped bit": 2.1, "a reset": 2.0}.get(fault, 1.0)
    times = sent.times(web).values()
    assert max(times) <= most + 1.01  # some are fetched again ahead of the next epoch
    assert sum(times) <= most * SHARDS / 2 + SHARDS / 2 + 2 * WINDOW + 0.1


def test_a_server_that_stalls_is_named_once_in_a_while_and_one_that_is_dead_ends_with_a_sentence(
    server: Server, web: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_NAMED", {})
    stream = Stream(server, tmp_path / "cache", HASTY)
    for name in sizes(web):
        server.faults[name] = ["stall"] * 3
    with caplog.at_level(logging.WARNING, logger="adalink"):
        assert stream[0] == expected(web, range(1))[0]
    lines = [text for text in (record.getMessage() for record in caplog.records) if server.url in text]
    assert [line for line in lines if "nothing came for 0.5 s (attempt 2 of 6)" in line] == lines
    assert len(lines) == 1  # though each of three shards waited three times
    server.faults.clear()
    for name in sizes(web):
        server.faults[name] = [500] * 10_000
    with pytest.raises(DataError, match=r"/set/shard-\d+.tar cannot be read: the server answered 500.* --resume goes on with the next sample"):
        [stream[position] for position in range(EPOCH)]


def test_a_shard_that_was_replaced_is_not_stored_and_each_sample_is_good_or_counted_once(
    web: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(web / "set", tmp_path / "web" / "set")
    with served(tmp_path / "web") as server, caplog.at_level(logging.WARNING, logger="adalink"):
        stream = Stream(server, tmp_path / "cache")
        names = sorted(path.name for path in (tmp_path / "web" / "set").glob("*.tar"))
        sizes_of = [(tmp_path / "web" / "set" / name).stat().st_size for name in names]
        other = next(name for name, size in zip(names[1:], sizes_of[1:], strict=True) if size == sizes_of[0])
        longer = next(name for name, size in zip(names, sizes_of, strict=True) if size != sizes_of[0])
        shutil.copy(tmp_path / "web" / "set" / other, tmp_path / "web" / "set" / names[0])
        with (tmp_path / "web" / "set" / longer).open("ab") as file:
            file.write(bytes(512))
        good, bad = [], []
        for position in range(EPOCH):
            try:
                good.append(stream[position])
            except DamagedSample as error:
                bad.append(error.bad.key)
    assert sorted([*good, *bad], key=int) == [str(number) for number in range(EPOCH)]
    assert set(bad) == {str(number) for number in range(EACH)}
    lines = [text for text in (record.getMessage() for record in caplog.records) if server.url in text]
    assert len(set(lines)) == 2
    assert any(f"{names[0]} is not stored in the cache" in line and "it is not what its manifest says, by its sha256" in line for line in lines)
    assert any(f"{longer} has " in line and "and the manifest says" in line and "it was replaced" in line for line in lines)


def test_a_server_without_ranges_is_one_sentence_and_nothing_else_is_asked_of_one(server: Server, web: Path, tmp_path: Path) -> None:
    """Only GET is: the server knows neither HEAD nor lists."""
    stream = Stream(server, tmp_path / "cache")
    assert stream[0] == expected(web, range(1))[0]
    for name in sizes(web):
        server.faults[name] = ["no ranges"] * 1000
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/set/shard-\d+.tar is on a server that reads no ranges \(it answered 200\); copy the shards"):
        [stream[position] for position in range(EPOCH)]


def test_a_cache_smaller_than_a_window_says_how_many_bytes_are_needed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"may hold 100000 bytes, and one window of {WINDOW} shards needs {WINDOW * BYTES}: give cache_gib 0.000229 or more"):
        Stream(server, tmp_path / "cache", replace(FAST, cache_bytes=100_000))


def test_a_cache_that_cannot_be_written_is_one_sentence_and_every_sample_is_read(
    server: Server, web: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(server, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    with caplog.at_level(logging.WARNING, logger="adalink"):
        assert [stream[position] for position in range(WINDOW * EACH)] == expected(web, range(WINDOW * EACH))
    of_this_cache = {message for record in caplog.records if str(tmp_path) in (message := record.getMessage())}  # threads of other tests may still fetch
    assert of_this_cache == {
        f"adalink: the cache {tmp_path / 'cache'} cannot be written: Not a directory; samples that are not in it are read from the server; is the disk full?"
    }


def read_forever(stream: Stream) -> None:
    for position in itertools.count():
        stream[position]


def test_a_killed_process_blocks_nobody_and_what_it_fetched_is_not_fetched_again(server: Server, web: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stream = Stream(server, cache, replace(FAST, connections=2))
    server.rate = 400_000.0
    first = FORK.Process(target=read_forever, args=(stream,))
    first.start()

    def half_done() -> bool:
        return bool(list(cache.glob("*.tar"))) and any(path.stat().st_size > BYTES // 4 for path in cache.glob(".*.part"))

    until(half_done)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert len(live_readers(cache)) == 0  # without the dead one's file
    whole, parts = {path.name for path in cache.glob("*.tar")}, {path.name for path in cache.glob(".*.part")}
    server.rate = 0.0
    time.sleep(0.1)  # what the server was sending
    sent = Sent(server)
    # Another process goes on, with a larger cache and more connections.
    stream = Stream(server, cache, replace(FAST, cache_bytes=2 * ROOM))
    opening = sum(sent().values())
    assert [stream[position] for position in range(EPOCH)] == expected(web, range(EPOCH))
    lacking = sum(size for name, size in sizes(web).items() if stream.name(name) not in whole)
    assert 0 < sum(sent().values()) - opening <= lacking - len(parts) * BYTES // 5
    assert whole
    assert parts


def train_keys(source: ShardSource, start: int, workers: int, write: Callable[[str], object]) -> None:
    """A training stream, sixteen positions a step, from a position to the end of the second epoch."""
    table = PatchTable(torch.zeros(len(source), tower().n_patches, 2).half(), {})
    steps = (2 * EPOCH - start) // 16
    loader = train_loader(
        source, two_texts, ENCODER, separate_rows, tower().preprocess, steps=steps, batch_size=16, seed=0, workers=workers, patches=table, window=WINDOW
    )
    loader.load_state_dict({**loader.state_dict(), "position": start})
    for loaded in loader:
        write("".join(f"{key}\n" for key in keys([loaded])))


def run_until_killed(source: ShardSource, log: Path) -> None:
    os.setsid()
    with log.open("a") as file:
        train_keys(source, 0, 2, lambda text: (file.write(text), file.flush()))


def test_a_run_killed_within_a_window_goes_on_with_other_workers_and_another_cache(server: Server, web: Path, tmp_path: Path) -> None:
    cache, log, all_keys = tmp_path / "cache", tmp_path / "keys", list[str]()
    train_keys(ShardSource(server.url + "/set", remote=FAST), 0, 0, lambda text: all_keys.extend(text.split()))  # no cache, no worker
    assert sorted(all_keys[:EPOCH]) == sorted(all_keys[EPOCH:]) == sorted(str(number) for number in range(EPOCH))
    log.touch()
    server.rate = 2_000_000.0
    first = FORK.Process(target=run_until_killed, args=(ShardSource(server.url + "/set", remote=replace(FAST, cache=cache)), log))
    first.start()
    until(lambda: log.read_text().count("\n") > 1.5 * WINDOW * EACH)
    assert first.pid is not None
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    done = log.read_text().split()
    assert done == all_keys[: len(done)]
    server.rate, start = 0.0, len(done) // 16 * 16
    time.sleep(0.1)
    whole, sent = {path.name for path in cache.glob("*.tar")}, Sent(server)
    source = ShardSource(server.url + "/set", remote=replace(FAST, cache=cache, cache_bytes=SHARDS * BYTES, ahead=1, connections=3))
    rest = list[str]()
    train_keys(source, start, 1, lambda text: rest.extend(text.split()))
    assert all_keys[start:] == rest
    names = {f"set/{shard.file}": cached_name(f"{server.url}/set/{shard.file}", shard) for shard in read_manifest(web / "set").shards}
    assert whole
    assert all(sent()[name] <= 1 for name in sizes(web) if names[name] in whole)  # a byte when the set was opened
    assert all(sent()[name] <= sizes(web)[name] + 1 for name in sizes(web))
