from __future__ import annotations

import os
import signal

import pytest
import torch
from composed import Drawn, compose, tower
from torch import Tensor

from adalink.errors import DataError
from multimodal.data.feature_cache.encode import PatchTable, encode_all
from multimodal.data.images.decode import decode_image
from multimodal.encoders.base import Features
from multimodal.encoders.tower import VisionTower
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample, DamagedSample, Sample


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return compose("opt")


class Damaged(Drawn):
    """Sample 4 is damaged in its shard."""

    def __getitem__(self, index: int) -> Sample:
        if index == 4:
            raise DamagedSample(BadSample(key="fourth", reason="damaged bytes", detail="the image of 'fourth'"))
        return super().__getitem__(index)


def retained(table: PatchTable, index: int) -> Tensor:
    found = table[index]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_every_picture_has_its_own_features_and_bad_ones_say_why(workers: int, model: VisionLanguageModel) -> None:
    source = Damaged(7, bad=[1, 2])
    table = encode_all(model, source, workers=workers)
    assert len(table) == 7
    assert table.usable() == [0, 3, 5, 6]
    assert {index: (bad.key, bad.reason) for index, bad in table.bad.items()} == {
        1: (source[1].key, "not an image"), 2: (source[2].key, "not an image"), 4: ("fourth", "damaged bytes"),
    }  # fmt: skip
    assert table[1] is table.bad[1]
    for index in table.usable():
        pixels = tower().preprocess(decode_image(source[index].image))[None]
        expected = tower()(pixels).joined[0]
        torch.testing.assert_close(retained(table, index), expected, rtol=1e-3, atol=1e-3)
        assert retained(table, index).dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 1])
def test_encoding_leaves_the_programs_random_numbers_where_they_were(workers: int, model: VisionLanguageModel) -> None:
    """A run on cached features then draws what the same run on images draws."""
    before = torch.get_rng_state()
    encode_all(model, Drawn(2), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


class Deadly(Drawn):
    """The worker process that reads the last image is killed, as one that needs too much memory is."""

    def __getitem__(self, index: int) -> Sample:
        if index == len(self) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_while_pictures_are_encoded_is_told_in_a_sentence(model: VisionLanguageModel) -> None:
    with pytest.raises(DataError, match=r"a worker process that reads samples ended before its work .*give fewer train.workers"):
        encode_all(model, Deadly(3), workers=1)


def test_features_are_kept_in_sixteen_bits(model: VisionLanguageModel) -> None:
    table = encode_all(model, Drawn(2))
    assert table.patches.dtype == torch.float16
    assert table.patches.nbytes == 2 * tower().n_retained * tower().width * 2  # two images, two bytes a value


def test_a_feature_that_sixteen_bits_cannot_hold_is_refused_and_kept_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose("opt")
    encode = type(model.tower).encode

    def large(tower: VisionTower, pixels: Tensor) -> Features:
        found = encode(tower, pixels)
        return Features(patches=found.patches * 1e6, pooled=found.pooled)

    monkeypatch.setattr(type(model.tower), "encode", large)
    with pytest.raises(DataError, match=r"an encoder's feature is .*, and float16 holds at most 65504: keep the features in bfloat16 or float32 \(features_dtype\)"):
        encode_all(model, Drawn(2))
    for dtype in ("bfloat16", "float32"):
        assert retained(encode_all(model, Drawn(2), dtype=dtype), 0).isfinite().all()  # type: ignore[arg-type]


def test_a_table_of_some_samples_counts_them_anew() -> None:
    bad = BadSample(key="x", reason="corrupt")
    table = PatchTable(torch.arange(5.0).reshape(5, 1, 1).half(), {3: bad})
    some = table.only([4, 3, 0])
    assert len(some) == 3
    assert [retained(some, i).item() for i in (0, 2)] == [4.0, 0.0]
    assert some[1] is bad
    assert some.usable() == [0, 2]
