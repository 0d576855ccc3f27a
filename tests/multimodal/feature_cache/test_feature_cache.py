"""Features on disk: what is read is what was written, and whatever else is there is refused in one sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_case import CONTENTS, N, binding, only_shard, records, written
from made_shards import flip
from safetensors import safe_open
from torch import Tensor

from adalink.errors import ConfigError, DataError
from multimodal.data.feature_cache.format import HEADER, Contents, as_size, check_of, word_bytes
from multimodal.data.feature_cache.reader import FeatureCache, Sketch, refuse_other
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.encoders.base import Features
from multimodal.sample import BadSample


def same(cache: FeatureCache, contents: Contents = CONTENTS) -> bool:
    return all(torch.equal(cache[i], records([i], contents)[0]) for i in range(len(cache)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "contents",
    [CONTENTS, Contents(patches=0, pooled=3, width=5, dtype="bfloat16"), Contents(patches=1, pooled=0, width=1), Contents(patches=7, pooled=0, width=3, dtype="float32")],
    ids=str,
)
def test_every_record_is_read_as_it_was_written(contents: Contents, tmp_path: Path) -> None:
    """Also where a record is no multiple of eight bytes."""
    cache = FeatureCache.open(written(tmp_path / "kept", contents))
    assert len(cache) == N
    assert cache.shape == contents.shape
    assert cache.kind == ("patches" if contents.patches else "taps")
    assert same(cache, contents)
    assert cache.usable() == list(range(N))


def test_a_record_is_memory_of_its_own(tmp_path: Path) -> None:
    cache = FeatureCache.open(written(tmp_path / "kept"))
    found = cache[2]
    assert isinstance(found, Tensor)
    found.zero_()
    assert same(cache)


def test_a_file_is_a_safetensors_file_that_other_programs_read(tmp_path: Path) -> None:
    with safe_open(only_shard(written(tmp_path / "kept")), "pt") as file:  # type: ignore[no-untyped-call]
        assert set(file.keys()) == {"picture", "check", "features"}
        assert torch.equal(file.get_slice("features")[4], records([4])[0])
        assert file.get_tensor("picture").tolist() == list(range(N))


def test_bad_samples_are_in_the_manifest_and_come_in_place_of_features(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    good = [i for i in range(N) if i not in (1, 4)]
    writer.add(good, records(good))
    bad = {i: BadSample(key=f"k{i}", reason="corrupt", detail="é") for i in (4, 1)}
    cache = writer.finish(bad)
    assert cache[4] == bad[4]
    assert cache.bad == bad
    assert cache.usable() == good
    some = cache.only([9, 4, 0])
    assert len(some) == 3
    assert some.bad == {1: bad[4]}
    assert torch.equal(some[0], records([9])[0])  # type: ignore[arg-type]


def test_what_is_needed_is_read_out_of_what_is_there(tmp_path: Path) -> None:
    cache = FeatureCache.open(written(tmp_path / "kept"))
    for patches, pooled, rows in ((3, 0, [0, 1, 2]), (0, 1, [4]), (0, 2, [3, 4]), (3, 1, [0, 1, 2, 4])):
        part = cache.reading(Contents(patches=patches, pooled=pooled, width=4, dtype="float32"), tmp_path)
        assert torch.equal(part[5], records([5])[0, rows])  # type: ignore[arg-type]
        assert part.shape == (patches + pooled, 4)
        assert part.kind == ("patches" if patches else "taps")
        assert torch.equal(part.only([5])[0], part[5])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="are 3 patches and 2 pooled vectors of width 4 in float16, and these methods read 3 pooled vectors of width 4 in float16: write them"):
        cache.reading(Contents(patches=0, pooled=3, width=4), tmp_path)


def test_features_become_a_record_in_the_order_of_joined() -> None:
    features = Features(patches=torch.randn(2, 3, 4), pooled=torch.randn(5, 2, 4))
    assert torch.equal(Contents(patches=3, pooled=5, width=4, dtype="float32").of(features), features.joined)
    assert torch.equal(Contents(patches=0, pooled=2, width=4, dtype="float32").of(features), features.joined[:, -2:])
    assert torch.equal(Contents(patches=3, pooled=0, width=4).of(features), features.patches.half())


def test_values_beyond_float16_are_refused_and_bfloat16_holds_them() -> None:
    features = Features(patches=torch.full((1, 3, 4), 1e5), pooled=torch.zeros(2, 1, 4))
    with pytest.raises(DataError, match=r"an encoder's feature is 1e\+05, and float16 holds at most 65504: keep the features in bfloat16 or float32"):
        CONTENTS.of(features)
    assert Contents(patches=3, pooled=2, width=4, dtype="bfloat16").of(features).isfinite().all()


def test_contents_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 patches and 0 pooled vectors of width 4 cannot be cached: give one vector or more"):
        Contents(patches=0, pooled=0, width=4)
    with pytest.raises(ConfigError, match="features cannot be cached in 'int8': give one of float16, bfloat16, float32"):
        Contents(patches=1, pooled=0, width=4, dtype="int8")  # type: ignore[arg-type]
    assert Contents(patches=50, pooled=0, width=768).n_bytes == 76_800
    assert as_size(2**34) == "16.00 GiB"
    assert as_size(2**19) == "0.50 MiB"


@pytest.mark.parametrize("size", [8, 6])
def test_any_flipped_bit_and_any_other_picture_changes_the_check(size: int) -> None:
    word = {8: torch.int64, 2: torch.int16}[word_bytes(size)]
    record = torch.randint(256, (size,), dtype=torch.uint8)
    own = check_of(record.view(word), 3)
    assert -(2**63) <= own < 2**63
    assert check_of(record.view(word), 4) != own
    for at in range(size):
        for bit in range(8):
            changed = record.clone()
            changed[at] ^= 1 << bit
            assert check_of(changed.view(word), 3) != own


@pytest.mark.parametrize("words", [1, 2, 4, 5])
def test_words_that_changed_places_are_found(words: int, tmp_path: Path) -> None:
    folder = written(tmp_path / "kept")
    path, at, size = only_shard(folder), HEADER + 16 * N + 6 * CONTENTS.n_bytes, 8
    data = bytearray(path.read_bytes())
    first, other = slice(at, at + size), slice(at + words % 5 * size, at + (words % 5 + 1) * size)
    if words == 5:  # the whole record with that of another image
        first, other = (slice(start, start + CONTENTS.n_bytes) for start in (at, at + CONTENTS.n_bytes))
    assert other.stop <= len(data)
    data[first], data[other] = data[other], data[first]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"the features of image 6 in .* are not what was written"):
        FeatureCache.open(folder)[6]


def test_files_of_the_first_format_are_read_and_continued_as_they_are(tmp_path: Path) -> None:
    """Their check is a sum of words."""
    path = only_shard(folder := written(tmp_path / "kept"))
    data = bytearray(path.read_bytes())
    data[:HEADER] = data[:HEADER].replace(b"adalink features 2", b"adalink features 1")
    word, size = word_bytes(CONTENTS.n_bytes), CONTENTS.n_bytes
    for image in range(N):
        at = HEADER + 16 * N + image * size
        found = np.frombuffer(data[at : at + size], dtype=f"i{word}").astype(np.int64)
        total = (int(found.sum()) + image * (0x9E3779B97F4A7C15 - 2**64) + 2**63) % 2**64 - 2**63
        data[HEADER + 8 * (N + image) : HEADER + 8 * (N + image + 1)] = total.to_bytes(8, "little", signed=True)
    path.write_bytes(data)
    assert same(FeatureCache.open(folder))
    flip(path, HEADER + 16 * N + 3 * size)
    with pytest.raises(DataError, match="the features of image 3 in"):
        FeatureCache.open(folder)[3]
    writer = FeatureWriter(folder, binding(), CONTENTS)  # the damaged record is written anew
    assert writer.missing().tolist() == [3]
    writer.add([3], records([3]))
    assert same(writer.finish({}))



def test_every_flipped_byte_of_a_file_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "kept")
    path = only_shard(folder)
    whole = path.read_bytes()
    assert same(FeatureCache.open(folder))
    for at in [*range(0, HEADER, 31), *range(HEADER, len(whole), 5)]:
        flip(path, at)
        with pytest.raises(DataError, match="run `adalink features` again, which writes anew what is damaged"):
            [cache := FeatureCache.open(folder), *(cache[i] for i in range(N))]
        flip(path, at)
    assert path.read_bytes() == whole


def test_a_flipped_byte_names_the_picture_and_the_file_and_others_are_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "kept")
    flip(only_shard(folder), HEADER + 16 * N + 6 * CONTENTS.n_bytes + 1)
    cache = FeatureCache.open(folder)
    with pytest.raises(DataError, match=r"the features of image 6 in .*000-00000.safetensors are not what was written: the file was cut or changed; run"):
        cache[6]
    assert torch.equal(cache[5], records([5])[0])  # type: ignore[arg-type]


def test_a_file_that_is_cut_is_told_when_it_is_opened_and_when_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "kept")
    cache = FeatureCache.open(folder)
    path = only_shard(folder)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=r"the features of image 9 in .* are not what was written: the file was cut or changed"):
        cache[9]
    with pytest.raises(DataError, match=f"has {size - 1} bytes, and its manifest says {size}; run `adalink features` again"):
        FeatureCache.open(folder)
    os.truncate(path, HEADER + 5)
    with pytest.raises(DataError, match="run `adalink features` again"):
        FeatureCache.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"the features in .*000-00000.safetensors cannot be read: No such file or directory; run `adalink features` again"):
        FeatureCache.open(folder)


def test_a_folder_that_is_none_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no features in .*nowhere \(No such file or directory\): write them with `adalink features`, or train with"):
        FeatureCache.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is no folder of features: it has no features.json; write them with `adalink features`"):
        FeatureCache.open(tmp_path)
    written(tmp_path / "train")
    with pytest.raises(DataError, match="is no folder of features: it holds features of train in folders of their own"):
        FeatureCache.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="adalink features 0"), lambda m: m.pop("of"), lambda m: m["of"].pop("layer"), lambda m: m["kept"].update(patches="x"),
        lambda m: m["kept"].update(more=1), lambda m: m.update(shards={"../x.safetensors": 1}), lambda m: m.update(bad=[1]), lambda m: m.update(shards=[]),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_one_sentence(change: object, tmp_path: Path) -> None:
    path = written(tmp_path / "kept") / "features.json"
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"features.json is damaged or of another version \(.*\): remove the folder and write the features again"):
        FeatureCache.open(tmp_path / "kept")
    path.write_text("{")
    with pytest.raises(DataError, match="is damaged or of another version"):
        FeatureCache.open(tmp_path / "kept")


def test_a_manifest_that_promises_more_is_found_out(tmp_path: Path) -> None:
    path = written(tmp_path / "kept") / "features.json"
    path.write_text(path.read_text().replace(f'"pictures": {N}', f'"pictures": {N + 2}'))
    with pytest.raises(DataError, match="lack the features of 2 images, the first number 10, which its manifest promises; run"):
        FeatureCache.open(tmp_path / "kept")


def test_a_file_of_other_contents_is_refused(tmp_path: Path) -> None:
    folder, other = written(tmp_path / "kept"), written(tmp_path / "other", Contents(patches=5, pooled=0, width=4, dtype="bfloat16"))
    assert only_shard(folder).stat().st_size == only_shard(other).stat().st_size
    shutil.copy(only_shard(other), only_shard(folder))
    with pytest.raises(DataError, match="is no file of 3 patches and 2 pooled vectors of width 4 in float16: another header than it should have"):
        FeatureCache.open(folder)


def test_worker_processes_read_too(tmp_path: Path) -> None:
    cache = FeatureCache.open(written(tmp_path / "kept"))
    assert same(pickle.loads(pickle.dumps(cache)))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(cache.__getitem__, [3, 7, 3])
    assert all(torch.equal(value, records([i])[0]) for value, i in zip(found, [3, 7, 3], strict=True))


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        ({"fingerprint": "f2", "encoder": "two"}, r"are of the encoder one \(f1\), and here it is two \(f2\)"),
        ({"layer": -2}, "are of the encoder's layer -1, and here it is -2"),
        ({"precision": "bfloat16"}, "are of an encoder that computes in float32, and here it is bfloat16"),
        ({"pixels": Sketch((3, 4, 4), (0.0, 1.0, 0.5))}, "are of images prepared as 3 x 2 x 2, from 0 to 1, and here it is 3 x 4 x 4, from 0 to 1 .*"),
        ({"pixels": Sketch((3, 2, 2), (0.0, 1.0, 0.6))}, r"are of images prepared as .* \(a test image differs by 10 % of the range\)"),
        ({"features": Sketch((3, 2, 2), (0.0, 1.0, 0.6))}, r"are of an encoder that makes of a test image .* \(they differ by 10 % of the range\)"),
        ({"images": 11}, "are of a data set of 10 images, and here it is 11"),
        ({"data": "d2"}, r"are of the data set d1, and here it is d2 \(other images, or in another order\)"),
    ],
)  # fmt: skip
def test_features_of_anything_else_are_refused_naming_both(fields: dict[str, object], stated: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the features in {tmp_path} {stated}: give another folder, or none"):
        refuse_other(binding(), binding(**fields), tmp_path)
    refuse_other(binding(), binding(encoder="the same by another name", pixels=Sketch((3, 2, 2), (0.0, 1.0, 0.51))), tmp_path)
