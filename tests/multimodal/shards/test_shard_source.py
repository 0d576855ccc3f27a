from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from made_shards import ListSource, everything, flip, image, made_sample, made_shards, made_source, tar_of

from adalink.errors import DataError
from multimodal.data.shards import opening
from multimodal.data.shards import reader as shard_files_module
from multimodal.data.shards.index import ShardLimits
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import DamagedSample, Sample, SampleSource


def test_any_order_gives_the_samples_that_were_written(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    source: SampleSource = ShardSource(tmp_path)
    assert len(source) == 10
    for index in (9, 0, 4, 3, 8, 7, 0):
        assert source[index] == written[index]
    assert source[-1] == written[9]
    for beyond in (10, -11):
        with pytest.raises(IndexError, match=f"sample {beyond} of 10"):
            source[beyond]


def test_places_sizes_and_bytes_of_shards_are_those_on_disk_in_the_order_of_the_indices(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    source = ShardSource(tmp_path)
    assert [str(place) for place in source.places] == [str(tmp_path / f"shard-00000{n}.tar") for n in range(3)]
    assert list(source.places[1:]) == [source.places[1], source.places[-1]]
    assert (source.shard_sizes.dtype, source.shard_sizes.tolist()) == (np.int64, [4, 4, 2])
    assert source.shard_bytes.tolist() == [Path(place).stat().st_size for place in source.places]
    assert [source[index].key for index in (3, 4, 7, 8)] == [written[index].key for index in (3, 4, 7, 8)]


def test_a_list_of_tar_files_is_read_in_its_own_order_with_or_without_their_manifest(tmp_path: Path) -> None:
    written = made_shards(tmp_path / "a")
    paths = [tmp_path / "a" / f"shard-00000{n}.tar" for n in (2, 0)]
    right = written.samples[8:] + written.samples[:4]
    assert everything(ShardSource(paths)) == right
    (tmp_path / "a" / "manifest.json").unlink()
    assert everything(ShardSource(paths)) == right


def test_shards_without_a_manifest_give_the_same_samples(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert everything(ShardSource(tmp_path)) == written.samples


def test_the_manifests_order_counts_and_not_the_names(tmp_path: Path) -> None:
    write_shards(made_source(3), tmp_path, samples_per_shard=1, prefix="z")
    assert [sample.key for sample in everything(ShardSource(tmp_path))] == ["0", "1", "2"]


def foreign(folder: Path) -> Path:
    """Two shards as img2dataset writes them."""
    folder.mkdir()
    for number in range(2):
        members = []
        for n in (0, 1):
            key = f"{number:05d}{n:04d}"
            members += [
                (f"{key}.jpg", image(n)),
                (f"{key}.json", b'{"key": "%s", "caption": "json %d"}' % (key.encode(), n)),
                (f"{key}.txt", b"text %d" % n),
            ]
        tar_of(folder / f"{number:05d}.tar", members)
    return folder


def test_img2datasets_shards_are_samples_whose_ids_are_their_places(tmp_path: Path) -> None:
    assert everything(ShardSource(foreign(tmp_path / "s"))) == [
        Sample(key=f"{n // 2:05d}{n % 2:04d}", image_id=n, image=image(n % 2), captions=(f"json {n % 2}",)) for n in range(4)
    ]


def test_a_text_member_is_the_caption_where_the_json_has_none(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"text"), ("b.jpg", b"2"), ("b.json", b'{"image_id": 7}'), ("b.txt", b"more")])
    assert [(sample.image_id, sample.captions) for sample in everything(ShardSource(tmp_path))] == [(0, ("text",)), (7, ("more",))]


def test_members_far_apart_are_read_one_by_one(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.jpg", image(1)), ("b.jpg", bytes(10**6)), ("b.txt", b"b"), ("a.txt", b"text")])
    found = ShardSource(tmp_path)[0]
    assert (found.image, found.captions) == (image(1), ("text",))


def test_what_cannot_be_used_is_in_problems_and_what_is_never_read_is_counted(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"a"), ("b.jpg", b"2"), ("c.txt", b"3"), ("a.pkl", b"4"), ("d.jpg", b"55"), ("d.txt", b"d")]
    tar_of(tmp_path / "a.tar", members)
    source = ShardSource(tmp_path, limits=ShardLimits(max_image_bytes=1))
    assert [(bad.key, bad.reason) for bad in source.problems] == [("b", "no text"), ("c", "no image"), ("d", "too many bytes")]
    assert (len(source), source.ignored) == (1, {"pkl": 1})


def test_limits_hold_for_shards_with_a_manifest_too(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    limit = len(written[5].image)
    source = ShardSource(tmp_path, limits=ShardLimits(max_image_bytes=limit))
    retained = [sample for sample in written.samples if len(sample.image) <= limit]
    assert 0 < len(retained) < 10
    assert everything(source) == retained
    assert {bad.reason for bad in source.problems} == {"too many bytes"}
    assert len(source.problems) == 10 - len(retained)
    short = ShardSource(tmp_path, limits=ShardLimits(max_text_bytes=200))
    assert {bad.reason for bad in short.problems} == {"too much text"}


def test_a_set_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no shards in .*; expected files that end in .tar"):
        ShardSource(tmp_path)
    with pytest.raises(DataError, match="the list of shards is empty; give at least one tar file"):
        ShardSource([])
    with pytest.raises(DataError, match=r"the shards folder .*absent cannot be listed: No such file or directory"):
        ShardSource(tmp_path / "absent")
    tar_of(tmp_path / "a.tar", [("a.jpg", b"1")])
    with pytest.raises(
        DataError, match=r"hold no sample; 1 cannot be used, the first because 'a' of .*a.tar has neither a json nor a txt member"
    ):
        ShardSource(tmp_path)


def test_compressed_shards_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.tgz", "a.tar.zst"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name} is compressed, which allows no random access; unpack it to a plain .tar"):
            ShardSource(tmp_path)
        (tmp_path / name).unlink()


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        tar_of(tmp_path / folder / "a.tar", [("k.jpg", b"1"), ("k.txt", b"2")])
    paths = [tmp_path / "x" / "a.tar", tmp_path / "y" / "a.tar"]
    with pytest.raises(DataError, match=r"the shards .*x/a.tar and .*y/a.tar both have the key 'k'; keys must be unique in a data set"):
        ShardSource(paths)
    with pytest.raises(DataError, match=r"both have the key 'k'"):
        ShardSource([paths[0], paths[0]])


def test_a_copy_in_a_worker_process_opens_its_own_files(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    source = ShardSource(tmp_path)
    source[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.__getitem__, [9, 0]) == [written[9], written[0]]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.__getitem__, range(10)) == written.samples


def test_a_source_pickles_small(tmp_path: Path) -> None:
    source = made_shards(tmp_path / "a", count=200, samples_per_shard=50)
    found = ShardSource(tmp_path / "a")
    everything(found)
    assert len(pickle.dumps(found)) < 200 * 90 + 4000 < len(pickle.dumps(source))


def test_more_shards_than_open_files_are_read_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files_module, "_OPEN_FILES", 2)
    monkeypatch.setattr(opening, "_MOST_MAPPED", 2)
    written = write_and_give(tmp_path, 12)
    source = ShardSource(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    wrong: list[int] = []

    def read(start: int) -> None:
        wrong.extend(index for turn in range(60) for index in [(start + turn * 5) % 12] if source[index] != written[index])

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) - before <= 4


def write_and_give(folder: Path, count: int) -> ListSource:
    source = made_source(count)
    write_shards(source, folder, samples_per_shard=1)
    return source


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    made_shards(tmp_path / "a")
    made_shards(tmp_path / "b")
    write_shards(ListSource([made_sample(1)]), tmp_path / "c")
    a, b, c = (ShardSource(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_shard_that_was_moved_or_changed_under_its_manifest_is_named_at_opening(tmp_path: Path) -> None:
    made_shards(tmp_path)
    shutil.copy(tmp_path / "shard-000002.tar", tmp_path / "kept")
    os.truncate(tmp_path / "shard-000002.tar", 5000)
    with pytest.raises(DataError, match=r"shard-000002.tar has 5000 bytes, and manifest.json says 10240; write or fetch it again"):
        ShardSource(tmp_path)
    (tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar, which manifest.json names, cannot be opened: No such file or directory"):
        ShardSource(tmp_path)
    shutil.copy(tmp_path / "kept", tmp_path / "shard-000002.tar")
    assert len(ShardSource(tmp_path)) == 10


def test_a_shard_that_is_cut_or_gone_after_the_opening_is_named_at_the_read(tmp_path: Path) -> None:
    made_shards(tmp_path)
    source = ShardSource(tmp_path)
    os.truncate(tmp_path / "shard-000002.tar", 1000)
    with pytest.raises(DataError, match=r"shard-000002.tar was cut at byte 1000 since it was opened; write or fetch it again") as caught:
        source[9]
    assert not isinstance(caught.value, DamagedSample)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar cannot be read: No such file or directory; is it still there\?"):
        source[4]


def test_a_flipped_bit_is_one_damaged_sample_and_the_others_stay(tmp_path: Path) -> None:
    written = made_shards(tmp_path)
    place = read_manifest(tmp_path).shards[1].members.table[2]
    for part, (at, size, _) in zip(("image", "json"), place.tolist(), strict=False):
        flip(tmp_path / "shard-000001.tar", at + size // 2)
        source = ShardSource(tmp_path)
        with pytest.raises(
            DamagedSample, match=rf"the {part} of '6' in .*shard-000001.tar, from byte {at} on, is not what was written"
        ) as caught:
            source[6]
        assert (caught.value.bad.key, caught.value.bad.reason) == ("6", "damaged bytes")
        assert [source[index] for index in range(10) if index != 6] == [sample for sample in written.samples if sample.key != "6"]
        flip(tmp_path / "shard-000001.tar", at + size // 2)
    assert ShardSource(tmp_path)[6] == written[6]


def test_a_foreign_record_that_cannot_be_read_is_one_damaged_sample(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b"{"), ("b.jpg", b"2"), ("b.txt", b"\xff"), ("c.jpg", b"3"), ("c.txt", b"c")])
    source = ShardSource(tmp_path)
    for index, message in ((0, r"'a' of .*a.tar: its json member is not JSON"), (1, r"'b' of .*a.tar: its txt member is not UTF-8")):
        with pytest.raises(DamagedSample, match=message) as caught:
            source[index]
        assert caught.value.bad.reason == "damaged text"
    assert source[2].captions == ("c",)


def test_a_damaged_sample_crosses_processes_whole(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b"{")])
    with pytest.raises(DamagedSample) as caught:
        ShardSource(tmp_path)[0]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.bad, str(copy)) == (caught.value.bad, str(caught.value))
