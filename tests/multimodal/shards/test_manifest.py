from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adalink.errors import DataError
from multimodal.data.shards import manifest as manifest_module
from multimodal.data.shards.manifest import Manifest, read_manifest, write_manifest
from multimodal.data.shards.members import Members, Shard, find_twice
from multimodal.sample import BadSample

TABLE = np.array([[[512, 100, 7], [1536, 10, 8], [-1, -1, -1]], [[2560, 0, 0], [-1, -1, -1], [3072, 5, -1]]])


def shard(file: str = "a.tar", keys: tuple[str, ...] = ("1", "é\0\n"), table: Any = TABLE) -> Shard:
    return Shard(file=file, size=10240, sha256="ab", members=Members(keys, table))


def manifest(*shards: Shard) -> Manifest:
    return Manifest(shards=shards, skipped=(BadSample(key="x", reason="truncated", detail="why"),), ignored={"cls": 3})


def same(one: Manifest, other: Manifest) -> bool:
    shards = all(
        (a.file, a.size, a.sha256, list(a.members.all_keys())) == (b.file, b.size, b.sha256, list(b.members.all_keys()))
        and np.array_equal(a.members.table, b.members.table)
        for a, b in zip(one.shards, other.shards, strict=True)
    )
    return shards and (one.skipped, one.ignored) == (other.skipped, other.ignored)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = manifest(shard(), shard("b.tar", ("3", "4")), shard("empty.tar", (), np.empty((0, 3, 3), dtype=np.int64)))
    write_manifest(written, tmp_path)
    assert same(read_manifest(tmp_path), written)
    assert len(written) == 4


def test_the_file_names_what_issue_and_users_look_for(tmp_path: Path) -> None:
    write_manifest(manifest(shard()), tmp_path)
    found = json.loads((tmp_path / "manifest.json").read_text())
    index = hashlib.sha256((tmp_path / "a.idx").read_bytes()).hexdigest()
    assert found["shards"] == [{"file": "a.tar", "bytes": 10240, "sha256": "ab", "samples": 2, "index": index, "largest": [100, 10]}]
    assert (found["format"], found["samples"], found["fingerprint"]) == ("adalink shards 2", 2, manifest(shard()).fingerprint)


def test_members_pickle_as_a_few_blocks_and_not_as_many_objects() -> None:
    count = 20_000
    members = Members((str(number) for number in range(count)), np.zeros((count, 3, 3), dtype=np.int64))
    sent = pickle.dumps(members)
    assert len(sent) < count * 90
    copy = pickle.loads(sent)
    assert [copy.key(0), copy.key(9), copy.key(10), copy.key(count - 1)] == ["0", "9", "10", str(count - 1)]


def test_the_fingerprint_tells_sets_apart() -> None:
    table = TABLE.copy()
    table[0, 0, 2] = 9
    sets = [
        manifest(shard()),
        manifest(shard(keys=("1", "2"))),
        manifest(shard(table=table)),
        manifest(replace(shard(), sha256="ac")),
        manifest(shard(), shard("b.tar")),
    ]
    assert len({each.fingerprint for each in sets}) == len(sets)
    assert manifest(shard()).fingerprint == manifest(shard("renamed.tar")).fingerprint


def test_a_key_in_two_shards_is_found() -> None:
    assert find_twice([shard(), shard("b.tar", ("3", "4"))]) is None
    assert find_twice([shard(), shard("b.tar", ("3", "4")), shard("a.tar", ("5", "3"))]) == ("3", 1, 2)


def entry(**fields: object) -> dict[str, Any]:
    whole = {"file": "a.tar", "bytes": 2048, "sha256": "", "samples": 1, "keys": ["1"], "image": [512, 100, -1], "json": [1536, 2, -1]}
    return {key: value for key, value in (whole | fields).items() if value is not None}


def document(*shards: object, **fields: object) -> dict[str, Any]:
    whole = {"format": "adalink shards 1", "samples": len(shards), "skipped": [], "ignored": {}, "shards": list(shards)}
    return {key: value for key, value in (whole | fields).items() if value is not None}


def test_the_smallest_whole_manifest_is_read(tmp_path: Path) -> None:
    """The control of the test below."""
    (tmp_path / "manifest.json").write_text(json.dumps(document(entry(), entry(file="b.tar"))))
    assert len(read_manifest(tmp_path)) == 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], r"is not a manifest of this version: its format is '\[\]', expected 'adalink shards 2'; index the shards again"),
        ({"shardlist": []}, "its format is 'None'"),
        (
            document(format="adalink shards 3"),
            "is of a newer version: its format is 'adalink shards 3', and this one reads up to 'adalink shards 2'; update adalink",
        ),
        (document(shards=None), "is damaged: KeyError 'shards'"),
        (document(shards=3), "is damaged: TypeError"),
        (document([1]), "is damaged: TypeError"),
        (document(skipped=[["a"]]), "is damaged: ValueError"),
        (document(ignored=[]), "is damaged: AttributeError"),
        (document(entry(), samples=2), "it says 2 samples and lists 1"),
        (document(entry(), entry()), "it names a shard twice"),
        (document(entry(samples=2), samples=2), "the keys of 'a.tar' do not match its 2 samples"),
        (document(entry(keys=[1])), "the keys of 'a.tar' do not match its 1 samples"),
        (document(entry(keys="1")), "the keys of 'a.tar' do not match its 1 samples"),
        (document(entry(file="../a.tar")), "'../a.tar' is not a file name"),
        (document(entry(file="/etc/passwd")), "'/etc/passwd' is not a file name"),
        (document(entry(file="..")), "'..' is not a file name"),
        (document(entry(file="a\0.tar")), "is not a file name"),
        (document(entry(file=5)), "5 is not a file name"),
        (document(entry(bytes="2048")), "bytes or sha256 of 'a.tar' is of another type"),
        (document(entry(sha256=None)), "KeyError 'sha256'"),
        (document(entry(image=[512, 100])), "is damaged: ValueError cannot reshape"),
        (document(entry(image=[512, 100, 1.5])), "the list 'image' of 'a.tar' holds other than whole numbers"),
        (document(entry(image=[512, 100, 2**70])), "is damaged"),
        (document(entry(image=[512, [100], 1])), "is damaged: ValueError"),
        (document(entry(image=[512, 1537, -1])), "an offset of 'a.tar' lies outside its 2048 bytes"),
        (document(entry(image=[2**63 - 1, 2**63 - 1, -1])), "an offset of 'a.tar' lies outside"),
        (document(entry(image=[0, 10, -1])), "an offset of 'a.tar' lies outside"),
        (document(entry(image=[-1, 10, -1])), "an offset of 'a.tar' lies outside"),
        (document(entry(image=[512, -10, -1])), "an offset of 'a.tar' lies outside"),
        (document(entry(image=None)), "a sample of 'a.tar' has no image"),
        (document(entry(image=[-1, -1, -1])), "a sample of 'a.tar' has no image"),
        (document(entry(json=None)), "a sample of 'a.tar' has no text"),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(tmp_path: Path, found: object, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ('"bytes": 10240', '"bytes": 10241', "ValueError its lines are not those that were written, by its check sum; index the shards again"),
        ('"samples": 2, "index"', '"samples": 3, "index"', "its lines are not those that were written"),
        ('"fingerprint": "', '"fingerprint": "0', "its lines are not those that were written"),
        ('"file": "a.tar"', '"file": "../a.tar"', "'../a.tar' is not a file name"),
        ('"file": "a.tar"', '"file": ".."', "'..' is not a file name"),
        ('"bytes": 10240', '"bytes": "10240"', "bytes, sha256, samples, index or largest of 'a.tar' is of another type"),
        ('"bytes": 10240', '"bytes": -1', "bytes, sha256, samples, index or largest of 'a.tar' has another value"),
        ('"bytes": 10240', '"bytes": 1e99', "is of another type"),
        ('"largest": [100, 10]', '"largest": [100]', "ValueError not enough values"),
        ('"largest": [100, 10]', '"largest": 100', "is of another type"),
        ('"index": "', '"index": "0', "has another value"),
        ('"samples": 2, "fingerprint"', '"samples": 5, "fingerprint"', "it says 5 samples and lists 2"),
        ('"shards": [', '"shards": 3, "": [', "TypeError its shards are a int"),
        ('"checksum"', '"other"', "KeyError 'checksum'"),
    ],
)
def test_a_damaged_line_of_the_present_form_says_what_is_wrong(tmp_path: Path, written: str, instead: str, message: str) -> None:
    write_manifest(manifest(shard()), tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert text.count(written) == 1
    assert len(read_manifest(tmp_path)) == 2
    (tmp_path / "manifest.json").write_text(text.replace(written, instead))
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_lines_are_read_some_at_a_time_and_another_layout_of_the_same_json_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = manifest(*(shard(f"{'x' * number}.tar", (f"{number}a", f"{number}b")) for number in range(1, 30)))
    write_manifest(written, tmp_path)
    assert same(read_manifest(tmp_path), written)
    for at_once in (1, 300, 2**18):
        monkeypatch.setattr(manifest_module, "_AT_ONCE", at_once)
        assert same(read_manifest(tmp_path), written)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert same(read_manifest(tmp_path), written)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(DataError, match="is not JSON"):
        read_manifest(tmp_path)
    write_manifest(written, tmp_path)
    path.write_text(path.read_text().replace('"}', '}', 1).replace('"bytes"', 'bytes', 1))
    with pytest.raises(DataError, match=r"is damaged: JSONDecodeError|is not JSON"):
        read_manifest(tmp_path)
    write_manifest(Manifest(shards=()), tmp_path)
    assert len(read_manifest(tmp_path)) == 0


def test_a_missing_manifest_and_one_that_is_not_json_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"manifest.json cannot be read: No such file or directory; write or index the shards with `adalink shards`"
    ):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"manifest.json is not JSON: .*; index the shards again"):
        read_manifest(tmp_path)
