"""A disk that is really full: a small tmpfs, where the tests may mount one; elsewhere limits on file sizes stand for it."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_server import served
from made_shards import as_first_form, everything, made_shards, made_source
from shared import PATIENCE

from adalink.errors import DataError
from multimodal.data.order import reading_plan
from multimodal.data.shards.cache import ShardCache
from multimodal.data.shards.check import write_indexes
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.order import ShardOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings, remote_files
from multimodal.data.shards.writer import write_shards


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A folder on a disk of so many KiB, in pages of four."""
    folder.mkdir()
    size = f"size={kib}k"
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 8 KiB, less than one shard."""
    with small_disk(tmp_path / "disk", 8) as folder:
        yield folder


def test_a_writing_is_whole_or_leaves_nothing_wherever_the_disk_ends(tmp_path: Path) -> None:
    """In a tar file, in an index, in the notes of a shard, in the manifest: three shards of three pages each, and a page for each of the others."""
    ended = []
    for kib in (8, 12, 16, 24, 36, 48, 60, 64, 68, 200):
        with small_disk(tmp_path / str(kib), kib) as disk:
            try:
                write_shards(made_source(10), disk / "out", samples_per_shard=4, workers=1)
                ended.append("whole")
            except DataError as error:
                ended.append(str(error))
            left = everything(ShardSource(disk / "out")) if (disk / "out").exists() else []
            assert left == (made_source(10).samples if ended[-1] == "whole" else [])
    assert ended[-1] == "whole"
    assert {one.partition(" cannot")[0].rpartition(".")[2] for one in ended} >= {"tar", "idx", "json", "whole"}
    assert [one for one in ended if not one.endswith(("whole", "is the disk full?", "is its folder there, writable and not full?"))] == []


def test_a_set_whose_indexes_do_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    made_shards(tmp_path / "set")
    fingerprint = ShardSource(tmp_path / "set").fingerprint
    as_first_form(tmp_path / "set")
    with small_disk(tmp_path / "disk", 48) as disk:  # ten pages of the set, and one or two indexes
        shutil.copytree(tmp_path / "set", disk / "set")
        with pytest.raises(DataError, match=r"shard-00000\d.idx cannot be written: No space left on device; is its folder there, writable and not full"):
            write_indexes(disk / "set")
        found = ShardSource(disk / "set")
        assert (found.fingerprint, everything(found)) == (fingerprint, made_source(10).samples)


def test_shards_that_do_not_fit_on_the_disk_are_read_from_the_server(disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_shards(tmp_path / "web" / "set")
    local = ShardSource(tmp_path / "web" / "set")
    with served(tmp_path / "web") as server, caplog.at_level(logging.WARNING, logger="adalink"):
        settings = RemoteSettings(attempts=2, first_wait=0.01, timeout=PATIENCE, cache=disk / "cache", cache_bytes=2**30)
        shards = {f"{server.url}/set/{shard.file}": shard for shard in read_manifest(tmp_path / "web" / "set").shards}
        cache = ShardCache(settings, remote_files(server.url, settings), shards)
        for url in shards:
            cache.fetch(url)
        lines = [message for record in caplog.records if str(disk) in (message := record.getMessage())]
        assert [line.rpartition(": ")[2] for line in lines] == [
            "No space left on device; its samples are read from the server; is the disk full?"
        ] * len(shards)
        assert everything(ShardSource(server.url + "/set", remote=settings)) == everything(local)
    assert not list((disk / "cache").glob("*.tar"))


def test_windows_of_shards_that_do_not_fit_on_the_disk_are_read_from_the_server(disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_shards(tmp_path / "web" / "set")
    local = ShardSource(tmp_path / "web" / "set")
    order = ShardOrder(local.shard_sizes, 2, 0)
    with served(tmp_path / "web") as server, caplog.at_level(logging.WARNING, logger="adalink"):
        found = ShardSource(server.url + "/set", remote=RemoteSettings(attempts=2, first_wait=0.01, timeout=PATIENCE, cache=disk / "cache"))
        plan = reading_plan(order)[0]
        assert plan is not None
        ahead = found.follow(plan)
        assert ahead is not None
        for position in range(20):
            ahead.at(position)
            assert found[order.sample(position)] == local[order.sample(position)]
        # Threads of other tests may still fetch, and this one's after the server has ended.
        lines = [message for record in caplog.records if str(disk) in (message := record.getMessage())]
        assert {line.rpartition(": ")[2] for line in lines} <= {
            "No space left on device; its samples are read from the server; is the disk full?",
            "No space left on device; samples that are not in it are read from the server; is the disk full?",
        }
        assert lines
    assert not list((disk / "cache").glob("*.tar"))


def test_a_writing_that_fills_the_disk_says_so_and_leaves_nothing(disk: Path) -> None:
    with pytest.raises(DataError, match=r"\.tar cannot be written: No space left on device; is the disk full\?"):
        write_shards(made_source(100), disk / "out", samples_per_shard=60)
    assert not (disk / "out").exists()
