from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_shards import flip, made_shards, tar_of

from adalink.errors import DataError
from multimodal.data.shards.check import checksummed, verify_shards
from multimodal.data.shards.index import ShardLimits, index_shard
from multimodal.data.shards.manifest import Manifest, read_manifest, write_manifest
from multimodal.data.shards.reader import ShardSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made_shards(tmp_path)
    return tmp_path


def reasons(folder: Path) -> list[tuple[str, str]]:
    return [(fault.file, fault.reason) for fault in verify_shards(folder)]


def test_a_whole_set_has_no_fault(folder: Path) -> None:
    assert verify_shards(folder) == ()


def test_every_flipped_bit_is_found_and_its_sample_named(folder: Path) -> None:
    shard = read_manifest(folder).shards[0]
    (image, _, _) = shard.members.table[2].tolist()
    flip(folder / shard.file, image[0])
    (fault,) = verify_shards(folder)
    assert (fault.file, fault.reason) == (shard.file, "damaged samples")
    assert fault.detail == f"{folder / shard.file} has 1 damaged samples: '2'"


def test_a_bit_in_a_header_in_the_padding_or_at_the_end_is_found_too(folder: Path) -> None:
    shard = read_manifest(folder).shards[0]
    (image, _, _) = shard.members.table[0].tolist()
    for at, reason in (
        (image[0] - 512, "cut or damaged tar"),
        (image[0] + image[1], "damaged bytes"),
        (shard.size - 1, "cut or damaged tar"),
    ):
        flip(folder / shard.file, at)
        assert reasons(folder) == [(shard.file, reason)]
        flip(folder / shard.file, at)
    assert reasons(folder) == []


def test_many_damaged_samples_are_counted_and_the_first_named(tmp_path: Path) -> None:
    made_shards(tmp_path, count=8, samples_per_shard=8)
    for places in read_manifest(tmp_path).shards[0].members.table.tolist():
        flip(tmp_path / "shard-000000.tar", places[0][0])
    (fault,) = verify_shards(tmp_path)
    assert fault.detail.endswith("has 8 damaged samples: '0', '1', '2', '3', '4', ...")


def test_cut_missing_longer_and_unlisted_shards_are_all_named_at_once(folder: Path) -> None:
    os.truncate(folder / "shard-000000.tar", 3000)
    (folder / "shard-000001.tar").unlink()
    with (folder / "shard-000002.tar").open("ab") as file:
        file.write(bytes(512))
    tar_of(folder / "other.tar", [("a.jpg", b"1")])
    faults = verify_shards(folder)
    assert [(fault.file, fault.reason) for fault in faults] == [
        ("other.tar", "unlisted shard"),
        ("shard-000000.tar", "cut or damaged tar"),
        ("shard-000001.tar", "missing shard"),
        ("shard-000002.tar", "other size"),
    ]
    assert "is cut at byte 3000" in faults[1].detail
    assert faults[2].detail == f"{folder / 'shard-000001.tar'} cannot be read: No such file or directory"
    assert faults[3].detail == f"{folder / 'shard-000002.tar'} has 10752 bytes, and the manifest says 10240"


def test_a_shard_of_no_bytes_is_named(folder: Path) -> None:
    (folder / "shard-000000.tar").write_bytes(b"")
    (fault,) = verify_shards(folder)
    assert "shard-000000.tar holds 0 bytes" in fault.detail


def test_a_key_in_two_shards_is_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "copy.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    copy = type(manifest.shards[0])(
        file="copy.tar", size=manifest.shards[0].size, sha256=manifest.shards[0].sha256, members=manifest.shards[0].members.load()
    )
    write_manifest(Manifest(shards=(*manifest.shards, copy)), folder)
    (fault,) = verify_shards(folder)
    assert (fault.reason, fault.detail) == ("key twice", f"{folder / 'shard-000000.tar'} and copy.tar both have the key '0'")


def test_a_set_without_a_manifest_or_unfinished_says_so(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest.json cannot be read: No such file"):
        verify_shards(folder)
    (folder / ".writing").mkdir()
    with pytest.raises(DataError, match="are not finished: a writing was interrupted"):
        verify_shards(folder)


def test_an_indexed_shard_gets_the_check_sums_that_writing_would_have_given_it(folder: Path) -> None:
    written = read_manifest(folder).shards
    for path, right in zip(sorted(folder.glob("*.tar")), written, strict=True):
        summed = checksummed(path, index_shard(path, ShardLimits()).shard)
        assert (summed.sha256, summed.size, summed.members.table.tolist()) == (right.sha256, right.size, right.members.table.tolist())
    assert len(ShardSource(folder)) == 10
