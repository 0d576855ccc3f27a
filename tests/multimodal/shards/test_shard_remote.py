"""Shards on a server: the samples that were written, from a cache that is bounded, shared and checked, and every fault told."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from bad_server import Server, served, until
from made_shards import everything, flip, made_shards
from shared import PATIENCE

from adalink.errors import ConfigError, DataError
from multimodal.data.shards.cache import ShardCache, cached_name
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import HttpFiles, RemoteSettings
from multimodal.sample import DamagedSample

FAST = RemoteSettings(attempts=2, first_wait=0.01, timeout=PATIENCE)
HASTY = RemoteSettings(attempts=6, first_wait=0.01, timeout=0.5)  # where the server stalls for one file, and gives another


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Three shards with ten samples under /set."""
    made_shards(tmp_path / "web" / "set")
    with served(tmp_path / "web") as one:
        yield one


def source(server: Server, cache: Path | None = None) -> ShardSource:
    return ShardSource(server.url + "/set", remote=replace(FAST, cache=cache, cache_bytes=2**30))


def local(server: Server) -> ShardSource:
    return ShardSource(server.folder / "set")


def retained(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*.tar"))


def test_a_set_on_a_server_is_the_set_that_was_written(server: Server) -> None:
    found = source(server)
    assert everything(found) == everything(local(server))
    assert found.fingerprint == local(server).fingerprint
    assert everything(pickle.loads(pickle.dumps(found))) == everything(found)
    requests = server.asked["set/shard-000000.tar"]
    found[1]
    assert server.asked["set/shard-000000.tar"] == requests + 1  # image and texts in one


OPENING: dict[str, tuple[str, list[int | str], str]] = {
    # which file, what happens to it, what is said before the first step
    "no manifest": ("set/manifest.json", [404], "/set/manifest.json is not there"),
    "half a manifest": ("set/manifest.json", ["short"] * 2, r"/set/manifest.json cannot be read: \d+ of \d+ bytes came, in the last of 2 attempts"),
    "a missing shard": ("set/shard-000001.tar", [404], r"/set/shard-000001.tar is not there \(the server answered 404 Not Found\)"),
    "a shard of another size": ("set/shard-000002.tar", ["other size"], r"/set/shard-000002.tar has \d+ bytes, and manifest.json says \d+; write or fetch"),
    "a server that is ill": ("set/shard-000000.tar", [500] * 2, "/set/shard-000000.tar cannot be read: the server answered 500"),
    "a server that stalls": ("set/shard-000000.tar", ["stall"] * 6, "/set/shard-000000.tar cannot be read: nothing came for 0.5 s"),
}


@pytest.mark.parametrize("fault", OPENING)
def test_a_set_that_is_not_whole_is_told_when_it_is_opened(server: Server, fault: str) -> None:
    name, faults, stated = OPENING[fault]
    server.faults[name] = faults
    with pytest.raises(DataError, match=stated):
        ShardSource(server.url + "/set", remote=HASTY if "stall" in faults else FAST)


def test_a_server_that_fails_later_stops_the_run_and_one_that_recovers_does_not(server: Server) -> None:
    found = source(server)
    server.faults["set/shard-000000.tar"] = [500]
    assert found[0].key == "0"
    server.faults["set/shard-000000.tar"] = ["few"] * 2
    with pytest.raises(DataError, match="--resume goes on with the next sample"):
        found[0]


def test_a_flipped_bit_on_the_way_is_one_damaged_sample(server: Server) -> None:
    found = source(server)
    server.faults["set/shard-000000.tar"] = ["flipped"]
    with pytest.raises(DamagedSample, match=r"of '0' in http://.*/set/shard-000000.tar, from byte \d+ on, is not what was written"):
        found[0]
    assert found[0].key == "0"


def test_shards_are_cached_in_the_background_and_then_no_longer_asked_for(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = source(server, cache)
    assert everything(found) == everything(local(server))
    until(lambda: len(retained(cache)) == 3)
    manifest = read_manifest(server.folder / "set")
    assert retained(cache) == sorted(cached_name(f"{server.url}/set/{shard.file}", shard) for shard in manifest.shards)
    assert [(cache / name).stat().st_size for name in retained(cache)] == [shard.size for _, shard in sorted(
        (cached_name(f"{server.url}/set/{shard.file}", shard), shard) for shard in manifest.shards
    )]  # fmt: skip
    again = source(server, cache)
    asked = dict(server.asked)
    assert everything(again) == everything(local(server))
    assert dict(server.asked) == asked
    assert not list(cache.glob("*.part"))


def test_names_in_the_cache_hash_the_whole_url_and_the_version() -> None:
    from multimodal.data.shards.members import Members

    shard = type("S", (), {"sha256": "a" * 64, "size": 5, "members": Members})()
    names = {cached_name(url, shard) for url in ("http://a/x.tar", "http://b/x.tar", "http://a/x.tar?v=2", "http://a/y/../x.tar")}
    assert len(names) == 4
    assert all("/" not in name and len(name) < 100 for name in names)
    newer = type("S", (), {"sha256": "b" * 64, "size": 5})()
    assert cached_name("http://a/x.tar", newer) != cached_name("http://a/x.tar", shard)


SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260{n}01T000000Z&X-Amz-Expires=3600&X-Amz-Security-Token=t{n}&X-Amz-Signature=f{n}",
    "X-Goog-Credential=a&X-Goog-Signature={n}",
    "AWSAccessKeyId=A{n}&Signature=s%2F{n}%3D&Expires=17{n}",
    "Policy=p{n}&Signature=s{n}&Key-Pair-Id=k",
    "sv=2024-01-0{n}&st=2026-0{n}&se=2027-0{n}&sr=b&sp=r&sig=x%2B{n}",
    "token=t{n}",
    "hdnts=exp=1~hmac={n}",
)


@pytest.mark.parametrize("query", SIGNED)
@pytest.mark.parametrize("own", ["", "versionId=7"])
def test_a_new_signature_is_the_same_file_in_the_cache_and_another_object_never_is(query: str, own: str) -> None:
    shard = type("S", (), {"sha256": "a" * 64, "size": 5})()
    links = [f"http://a/x.tar?{'&'.join(filter(None, (own, query.format(n=n))))}" for n in (1, 2)]
    assert len({cached_name(link, shard) for link in links}) == 1
    assert cached_name(links[0], shard) == cached_name(f"http://me:secret@a/x.tar{'?' * bool(own)}{own}", shard)
    others = [links[0].replace("x.tar", "y.tar"), links[0].replace("//a", "//b"), f"{links[0]}&versionId=8", f"{links[0]}&id={query[-1]}"]
    assert len({cached_name(link, shard) for link in [links[0], *others]}) == 5
    # What looks like a signature may say which file is meant: only a known sha256 tells.
    assert cached_name(links[0], type("S", (), {"sha256": "b" * 64, "size": 5})()) != cached_name(links[0], shard)
    unknown = type("S", (), {"sha256": "", "size": 5})()
    assert cached_name(links[0], unknown) != cached_name(links[1], unknown)


def caches(server: Server, folder: Path, size: int) -> tuple[ShardCache, list[str]]:
    shards = {f"{server.url}/set/{shard.file}": shard for shard in read_manifest(server.folder / "set").shards}
    return ShardCache(replace(FAST, cache=folder, cache_bytes=size), HttpFiles(FAST), shards), list(shards)


def test_the_cache_holds_its_bound_keeps_its_own_and_puts_others_out_oldest_first(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache, urls = caches(server, folder, 25_000)
    assert {shard.size for shard in read_manifest(server.folder / "set").shards} == {10_240}
    for name, age in (("old.tar", 200), ("new.tar", 100)):
        (folder / name).write_bytes(bytes(8_000))
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / ".x.part").write_bytes(b"half")  # of a process that was killed
    left = []
    for url in urls:
        cache.fetch(url)
        left.append([len(list(folder.glob("*-*.tar"))), *sorted(path.name for path in folder.glob("???.tar"))])
    assert left == [[1, "new.tar"], [2], [2]]
    assert not list(folder.glob(".*.part"))
    assert cache.find(urls[0]) == folder / next(name for name in retained(folder) if name == cached_name(urls[0], read_manifest(server.folder / "set").shards[0]))
    assert cache.find(urls[2]) is None


def test_a_shard_that_changed_under_its_manifest_is_not_cached_and_its_samples_are_checked(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, urls = caches(server, tmp_path / "cache", 2**30)
    at, size, _ = read_manifest(server.folder / "set").shards[0].members.table[1, 0].tolist()
    flip(server.folder / "set" / "shard-000000.tar", at + size // 2)
    with caplog.at_level(logging.WARNING):
        cache.fetch(urls[0])
    assert "set/shard-000000.tar is not stored in the cache" in caplog.text
    assert "it is not what its manifest says, by its sha256" in caplog.text
    assert retained(tmp_path / "cache") == []
    found = source(server, tmp_path / "cache")
    assert found[0].key == "0"
    with pytest.raises(DamagedSample):
        found[1]


def test_a_copy_that_was_damaged_on_the_disk_is_put_out_and_the_sample_read_from_the_server(server: Server, tmp_path: Path) -> None:
    cache, urls = caches(server, tmp_path / "cache", 2**30)
    cache.fetch(urls[0])
    at, size, _ = read_manifest(server.folder / "set").shards[0].members.table[1, 0].tolist()
    flip(tmp_path / "cache" / retained(tmp_path / "cache")[0], at + size // 2)
    found = source(server, tmp_path / "cache")
    assert found[1] == local(server)[1]


def test_a_damaged_copy_that_is_open_does_not_put_out_the_good_one_that_another_process_fetched(server: Server, tmp_path: Path) -> None:
    cache, urls = caches(server, tmp_path / "cache", 2**30)
    cache.fetch(urls[0])
    copy = tmp_path / "cache" / retained(tmp_path / "cache")[0]
    good = copy.read_bytes()
    at, size, _ = read_manifest(server.folder / "set").shards[0].members.table[1, 0].tolist()
    flip(copy, at + size // 2)
    found = source(server, tmp_path / "cache")
    assert found[0] == local(server)[0]  # opens the copy
    copy.unlink()  # as another process does that finds the damage first
    cache.fetch(urls[0])
    asked = dict(server.asked)
    assert found[1] == local(server)[1]
    assert copy.read_bytes() == good
    assert dict(server.asked) == asked  # the sample is the good copy's


def test_a_discarded_copy_is_fetched_again_once(server: Server, tmp_path: Path) -> None:
    cache, urls = caches(server, tmp_path / "cache", 2**30)
    for again in (True, True, False):
        assert cache.find(urls[0]) is None
        if not again:
            break
        until(lambda: len(retained(tmp_path / "cache")) == 1)
        assert cache.discard(urls[0])
    time.sleep(0.05)
    assert retained(tmp_path / "cache") == []


def test_a_disk_that_is_full_while_caching_is_one_sentence_and_every_sample_is_read(server: Server, tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: writing beyond it fails in the same place, with another errno."""
    expected = everything(local(server))
    printed = tmp_path / "printed"
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with printed.open("w") as file:
            logging.getLogger("adalink").addHandler(logging.StreamHandler(file))
            cache, urls = caches(server, tmp_path / "cache", 2**30)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            cache.fetch(urls[0])
            if list((tmp_path / "cache").glob(".*.part")):
                os._exit(2)  # what is useless takes room that others need
        os._exit(0 if everything(source(server, tmp_path / "cache")) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
    lines = printed.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(f"is not stored in the cache {tmp_path / 'cache'}: File too large; its samples are read from the server; is the disk full?")
    assert retained(tmp_path / "cache") == []


def test_several_processes_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    cache, urls = caches(server, tmp_path / "cache", 2**30)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            for url in urls:
                cache.fetch(url)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert len(retained(tmp_path / "cache")) == 3
    assert [server.asked[f"set/shard-00000{k}.tar"] for k in range(3)] == [1, 1, 1]


def test_a_cache_that_cannot_be_made_says_so(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the cache .*file/cache cannot be made \(Not a directory\); give another folder"):
        source(server, tmp_path / "file" / "cache")


def test_any_fsspec_url_is_read(tmp_path: Path) -> None:
    made_shards(tmp_path / "set")
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        files.pipe_file(f"/set/{path.name}", path.read_bytes())
    found = ShardSource("memory://set", remote=FAST)
    assert everything(found) == everything(ShardSource(tmp_path / "set"))
    files.rm_file("/set/shard-000001.tar")
    with pytest.raises(DataError, match=r"memory://set/shard-000001.tar is not there; check the URL"):
        ShardSource("memory://set", remote=FAST)
    files.pipe_file("/set/shard-000001.tar", b"short")
    with pytest.raises(DataError, match=r"memory://set/shard-000001.tar has 5 bytes, and manifest.json says"):
        ShardSource("memory://set", remote=FAST)


def test_a_url_without_its_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, command in (("s3://b/set", "pip install s3fs"), ("gs://b/set", "pip install gcsfs")):
        with pytest.raises(ConfigError, match=rf"{url}/manifest.json needs a package that is not here: {command}"):
            ShardSource(url)
    with pytest.raises(ConfigError, match=r"pipe://touch x/manifest.json is of a kind that is not known"):
        ShardSource("pipe://touch x")
    with pytest.raises(ConfigError, match="is a chain of URLs, which is not supported"):
        ShardSource("simplecache::s3://b/set".replace("simplecache::", "zip://x::"))
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"s3://b/set/manifest.json needs a package that is not here: pip install 'adalink\[remote\]'"):
        ShardSource("s3://b/set")


class Failing:
    """A file system whose server refuses, then hangs up."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def _strip_protocol(self, url: str) -> str:
        return url.partition("://")[2]

    def size(self, path: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error, stated",
    [(PermissionError("no credentials"), r"may not be read \(no credentials\); are the credentials set as s3fs wants them"),
     (ConnectionResetError("by peer"), "cannot be read: ConnectionResetError by peer, in the last of 2 attempts")],
)  # fmt: skip
def test_what_fsspec_raises_becomes_a_sentence(error: OSError, stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from multimodal.data.shards import storage as fsspec_files

    monkeypatch.setattr(fsspec_files, "_opened", lambda url, settings: (Failing(error), "b"))
    with pytest.raises(DataError, match=stated):
        fsspec_files.FsspecFiles(FAST).size("s3://a/b")
