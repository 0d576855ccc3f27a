"""Shards in an S3-compatible store on this machine, where its packages are installed: moto's server, made slow, overloaded and forbidding."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_shards import everything, made_shards

from adalink.errors import DataError
from multimodal.data.order import reading_plan
from multimodal.data.shards.order import ShardOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import FsspecFiles, RemoteSettings

pytest.importorskip("moto.server", reason="no moto here: pip install 'moto[s3,server]' s3fs")
s3fs = pytest.importorskip("s3fs", reason="no s3fs here: pip install 'moto[s3,server]' s3fs")
EPOCH = 48
FAST = RemoteSettings(attempts=3, first_wait=0.01, timeout=20, cache_bytes=60_000)


class Store:
    """A WSGI application before moto's. faults: what the next requests for an object get; forbidden: (method, start of the query) -> 403."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.asked, self.faults = inner, Counter[tuple[str, str]](), dict[str, list[int]]()
        self.forbidden: set[str] = set()
        self.ignores_ranges = False

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, name = environ["REQUEST_METHOD"], environ["PATH_INFO"].rpartition("/")[2]
        is_list = method == "GET" and "list-type" in environ["QUERY_STRING"]
        self.asked["LIST" if is_list else method, name] += 1
        if ("LIST" if is_list else method) in self.forbidden:
            start("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        if faults := self.faults.get(name):
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start(f"{faults.pop(0)} Slow Down", [("Content-Length", str(len(body)))])
            return [body]
        if self.ignores_ranges:
            environ.pop("HTTP_RANGE", None)
        found: Iterable[bytes] = self.inner(environ, start)
        return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Twelve shards of four samples in the bucket `shards`, under `set`."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    one = Store(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, one, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": "AKIDSECRET", "AWS_SECRET_ACCESS_KEY": "SECRETKEY",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    made_shards(tmp_path / "set", EPOCH, 4)
    files = s3fs.S3FileSystem()
    bucket = f"shards{time.monotonic_ns()}"
    files.mkdir(bucket)
    for path in (tmp_path / "set").iterdir():
        files.pipe_file(f"{bucket}/set/{path.name}", path.read_bytes())
    one.url, one.local = f"s3://{bucket}/set", ShardSource(tmp_path / "set")
    one.asked.clear()
    yield one
    server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def stream(store: Store, cache: Path) -> Iterator[str]:
    from dataclasses import replace

    source = ShardSource(store.url, remote=replace(FAST, cache=cache))
    order = ShardOrder(source.shard_sizes, 2, 0)
    ahead = source.follow(reading_plan(order)[0])
    for position in range(EPOCH):
        ahead.at(position)
        yield source[order.sample(position)].key


def ordered(store: Store) -> list[str]:
    order = ShardOrder(store.local.shard_sizes, 2, 0)
    return [store.local[order.sample(position)].key for position in range(EPOCH)]


def test_a_set_in_a_store_is_read_by_samples_and_by_windows_without_a_listing(store: Store, tmp_path: Path) -> None:
    store.forbidden = {"LIST"}
    assert everything(ShardSource(store.url, remote=FAST)) == everything(store.local)
    store.asked.clear()
    assert list(stream(store, tmp_path / "cache")) == ordered(store)
    shards = {name: count for (method, name), count in store.asked.items() if method == "GET" and name.endswith(".tar")}
    assert len(shards) == 12
    assert sum(shards.values()) <= 12 + 6  # each once, and what is fetched ahead of the next epoch


def test_an_overloaded_store_is_asked_again_by_us_alone(store: Store, tmp_path: Path) -> None:
    files, name = FsspecFiles(FAST), "shard-000003.tar"
    store.faults[name] = [503, 503]
    assert len(files.read(f"{store.url}/{name}", 512, 100)) == 100
    assert store.asked["GET", name] == 3  # the package's own attempts are off
    store.faults[name] = [503] * 3
    with pytest.raises(DataError, match=r"set/shard-000003.tar cannot be read: .*reduce your request rate.*, in the last of 3 attempts"):
        files.read(f"{store.url}/{name}", 512, 100)
    for number in range(0, 12, 3):
        store.faults[f"shard-{number:06d}.tar"] = [503, 503]
    assert list(stream(store, tmp_path / "cache")) == ordered(store)


def test_a_store_that_forbids_is_one_sentence(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.forbidden = {"HEAD"}
    with pytest.raises(DataError, match=r"s3://.*/set/shard-000000.tar may not be read \(Forbidden\); are the credentials set as s3fs wants them"):
        ShardSource(store.url, remote=FAST)
    store.forbidden = set()
    store.ignores_ranges = True
    with pytest.raises(DataError, match=r"s3://.*/set/shard-000000.tar is on a server that reads no ranges; copy the shards"):
        ShardSource(store.url, remote=FAST)[0]
    store.forbidden, store.ignores_ranges = {"GET"}, False
    with pytest.raises(DataError, match=r"s3://.*/set/manifest.json may not be read \(Forbidden\)") as raised:
        ShardSource(store.url, remote=FAST)
    assert "SECRET" not in str(raised.value)


def test_a_store_without_credentials_says_whose_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"manifest.json may not be read \(Unable to locate credentials\); are the credentials set as s3fs wants them"):
        ShardSource(store.url, remote=FAST)
