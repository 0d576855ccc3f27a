from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from made_shards import image, tar_of

from adalink.errors import ConfigError, DataError
from multimodal.data.shards.index import ShardLimits, index_shard, split_name


def keys(path: Path, limits: ShardLimits = ShardLimits()) -> list[str]:  # noqa: B008
    return list(index_shard(path, limits).shard.members.all_keys())


def test_img2datasets_layout_gives_one_sample_per_key(tmp_path: Path) -> None:
    members = [(f"00000{n}.{suffix}", b"%d" % n) for n in range(3) for suffix in ("jpg", "json", "txt")]
    path = tar_of(tmp_path / "00000.tar", members)
    found = index_shard(path, ShardLimits())
    data = path.read_bytes()
    parts = [[data[at : at + size] for at, size, _ in places] for places in found.shard.members.table.tolist()]
    assert parts == [[b"%d" % n] * 3 for n in range(3)]
    assert (list(found.shard.members.all_keys()), found.skipped, found.ignored) == (["000000", "000001", "000002"], (), {})


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    assert keys(tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3"), ("a.txt", b"4")])) == ["a", "b"]


def test_names_split_as_webdataset_splits_them_and_stay_data() -> None:
    names = {
        "a.jpg": ("a", "jpg"),
        "a/b.JPG": ("a/b", "jpg"),
        "a.b/c.seg.png": ("a.b/c", "seg.png"),
        "../../etc/passwd.txt": ("../../etc/passwd", "txt"),
        "/abs.jpg": ("/abs", "jpg"),
        "README": ("README", ""),
        "a\udcff.jpg": ("a\\udcff", "jpg"),
    }
    assert {name: split_name(name) for name in names} == names


def test_members_outside_the_allow_list_are_counted_and_never_samples(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.txt", b"2"),
        *((f"a.{each}", b"3") for each in ("pyd", "pkl", "pth", "json.gz", "cls", "npz", "seg.png")),
    ]
    found = index_shard(tar_of(tmp_path / "a.tar", members), ShardLimits())
    assert list(found.shard.members.all_keys()) == ["a"]
    assert found.ignored == {"pyd": 1, "pkl": 1, "pth": 1, "json.gz": 1, "cls": 1, "npz": 1, "seg.png": 1}


def test_samples_without_a_picture_or_a_text_and_those_over_the_limits_are_named(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("b.txt", b"2"),
        ("c.jpg", b"3" * 11),
        ("c.txt", b""),
        ("d.jpg", b""),
        ("d.txt", b"5" * 6),
        ("e.webp", b""),
        ("e.json", b""),
    ]
    found = index_shard(tar_of(tmp_path / "s.tar", members), ShardLimits(max_image_bytes=10, max_text_bytes=5))
    assert list(found.shard.members.all_keys()) == ["e"]
    assert [(bad.key, bad.reason) for bad in found.skipped] == [
        ("a", "no text"),
        ("b", "no image"),
        ("c", "too many bytes"),
        ("d", "too much text"),
    ]
    assert found.skipped[3].detail == f"the txt of 'd' of {tmp_path / 's.tar'} has 6 bytes, and the limit is 5"


@pytest.mark.parametrize(
    "names", [("a.jpg", "a.txt", "a.jpg"), ("a.jpg", "a.JPG", "a.txt"), ("a.jpg", "a.png", "a.txt"), ("a.jpg", "b.jpg", "a.txt", "a.txt")]
)
def test_a_key_that_comes_twice_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tar_of(tmp_path / "a.tar", [(name, b"1") for name in names])
    with pytest.raises(
        DataError, match=r"a.tar has the (image|txt) of the sample 'a' twice \('a\.\w+' and 'a\.\w+'\); keys must be unique"
    ):
        index_shard(path, ShardLimits())


def test_a_key_with_a_nul_is_data(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix in ("jpg", "txt"):
            info = tarfile.TarInfo("x")
            info.pax_headers = {"path": f"a\0b\n.{suffix}"}
            tar.addfile(info)
    assert keys(tmp_path / "a.tar") == ["a\0b\n"]


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(f"{n}.txt", b"") for n in range(11)])
    assert keys(path, ShardLimits(max_members=11)) == []
    with pytest.raises(DataError, match=r"a.tar has more than 10 members; write smaller shards"):
        index_shard(path, ShardLimits(max_members=10))


@pytest.mark.parametrize("name", ["max_image_bytes", "max_text_bytes", "max_members"])
def test_senseless_limits_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        ShardLimits(**{name: 0})


def test_a_shard_that_holds_nothing_of_use_has_no_samples(tmp_path: Path) -> None:
    found = index_shard(tar_of(tmp_path / "a.tar", [("a.npz", image(1)), ("b.json", json.dumps({}).encode())]), ShardLimits())
    assert (len(found.shard.members), found.shard.members.table.shape) == (0, (0, 3, 3))
