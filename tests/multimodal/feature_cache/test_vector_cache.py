"""Records of unlike sizes: the vectors of images as a model that sees already takes them, with each image's words and grid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_case import binding, only_shard, same_images
from made_shards import flip
from safetensors.torch import load_file

from adalink.errors import ConfigError, DataError
from multimodal.batches.prepared import Prepared
from multimodal.data.feature_cache.format import HEADER, VectorContents
from multimodal.data.feature_cache.reader import FeatureCache
from multimodal.data.feature_cache.writer import FeatureWriter

CONTENTS = VectorContents(vectors=4, width=6)


def image_of(number: int, contents: VectorContents = CONTENTS) -> Prepared:
    """A made-up image with as many vectors as its number says, in two parts."""
    counts = (number, 1)
    vectors = torch.randn(number + 1, contents.width, generator=torch.Generator().manual_seed(number)).to(contents.torch_dtype)
    grids = (torch.tensor([[1, 2, number]]), torch.tensor([[1, 2, 2]]))
    return Prepared(wording=("<a>" * number, "ä<b>"), counts=counts, grids=grids, vectors=vectors)


def filled(folder: Path, order: range | list[int] = range(8)) -> Path:
    writer = FeatureWriter(folder, binding(images=8), CONTENTS)
    for start in range(0, len(order), 3):
        writer.add(order[start : start + 3], [image_of(i) for i in order[start : start + 3]])
    writer.close()
    return folder


def ended(folder: Path) -> FeatureCache:
    """The whole folder, with what is missing of it written."""
    writer = FeatureWriter(folder, binding(images=8), CONTENTS)
    missing = writer.missing().tolist()
    if not writer.is_whole:
        writer.add(missing, [image_of(i) for i in missing])
        writer.finish({})
    writer.close()
    return FeatureCache.open(folder)


def test_records_of_unlike_sizes_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("one", 2**28), ("many", 3 * CONTENTS.n_bytes)):
        monkeypatch.setattr("multimodal.data.feature_cache.writer.SHARD_BYTES", most)
        found = ended(filled(tmp_path / name, [5, 0, 7, 3]))
        assert len(list((tmp_path / name).glob("*.safetensors"))) == {"one": 2, "many": 4}[name]
        assert all(same_images(found[i], image_of(i)) for i in range(8))
        assert all(same_images(found.only([6, 0])[i], image_of(number)) for i, number in enumerate((6, 0)))
        assert (found.kind, found.shape, found.usable()) == ("patches", (1, 6), list(range(8)))


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    ended(filled(tmp_path / "kept"))
    tensors = load_file(only_shard(tmp_path / "kept"))
    assert tensors["picture"].tolist() == list(range(8))
    assert tensors["end"][-1] == len(tensors["features"])
    assert tensors["features"].dtype == torch.uint8


def test_a_record_is_read_at_its_place_and_the_rest_of_the_file_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, read, real = ended(filled(tmp_path / "kept")), [], os.preadv

    def counted(number: int, buffers: list[Any], offset: int) -> int:
        read.append(sum(len(memoryview(buffer).cast("B")) for buffer in buffers))
        return real(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    assert same_images(found[2], image_of(2))
    assert sum(read) < 200 < only_shard(tmp_path / "kept").stat().st_size - HEADER


def test_damage_is_named_and_written_anew(tmp_path: Path) -> None:
    """In the vectors, in the words, in where a record ends; and a file that was cut."""
    for name, at in {"vectors": -3, "words": -90, "end": HEADER + 24 * 8 - 15}.items():
        folder = tmp_path / name
        filled(folder)
        ended(folder)
        path = only_shard(folder)
        flip(path, at % path.stat().st_size)
        damaged = 6 if name == "end" else 7
        with pytest.raises(DataError, match=rf"the features of image {damaged} in .* are not what was written: the file was cut or changed; run `adalink feat"):
            FeatureCache.open(folder)[damaged]
        writer = FeatureWriter(folder, binding(images=8), CONTENTS)
        assert damaged in writer.missing().tolist()
        writer.close()
        found = ended(folder)
        assert all(same_images(found[i], image_of(i)) for i in range(8))
    cut = only_shard(filled(tmp_path / "cut"))
    os.truncate(cut, cut.stat().st_size - 20)
    writer = FeatureWriter(tmp_path / "cut", binding(images=8), CONTENTS)
    assert writer.missing().tolist() == [7]
    writer.close()
    assert all(same_images(ended(tmp_path / "cut")[i], image_of(i)) for i in range(8))


def test_contents_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 vectors of width 4 cannot be cached: give one vector or more"):
        VectorContents(vectors=0, width=4)
    with pytest.raises(ConfigError, match="features cannot be cached in 'int8': give one of float16, bfloat16, float32"):
        VectorContents(vectors=1, width=4, dtype="int8")  # type: ignore[arg-type]
