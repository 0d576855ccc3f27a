"""The stream of batches: the same whatever reads it, whole, and with what is bad counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from composed import ID, Drawn, tower
from loader_case import N, equal, keys, load

from adalink.errors import DataError
from multimodal.batches.collate import NO_TARGET
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.data.loader import Loaded
from multimodal.sample import BadSample, DamagedSample, Sample
from multimodal.template import Text


@pytest.fixture(scope="module")
def stream() -> list[Loaded]:
    """Nine steps of two images: two epochs and a half of seven."""
    return load(Drawn(N), range(9))


def test_every_epoch_reads_every_picture_once_without_a_gap(stream: list[Loaded]) -> None:
    every = {Drawn(N)[i].key for i in range(N)}
    read = keys(stream)
    assert set(read[:N]) == set(read[N : 2 * N]) == every
    assert len(read) == 18


def test_the_stream_is_the_same_for_any_number_of_workers(stream: list[Loaded]) -> None:
    assert equal(load(Drawn(N), range(9), workers=2), stream)
    assert not equal(load(Drawn(N), range(1, 10)), stream)  # the control


def test_a_stream_that_starts_later_is_the_rest_of_it(stream: list[Loaded]) -> None:
    assert equal(load(Drawn(N), range(4, 9)), stream[4:])


def test_ranks_share_each_step_and_leave_nothing_out(stream: list[Loaded]) -> None:
    first, second = (load(Drawn(N), range(9), batch_size=1, rank=rank, world=2) for rank in (0, 1))
    both = [key for pair in zip(first, second, strict=True) for key in keys(pair)]
    assert both == keys(stream)


def test_a_picture_with_several_texts_is_read_once(stream: list[Loaded]) -> None:
    batch = stream[0].batch
    assert batch is not None
    assert batch.pixels is not None
    assert batch.pixels.shape == (2, 3, 96, 96)
    assert batch.image.tolist() == [0, 0, 1, 1]
    yes, eos = ID["yes"], ID["</s>"]
    assert batch.target[0].tolist()[:2] == [yes, eos]
    assert batch.n_targets == int((batch.target != NO_TARGET).sum())


def test_drawn_texts_differ_between_epochs_and_not_between_readings(stream: list[Loaded]) -> None:
    def drawn(loaded: Sequence[Loaded]) -> list[tuple[int, ...]]:
        return [tuple(row.tolist()) for one in loaded if one.batch for row in one.batch.target[1::2]]

    longer = load(Drawn(N), range(21))
    assert drawn(longer[:9]) == drawn(stream)
    assert len(set(drawn(longer))) > 1


def test_bad_pictures_are_reported_with_the_batch_that_they_would_have_been_in() -> None:
    loaded = load(Drawn(N, bad=[2, 3]), range(4), batch_size=2)
    bad = [sample for one in loaded for sample in one.bad]
    assert {(sample.key, sample.reason) for sample in bad} >= {(Drawn(N)[i].key, "not an image") for i in (2, 3)}
    for one in loaded:
        assert len(one.bad) + (len(one.batch.keys) if one.batch else 0) == 2


def test_a_step_of_bad_pictures_alone_has_no_batch() -> None:
    (loaded,) = load(Drawn(2, bad=[0, 1]), range(1))
    assert loaded.batch is None
    assert len(loaded.bad) == 2


def no_texts(sample: Sample, rng: random.Random) -> list[Text]:
    return []


def long_texts(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text("", "yes " * 100)]


def test_samples_without_a_text_or_with_too_long_a_one_are_bad() -> None:
    for texts, reason in ((no_texts, "no text"), (long_texts, "text too long")):
        (loaded,) = load(Drawn(2), range(1), texts=texts)
        assert [sample.reason for sample in loaded.bad] == [reason, reason]


class Damaged(Drawn):
    """The second sample's bytes in its shard are not those that were written."""

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            raise DamagedSample(BadSample(key="second", reason="damaged bytes", detail="the image of 'second'"))
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_bad_samples(workers: int) -> None:
    (loaded,) = load(Damaged(2), range(1), workers=workers)
    assert [sample.key for sample in loaded.bad] == ["second"]
    assert loaded.batch is not None


class Gone(Drawn):
    """A shard that was cut since it was opened."""

    def __getitem__(self, index: int) -> Sample:
        raise DataError("the shard x.tar was cut at byte 9 since it was opened")


def test_a_shard_that_is_gone_stops_the_stream() -> None:
    with pytest.raises(DataError, match="was cut at byte 9"):
        load(Gone(2), range(1))


def test_kept_features_take_the_place_of_pixels() -> None:
    table = PatchTable(torch.randn(N, tower().n_patches, 8).half(), {3: BadSample(key="x", reason="corrupt")})
    loaded = load(Drawn(N), range(4), patches=table)
    bad = [sample.key for one in loaded for sample in one.bad]
    assert bad
    assert set(bad) == {"x"}
    for one in loaded:
        assert one.batch is not None
        assert one.batch.pixels is None
        assert one.batch.patches is not None
        for key, retained in zip(one.batch.keys, one.batch.patches, strict=True):
            assert torch.equal(retained, table.patches[int(key[-6:])].float())
