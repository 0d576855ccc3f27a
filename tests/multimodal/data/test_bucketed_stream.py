"""A training stream whose batches hold texts of like length: far less padding, and as exact and resumable as without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import tower
from loader_case import ENCODER, equal, keys
from numpy.typing import NDArray
from train_case import Stop, stop_at, trained, weights

from adalink import IMAGE, PAD
from adalink.errors import CheckpointError, ConfigError
from multimodal.batches.packing import pack_rows, separate_rows
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.data.loader import Loaded, TrainLoader, train_loader
from multimodal.data.order import MixedSet, Mixture
from multimodal.sample import Measure, Sample, measured
from multimodal.template import Text
from tasks.scenes.dataset import Scenes

N = 300


class Ragged:
    """Like a VQA set: one to twelve questions an image, of one to nine words."""

    def __init__(self, n: int = N, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.samples = [
            Sample(key=f"{seed}/{i}", image_id=i, image=b"", captions=tuple("is " * draw.randint(1, 9) for _ in range(draw.randint(1, 12)))) for i in range(n)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        return measured(self.samples, len(self), measure)


def all_texts(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text(caption, "yes") for caption in sample.captions]


def first_text(sample: Sample, rng: random.Random) -> list[Text]:
    return all_texts(sample, rng)[:1]


@cache
def table(n: int) -> PatchTable:
    return PatchTable(torch.zeros(n, tower().n_patches, 2).half(), {})


def loader(steps: int, *, source: Any = None, texts: Any = first_text, arrange: Any = separate_rows, bucket_pool: int = 9, **more: Any) -> TrainLoader:
    source = Ragged() if source is None else source
    settings = {"batch_size": 8, "seed": 5, "workers": 0, "patches": table(len(source)), **more}
    return train_loader(source, texts, ENCODER, arrange, tower().preprocess, steps=steps, bucket_pool=bucket_pool, **settings)


def padding(loaded: Sequence[Loaded]) -> float:
    """The share of padding among the tokens of texts."""
    batches = [one.batch for one in loaded if one.batch is not None]
    texts = [(int((batch.domain == PAD).sum()), int((batch.domain != IMAGE).sum())) for batch in batches]
    return sum(padded for padded, _ in texts) / sum(both for _, both in texts)


@pytest.mark.parametrize(("texts", "arrange"), [(first_text, separate_rows), (all_texts, pack_rows)], ids=["one text a row", "packed"])
def test_padding_falls_by_a_large_factor(texts: Any, arrange: Any) -> None:
    steps = 2 * N // 8
    plain = padding(list(loader(steps, texts=texts, arrange=arrange, bucket_pool=0)))
    bucketed = padding(list(loader(steps, texts=texts, arrange=arrange, bucket_pool=36)))
    assert plain > 0.25
    assert bucketed < plain / 5


def test_a_sample_is_as_long_as_its_longest_row() -> None:
    """By hand: the image, <s>, question:, the question, answer:, yes. Packed texts share what they begin with."""
    words = [[caption.count("is") for caption in sample.captions] for sample in Ragged().samples]
    head = tower().n_patches + 2
    apart, packed = (Ragged().text_lengths(loader(1, texts=all_texts, arrange=arrange)._positions.length).tolist() for arrange in (separate_rows, pack_rows))
    assert apart == [head + max(one) + 2 for one in words]
    by_hand = [head + min(one) + sum(n - min(one) + 2 for n in one) for one in words]
    assert all(found == length for found, length, one in zip(packed, by_hand, words, strict=True) if len({*one}) > 1 or len(one) == 1)


def drawn_text(sample: Sample, rng: random.Random) -> list[Text]:
    return [rng.choice(all_texts(sample, rng))]


def test_a_sample_whose_texts_are_drawn_is_about_as_long_as_they_are_on_average() -> None:
    lengths = Ragged().text_lengths(loader(1, texts=drawn_text)._positions.length)
    means = [np.mean([caption.count("is") for caption in sample.captions]) for sample in Ragged().samples]
    one_draw = [drawn_text(sample, random.Random(0))[0].question.count("is") for sample in Ragged().samples]
    assert np.corrcoef(lengths, means)[0, 1] > np.corrcoef(one_draw, means)[0, 1] + 0.1


def test_every_sample_is_read_once_an_epoch_and_the_stream_is_the_same_for_any_number_of_workers() -> None:
    stream = list(loader(2 * N // 8))
    assert set(keys(stream)[:N]) == set(keys(stream)[N : 2 * N]) == {sample.key for sample in Ragged().samples}
    assert equal(list(loader(2 * N // 8, workers=2)), stream)
    assert keys(list(loader(2 * N // 8, bucket_pool=0))) != keys(stream)  # the control


def test_ranks_share_each_step_and_their_batches_are_as_long_as_each_other() -> None:
    whole = list(loader(30, batch_size=12))
    ranks = [list(loader(30, batch_size=4, rank=rank, world=3)) for rank in range(3)]
    assert [key for step in zip(*ranks, strict=True) for key in keys(step)] == keys(whole)
    longest = [[one.batch.ids.shape[1] for one in step if one.batch is not None] for step in zip(*ranks, strict=True)]
    assert np.mean([max(step) - min(step) for step in longest]) < 2


@pytest.mark.parametrize("stop", [1, 5, 20])
def test_a_stream_goes_on_in_the_middle_of_a_pool_bit_for_bit(stop: int) -> None:
    """A pool is 9 steps, an epoch 37 and a half."""
    whole = list(loader(50))
    for workers, other in ((0, 2), (2, 0)):
        one = loader(50, workers=workers)
        read = [loaded for _, loaded in zip(range(stop), one, strict=False)]
        again = loader(50 - stop, workers=other)
        again.load_state_dict(one.state_dict())
        assert equal([*read, *again], whole)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 8), (4, 8), (3, 8), (2, 5), (1, 1)])
def test_another_number_of_ranks_or_pictures_goes_on_in_the_order_of_the_first(world: int, batch_size: int) -> None:
    """The order keeps the batches that it was sorted for: 16 images of two ranks."""
    expected = keys(list(loader(2 * N // 16, batch_size=16)))
    first = [loader(5, rank=rank, world=2) for rank in range(2)]
    read = [key for step in zip(*first, strict=True) for key in keys(step)]
    steps = (len(expected) - len(read)) // (world * batch_size)
    rest = [loader(steps, rank=rank, world=world, batch_size=batch_size) for rank in range(world)]
    for one in rest:
        one.load_state_dict(first[0].state_dict())
    read += [key for step in zip(*rest, strict=True) for key in keys(step)]
    assert read == expected[: len(read)]
    assert len(read) > N
    assert rest[0].state_dict()["bucket_batch"] == 16  # and so does the next


def test_ranks_that_are_more_than_before_still_read_batches_of_like_length() -> None:
    first = loader(5, batch_size=8, world=2)
    list(first)
    rest = [loader(30, rank=rank, world=4) for rank in range(4)]
    for one in rest:
        one.load_state_dict(first.state_dict())
    plain = [list(loader(30, rank=rank, world=4, bucket_pool=0)) for rank in range(4)]
    assert np.mean([padding(list(one)) for one in rest]) < np.mean([padding(one) for one in plain]) / 3


class Longer(Ragged):
    """The same images with other texts."""

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        return super().text_lengths(measure) + np.arange(len(self))


def test_a_state_of_another_order_is_refused() -> None:
    one, plain = loader(1), loader(1, bucket_pool=0)
    for other, state, message in (
        (loader(1, bucket_pool=8), one, "train.bucket_pool was 9 and is 8"),
        (plain, one, "train.bucket_pool was 9 and is 0"),
        (one, plain, "train.bucket_pool was 0 and is 9"),
        (loader(1, source=Longer()), one, "the check sum of the texts' lengths was [0-9a-f]{16} and is [0-9a-f]{16}"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state.state_dict())
    plain.load_state_dict({name: value for name, value in plain.state_dict().items() if "bucket" not in name})


class Mute:
    """A data set that says nothing of its texts."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        return Ragged()[index]


@pytest.mark.parametrize("source", [Mute(), Mixture({"a": MixedSet(Ragged(), 1), "b": MixedSet(Mute(), 1)})], ids=["alone", "in a mixture"])
def test_a_data_set_that_does_not_say_its_lengths_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match="sorts samples by the lengths of their texts, and a Mute does not say them: give it a method"):
        loader(1, source=source)
    loader(1, source=source, bucket_pool=0)


def test_a_mixture_keeps_its_shares_in_every_pool() -> None:
    mixed = Mixture({"small": MixedSet(Ragged(60, seed=1), 3), "large": MixedSet(Ragged(200, seed=2), 1)})
    stream = keys(list(loader(65, source=mixed, batch_size=4, bucket_pool=5)))
    for at in range(0, 260, 20):
        assert sum(key.startswith("small") for key in stream[at : at + 20]) == 15
    assert stream != keys(list(loader(65, source=mixed, batch_size=4, bucket_pool=0)))
    assert keys(list(loader(65, source=mixed, batch_size=4, bucket_pool=5, workers=1))) == stream
    one = loader(33, source=mixed, batch_size=4, bucket_pool=5)
    read = keys(list(one))
    again = [loader(16, source=mixed, batch_size=2, bucket_pool=5, rank=rank, world=4) for rank in range(4)]
    for rank in again:
        rank.load_state_dict(one.state_dict())
    assert read + [key for step in zip(*again, strict=True) for key in keys(step)] == stream


def too_long(sample: Sample, rng: random.Random) -> list[Text]:
    return [] if sample.image_id % 2 else [Text("is " * 100, "yes")]


def test_samples_that_cannot_be_learnt_from_are_counted_where_they_come() -> None:
    bad = [sample.reason for one in loader(2, source=Ragged(8), texts=too_long, batch_size=4, bucket_pool=2) for sample in one.bad]
    assert sorted(bad) == ["no text"] * 4 + ["text too long"] * 4


def test_a_run_that_is_resumed_in_the_middle_of_a_pool_trains_the_same_weights(tmp_path: Path) -> None:
    settings = {"source": Scenes(split="train", size=9), "batch_size": 2, "bucket_pool": 3, "steps": 5, "checkpoint_every": 1, "measure_every": 1}
    whole, _ = trained(tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        trained(tmp_path / "parts", measure=stop_at(3), **settings)
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be continued exactly: train.bucket_pool was 3 and is 0; resume with the config"):
        trained(tmp_path / "parts", resume=True, **{**settings, "bucket_pool": 0})
    resumed, _ = trained(tmp_path / "parts", resume=True, **settings)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    plain, _ = trained(tmp_path / "plain", **{**settings, "bucket_pool": 0})
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(whole).items())  # the control
