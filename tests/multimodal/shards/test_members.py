"""Indexes beside shards: read when their shard is first read, shared, bounded, and every way in which one is not what its manifest names."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bad_server import served
from made_shards import ListSource, as_first_form, everything, flip, made_sample, made_shards, tar_of

from adalink.errors import ConfigError, DataError
from multimodal.data.order import BucketedOrder, SampleOrder
from multimodal.data.shards import members as members_module
from multimodal.data.shards import opening
from multimodal.data.shards.check import verify_shards, write_indexes
from multimodal.data.shards.manifest import read_manifest, write_manifest
from multimodal.data.shards.members import (
    LocalFolder,
    Members,
    Shard,
    ShardTable,
    StoredMembers,
    encode_index,
    find_twice,
    store_index,
    text_sizes,
)
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings
from multimodal.data.shards.writer import write_shards
from multimodal.sample import DamagedSample, Sample, lengths_digest

BEFORE = Path(__file__).parents[2] / "fixtures" / "before" / "shards"
TABLE = np.array([[[512, 100, 7], [1536, 10, 8], [-1, -1, -1]], [[2560, 0, 0], [-1, -1, -1], [3072, 5, -1]]])


def old_fingerprint(folder: Path) -> str:
    """The formula of the first form, from its document alone."""
    digest = hashlib.sha256()
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        table = np.full((shard["samples"], 3, 3), -1, dtype=np.int64)
        for number, part in enumerate(("image", "json", "txt")):
            if part in shard:
                table[:, number] = np.array(shard[part]).reshape(-1, 3)
        digest.update(f"{shard['bytes']} {shard['sha256']} {shard['samples']}\n".encode() + "".join(shard["keys"]).encode() + table.tobytes())
    return digest.hexdigest()


def test_an_index_is_read_as_it_was_written_and_shares_the_memory_of_its_file(tmp_path: Path) -> None:
    shard = Shard(file="a.tar", size=10240, sha256="ab" * 32, members=Members(("1", "é\0\n"), TABLE))
    stored = store_index(shard, tmp_path)
    assert (tmp_path / "a.idx").stat().st_size == 80 + 2 * 80 + 5
    found = stored.members.load() if isinstance(stored.members, StoredMembers) else None
    assert found is not None
    assert (found.table.tolist(), list(found.all_keys()), found.key(1), found.largest) == (TABLE.tolist(), ["1", "é\0\n"], "é\0\n", (100, 10))
    assert not found.table.flags.writeable
    assert not found.table.flags.owndata
    assert text_sizes(found.table).tolist() == [10, 5]
    empty = store_index(replace(shard, members=Members((), np.empty((0, 3, 3), dtype=np.int64))), tmp_path)
    assert (list(empty.members.all_keys()), empty.members.largest, len(empty.members.table)) == ([], (0, 0), 0)


def test_opening_reads_no_index_and_a_sample_reads_its_own(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    for name in ("shard-000000.idx", "shard-000002.idx"):
        (tmp_path / name).unlink()
    source = ShardSource(tmp_path)
    assert (len(source), source.shard_sizes.tolist()) == (10, [4, 4, 2])
    assert [source[index] for index in (4, 7)] == [written[4], written[7]]
    with pytest.raises(DataError, match=r"the index .*shard-000000.idx cannot be opened: No such file or directory; fetch it again, or run `adalink"):
        source[0]


def test_indexes_are_bounded_in_bytes_and_every_sample_is_right_while_they_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = made_shards(tmp_path, 40, 4)
    one = len(encode_index(read_manifest(tmp_path).shards[0]))
    monkeypatch.setattr(opening, "_MAPPED", 3 * one)
    source = ShardSource(tmp_path)
    for index in [(start * 7) % 40 for start in range(80)]:
        assert source[index] == written[index]
        assert len(source._touched._open) <= 3
    assert everything(pickle.loads(pickle.dumps(source))) == written.samples
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.__getitem__, range(40)) == written.samples


def test_a_manifest_of_the_first_form_is_read_with_the_same_fingerprint_which_an_upgrade_retains(tmp_path: Path) -> None:
    written = made_shards(tmp_path / "a")
    present = ShardSource(tmp_path / "a")
    fingerprint, lengths = present.fingerprint, np.asarray(present.text_lengths(len)).tolist()  # type: ignore[arg-type]
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    as_first_form(tmp_path / "a")
    older = ShardSource(tmp_path / "a")
    assert everything(older) == written.samples
    assert fingerprint == older.fingerprint == old_fingerprint(tmp_path / "a")
    assert np.asarray(older.text_lengths(len)).tolist() == lengths  # type: ignore[arg-type]
    assert write_indexes(tmp_path / "a") == 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert write_indexes(tmp_path / "a") == 0


def test_a_set_of_an_earlier_version_has_the_fingerprint_that_its_runs_hold(tmp_path: Path) -> None:
    assert ShardSource(BEFORE).fingerprint == old_fingerprint(BEFORE)
    shutil.copytree(BEFORE, tmp_path / "set")
    write_indexes(tmp_path / "set")
    found = ShardSource(tmp_path / "set")
    assert (found.fingerprint, everything(found)) == (old_fingerprint(BEFORE), everything(ShardSource(BEFORE)))
    assert verify_shards(tmp_path / "set") == ()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def of_another_set(path: Path) -> None:
    write_shards(ListSource([made_sample(n) for n in range(20, 24)]), path.parent / "other")
    shutil.copy(path.parent / "other" / "shard-000000.idx", path)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, r"shard-000001.idx is cut or damaged: it has \d+ bytes, and its head says \d+; fetch it again, or run `adalink shards check --upgrade true`"),
    "cut in its head": (lambda path: os.truncate(path, 79), "shard-000001.idx is cut: it has 79 bytes, and its head alone 80"),
    "of no bytes": (lambda path: os.truncate(path, 0), "shard-000001.idx is cut: it has 0 bytes"),
    "a bit in its places": (lambda path: flip(path, 100), "shard-000001.idx is damaged, by its check sum; fetch it again"),
    "a bit in its last key": (lambda path: flip(path, path.stat().st_size - 1), "shard-000001.idx is damaged, by its check sum"),
    "a bit in its format": (lambda path: flip(path, 0), "shard-000001.idx is damaged: it begins with b'`dalink index 1"),
    "a bit in its count": (lambda path: flip(path, 16), "shard-000001.idx is cut or damaged"),
    "newer": (lambda path: flip(path, 14, 3), "shard-000001.idx is of a newer version, 'index 2', and this one reads 'index 1'; update adalink"),
    "of another set": (of_another_set, "shard-000001.idx is not the one that manifest.json names: it, or its shard, was replaced since"),
    "missing": (lambda path: path.unlink(), "shard-000001.idx cannot be opened: No such file or directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_that_is_not_what_its_manifest_names_is_one_sentence_and_nothing_is_read_by_it(tmp_path: Path, fault: str) -> None:
    written = made_shards(tmp_path)
    FAULTS[fault][0](tmp_path / "shard-000001.idx")
    source = ShardSource(tmp_path)
    for index in (4, 5, 4):
        with pytest.raises(DataError, match=FAULTS[fault][1]) as caught:
            source[index]
        assert not isinstance(caught.value, DamagedSample)  # the run stops: no sample is left out for it
        assert "\n" not in str(caught.value)
    assert [source[index] for index in (0, 3, 8, 9)] == [written[index] for index in (0, 3, 8, 9)]
    (found,) = [each for each in verify_shards(tmp_path) if each.reason == "damaged index"]
    assert found.file == "shard-000001.tar"
    # It is made again from its shard, to the last bit.
    assert write_indexes(tmp_path) == 1
    assert verify_shards(tmp_path) == ()
    assert everything(ShardSource(tmp_path)) == written.samples


def test_an_index_is_not_made_again_from_another_shard(tmp_path: Path) -> None:
    made_shards(tmp_path)
    (tmp_path / "shard-000001.idx").unlink()
    flip(tmp_path / "shard-000001.tar", 600)
    with pytest.raises(DataError, match=r"the index of .*shard-000001.tar cannot be made again: the shard is not the one that was written"):
        write_indexes(tmp_path)


def rewritten(folder: Path, change: Callable[[Members], Members]) -> None:
    """The set with another index for its second shard, which its manifest names."""
    shards = list(read_manifest(folder).shards)
    shards[1] = replace(shards[1], members=change(shards[1].members))
    write_manifest(replace(read_manifest(folder), shards=tuple(shards), known=None), folder)


def test_an_index_that_disagrees_with_its_shard_is_found_by_the_check_and_by_every_read(tmp_path: Path) -> None:
    written = made_shards(tmp_path)

    def exchanged(members: Members) -> Members:
        return Members(list(members.all_keys()), members.table[[1, 0, 2, 3]])

    rewritten(tmp_path, exchanged)
    (fault,) = verify_shards(tmp_path)
    assert (fault.reason, fault.detail) == (
        "wrong index",
        f"the index of {tmp_path / 'shard-000001.tar'} disagrees with its shard at 2 samples: '4', '5'",
    )

    def moved(members: Members) -> Members:
        return Members(list(members.all_keys()), members.table + np.where(members.table[:, :, [0]] > 0, [1, 0, 0], 0))

    rewritten(tmp_path, moved)
    assert [fault.reason for fault in verify_shards(tmp_path)] == ["wrong index"]
    source = ShardSource(tmp_path)
    for index in range(4, 8):
        with pytest.raises(DamagedSample, match=f"'{index}' in .*shard-000001.tar, from byte"):
            source[index]
    assert source[8] == written[8]


def test_an_index_of_another_size_than_its_line_says_disagrees(tmp_path: Path) -> None:
    made_shards(tmp_path)
    shard = read_manifest(tmp_path).shards[1]
    store_index(replace(shard, members=shard.members.load(), size=shard.size + 512), tmp_path)  # type: ignore[attr-defined]
    digest = hashlib.sha256((tmp_path / "shard-000001.idx").read_bytes()).hexdigest()
    row = ("shard-000001.tar", shard.size, shard.sha256, 4, digest, (1, 1))
    with pytest.raises(DataError, match=r"disagrees with its shard: it is of 4 samples in 10752 bytes, and manifest.json says 4 in 10240, or another"):
        ShardTable.of_rows([row], LocalFolder(tmp_path))[0].members.key(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:80] + (-512).to_bytes(8, "little", signed=True) + data[88:], "an offset of 'a.tar' lies outside its 10240 bytes"),
        (lambda data: data[:224] + (9).to_bytes(8, "little") + data[232:], "its keys have no place"),
        (lambda data: data[:224] + (2).to_bytes(8, "little") + data[232:], "a key ends within a letter"),
        (lambda data: data[:-1] + b"\xff", "'utf-8' codec"),
    ],
)
def test_what_a_well_summed_index_says_is_checked(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    """A set may come from anybody: its check sums are theirs."""
    shard = Shard(file="a.tar", size=10240, sha256="", members=Members(("1", "é\0\n"), TABLE))
    data = change(encode_index(shard))
    (tmp_path / "a.idx").write_bytes(data)
    stored = LocalFolder(tmp_path).members("a.tar", 10240, "", 2, hashlib.sha256(data).hexdigest(), (1, 1))
    with pytest.raises(DataError, match=f"the index .*a.idx is damaged: .*{message}"):
        stored.key(0)


def test_a_shard_replaced_under_the_same_name_gives_no_wrong_sample(tmp_path: Path) -> None:
    """Of the same size and whole: its samples are not those that the index names, and each is one bad sample."""
    made_shards(tmp_path, 8, 4)
    write_shards(ListSource([made_sample(n, str(n - 4)) for n in range(4, 8)]), tmp_path / "other", samples_per_shard=4)
    source = ShardSource(tmp_path)
    assert (tmp_path / "other" / "shard-000000.tar").stat().st_size == (tmp_path / "shard-000000.tar").stat().st_size
    shutil.move(tmp_path / "other" / "shard-000000.tar", tmp_path / "shard-000000.tar")
    for opened in (source, ShardSource(tmp_path)):
        for index in range(4):
            with pytest.raises(DamagedSample, match="is not what was written; fetch or write the shard again"):
                opened[index]
    assert source[4].key == "4"
    assert {fault.reason for fault in verify_shards(tmp_path)} == {"damaged samples"}


def test_keys_are_compared_in_parts_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(*keys: str) -> Shard:
        return Shard(file="a.tar", size=10240, sha256="", members=Members(keys, TABLE[[0] * len(keys)]))

    unique = [shard(*(f"{n}-{k}" for k in range(50))) for n in range(20)]
    for at_once in (2**24, 100):
        monkeypatch.setattr(members_module, "_AT_ONCE", at_once)
        assert find_twice(unique) is None
        assert find_twice([*unique, shard("x", "7-31")]) == ("7-31", 7, 20)
        assert find_twice([]) is None
    monkeypatch.setattr(members_module, "hash", lambda key: len(key), raising=False)  # every hash meets others: the keys themselves decide
    assert find_twice(unique) is None
    assert find_twice([*unique, shard("x", "7-31")]) == ("7-31", 7, 20)


def test_a_list_of_a_whole_set_is_the_set_and_a_part_of_it_is_another(tmp_path: Path) -> None:
    made_shards(tmp_path)
    whole, paths = ShardSource(tmp_path), sorted(tmp_path.glob("*.tar"))
    assert ShardSource(paths).fingerprint == whole.fingerprint
    parts = [ShardSource(some).fingerprint for some in (paths[:2], paths[1:], paths[::-1])]
    assert len({whole.fingerprint, *parts}) == 4
    with pytest.raises(DataError, match="both have the key '4'"):
        ShardSource([paths[1], paths[1]])


def test_lists_over_sets_compare_their_keys(tmp_path: Path) -> None:
    for name in "ab":
        made_shards(tmp_path / name)
    as_first_form(tmp_path / "b")
    tar_of(tmp_path / "c.tar", [("x.jpg", b"1"), ("x.txt", b"2")])
    paths = [tmp_path / "b" / "shard-000002.tar", tmp_path / "c.tar", tmp_path / "a" / "shard-000000.tar"]
    found = ShardSource(paths)
    assert [sample.key for sample in everything(found)] == ["8", "9", "x", "0", "1", "2", "3"]
    assert found.shard_sizes.tolist() == [2, 1, 4]
    with pytest.raises(DataError, match=r"the shards .*a/shard-000000.tar and .*b/shard-000000.tar both have the key '0'"):
        ShardSource([paths[2], tmp_path / "b" / "shard-000000.tar"])


FAST = RemoteSettings(attempts=2, first_wait=0.01)


def test_an_index_on_a_server_is_one_request_and_one_for_a_machine_with_a_cache(tmp_path: Path) -> None:
    written = made_shards(tmp_path / "web" / "set")
    with served(tmp_path / "web") as server:
        found = ShardSource(server.url + "/set", remote=FAST)
        assert not [name for name in server.asked if name.endswith(".idx")]
        assert everything(found) == everything(found) == written.samples
        assert [server.asked[f"set/shard-00000{n}.idx"] for n in range(3)] == [1, 1, 1]
        cached = ShardSource(server.url + "/set", remote=replace(FAST, cache=tmp_path / "cache"))
        with multiprocessing.get_context("fork").Pool(4) as pool:
            assert pool.map(cached.__getitem__, list(range(10)) * 4) == written.samples * 4
        assert [server.asked[f"set/shard-00000{n}.idx"] for n in range(3)] == [2, 2, 2]
        (damaged, *_) = (tmp_path / "cache" / "indexes").glob("*.idx")
        flip(damaged, 100)
        assert everything(ShardSource(server.url + "/set", remote=replace(FAST, cache=tmp_path / "cache"))) == written.samples
        assert sum(server.asked[f"set/shard-00000{n}.idx"] for n in range(3)) == 7
        flip(tmp_path / "web" / "set" / "shard-000001.idx", 100)
        with pytest.raises(DataError, match=r"the index http://[^?]*/set/shard-000001.idx is damaged, by its check sum"):
            ShardSource(server.url + "/set?token=secret", remote=FAST)[4]


def test_cached_indexes_are_bounded_and_the_first_written_leave_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "indexes"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.idx").write_bytes(bytes(100))
        os.utime(folder / f"{number}.idx", (number, number))
    (folder / ".lock").write_bytes(bytes(1000))
    opening._make_room(folder, 800)
    assert len(list(folder.glob("*.idx"))) == 8
    opening._make_room(folder, 799)
    assert sorted(path.name for path in folder.glob("*.idx")) == [f"{number}.idx" for number in range(3, 8)]
    opening._make_room(tmp_path / "absent", 0)
    written = made_shards(tmp_path / "web" / "set", 40, 1)
    looked: list[int] = []
    monkeypatch.setattr(opening, "_make_room", lambda folder, most, real=opening._make_room: looked.append(most) or real(folder, most))
    with served(tmp_path / "web") as server:
        found = ShardSource(server.url + "/set", remote=replace(FAST, cache=tmp_path / "cache", cache_bytes=32 * 400))
        assert [everything(found) for _ in range(2)] == [written.samples] * 2
    digests = [str(row) for row in read_manifest(tmp_path / "web" / "set").table.rows["index"].astype(str)]
    assert looked == [400] * sum(digest < "08" for digest in digests)


def test_an_index_that_was_compared_is_opened_again_as_it_is_and_one_that_changed_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = made_shards(tmp_path)
    monkeypatch.setattr(opening, "_MOST_MAPPED", 1)
    source = ShardSource(tmp_path)
    compared: list[int] = []
    monkeypatch.setattr(members_module, "check_places", lambda table, size, file: compared.append(len(table)))
    for _ in range(3):
        assert everything(source) == written.samples
    assert compared == [4, 4, 2]
    data = (tmp_path / "shard-000001.idx").read_bytes()
    (tmp_path / "shard-000001.idx").write_bytes(data)
    os.utime(tmp_path / "shard-000001.idx", (1, 1))
    assert everything(source) == written.samples
    assert compared == [4, 4, 2, 4]
    flip(tmp_path / "shard-000002.idx", 100)
    os.utime(tmp_path / "shard-000002.idx", (1, 1))
    assert source[0] == written[0]
    with pytest.raises(DataError, match=r"shard-000002.idx is damaged, by its check sum"):
        source[8]


def test_of_many_shards_on_a_server_some_are_asked_for_at_the_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_shards(tmp_path / "web" / "set", 20, 2)
    monkeypatch.setattr(opening, "_ASKED", 4)
    with served(tmp_path / "web") as server:
        found = ShardSource(server.url + "/set", remote=FAST)
        assert [number for number in range(10) if server.asked[f"set/shard-{number:06d}.tar"]] == [0, 3, 6, 9]
        os.truncate(tmp_path / "web" / "set" / "shard-000001.tar", 5)
        with pytest.raises(DataError, match=r"shard-000001.tar"):
            found[2]


def test_a_sample_knows_nothing_of_the_form_of_its_manifest(tmp_path: Path) -> None:
    made_shards(tmp_path)
    samples: list[Sample] = everything(ShardSource(tmp_path))
    as_first_form(tmp_path)
    assert everything(ShardSource(tmp_path)) == samples


def test_lengths_of_texts_are_read_shard_by_shard_and_their_check_sum_is_the_manifests(tmp_path: Path) -> None:
    made_shards(tmp_path, 40, 4)
    source = ShardSource(tmp_path)
    lengths = source.text_lengths(len)  # type: ignore[arg-type]
    whole = np.concatenate([text_sizes(shard.members.table) for shard in read_manifest(tmp_path).shards])
    assert source._touched._open == {}
    assert lengths[np.array([9, 8, 1, 9])].tolist() == whole[[9, 8, 1, 9]].tolist()
    assert sorted(source._touched._open) == [0, 2]
    assert lengths[np.empty(0, dtype=np.int64)].tolist() == []
    assert (len(lengths), np.asarray(lengths).tolist()) == (40, whole.tolist())
    assert lengths_digest(lengths) == hashlib.sha256(whole.tobytes()).hexdigest() == lengths_digest(whole)
    stored, in_memory = (BucketedOrder(SampleOrder(40, 3), each, seed=3, pool=3, batch=4) for each in (lengths, whole))
    assert [stored.sample(position) for position in range(100)] == [in_memory.sample(position) for position in range(100)]
    assert stored.state() == in_memory.state()


def test_patterns_name_folders_and_tar_files(tmp_path: Path) -> None:
    for name in ("set-08", "set-09", "set-10"):
        write_shards(ListSource([made_sample(n, f"{name}/{n}") for n in range(3)]), tmp_path / name, samples_per_shard=2)

    def keys(*names: Path | str) -> list[str]:
        return [sample.key for sample in everything(ShardSource(names))]

    every = [f"set-{n}/{k}" for n in ("08", "09", "10") for k in range(3)]
    for pattern in ("set-*", "set-{08..10}", "set-{08..10}/shard-{000000..000001}.tar", "set-*/*.tar", "set-??/*"):
        assert keys(str(tmp_path / pattern)) == every
    assert keys(str(tmp_path / "set-1*"), tmp_path / "set-08" / "shard-000001.tar") == [*every[6:], every[2]]
    (tmp_path / "set-08").rename(tmp_path / "{08..10}[1]")
    assert keys(tmp_path / "{08..10}[1]") == keys(str(tmp_path / "{08..10}[1]")) == every[:3]  # a name that is there is no pattern
    with pytest.raises(ConfigError, match=r"no folder and no tar file matches the shards '.*/x\*'; check the path and the pattern"):
        keys(str(tmp_path / "x*"))
    with pytest.raises(ConfigError, match=r"the range \{10\.\.08\} of the shards .*set-\{10\.\.08\} ends before it begins"):
        keys(str(tmp_path / "set-{10..08}"))


def test_lists_of_urls_are_folders_and_single_shards_of_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(ListSource([made_sample(n, f"{name}{n}") for n in range(4)]), tmp_path / "web" / name, samples_per_shard=2)
    with served(tmp_path / "web") as server:

        def keys(*names: str) -> list[str]:
            return [sample.key for sample in everything(ShardSource([f"{server.url}/{name}" for name in names], remote=FAST))]

        assert keys("b", "a") == ["b0", "b1", "b2", "b3", "a0", "a1", "a2", "a3"]
        assert keys("a/shard-{000000..000001}.tar", "b/shard-000001.tar") == ["a0", "a1", "a2", "a3", "b2", "b3"]
        with pytest.raises(DataError, match=r"http://.*/a/shard-000002.tar is not in the manifest of its folder; check the name"):
            keys("a/shard-000002.tar?token=secret")
        with pytest.raises(ConfigError, match=r"http://[^?]*/\*\.tar would need a list of what is on the server: give a range"):
            keys("*.tar?token=secret")
        with pytest.raises(ConfigError, match="the shards of one set are read from disks and web servers: give several sets, with mix"):
            ShardSource([server.url + "/a", tmp_path / "web" / "b"], remote=FAST)


def test_the_study_of_a_large_set_runs_at_a_small_size(tmp_path: Path) -> None:
    from studies import large_index

    large_index.make(tmp_path, 12, 20)
    opened = large_index.opening(tmp_path)
    assert opened["samples"] == 240
    assert set(large_index.finding(tmp_path, 4, 20)) == {f"{which} epoch, {what}" for which in ("one", "any") for what in ("median", "99 %", "most")}
    large_index.first_form(tmp_path, 3)
    assert large_index.opening(tmp_path / "older")["samples"] == 60
    found = large_index.workers(tmp_path, 4, 2, batches=4)
    assert (found["workers"], found["samples"]) == (2, 4 * 64)
