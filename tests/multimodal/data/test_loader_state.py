"""A stream that goes on at the very next sample, with any number of workers and ranks, and every rank takes the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composed import Drawn, tower, two_texts
from loader_case import ENCODER, keys
from made_shards import ListSource, made_sample

from adalink.errors import CheckpointError
from multimodal.batches.packing import separate_rows
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.data.inputs import Drafted
from multimodal.data.loader import Loaded, TrainLoader, train_loader
from multimodal.data.order import MixedSet, Mixture, fingerprint_of
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import SampleSource


def loader(source: SampleSource, steps: int, *, seed: int = 5, workers: int = 0, batch_size: int = 1, **more: Any) -> TrainLoader:
    return train_loader(
        source, two_texts, ENCODER, separate_rows, tower().preprocess, steps=steps, batch_size=batch_size, seed=seed, workers=workers, **more
    )


class Light:
    """No decoding: keys are what is looked at."""

    def __init__(self, n: int) -> None:
        self.n = n

    def table(self) -> PatchTable:
        import torch

        return PatchTable(torch.zeros(self.n, tower().n_patches, 2).half(), {})

    def read(self, world: int, steps: int, batch_size: int = 1, state: dict[str, Any] | None = None) -> tuple[list[list[Loaded]], dict[str, Any]]:
        """What each rank is handed, and the state of the first."""
        found, states = [], []
        for rank in range(world):
            one = loader(Drawn(self.n), steps, batch_size=batch_size, rank=rank, world=world, patches=self.table())
            if state is not None:
                one.load_state_dict(state)
            found.append(list(one))
            states.append(one.state_dict())
        assert all(each == states[0] for each in states)
        return found, states[0]


def in_order(found: list[list[Loaded]]) -> list[str]:
    """The keys of all ranks in the order of the stream."""
    return [key for step in zip(*found, strict=True) for key in keys(step)]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("n", [7, 13])
def test_every_rank_takes_the_same_steps_and_every_sample_of_an_epoch_is_read_once(world: int, n: int) -> None:
    """The samples do not divide by the ranks: the last step of an epoch is filled up from the next."""
    steps = -(-n // world)
    found, _ = Light(n).read(world, steps)
    assert [len(each) for each in found] == [steps] * world
    epoch = in_order(found)[:n]
    assert sorted(epoch) == sorted(Drawn(n)[i].key for i in range(n))
    assert in_order(found) == in_order(Light(n).read(1, steps * world)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_uneven_shards_give_every_rank_the_same_steps_and_every_sample_once(world: int, workers: int, tmp_path: Path) -> None:
    """Shards of 1, 4 and 6 samples: fewer than ranks, and no number of them divides."""
    for name, samples, per_shard in (("a", 1, 9), ("b", 10, 6)):
        write_shards(ListSource(made_sample(i, f"{name}{i}") for i in range(samples)), tmp_path / name, samples_per_shard=per_shard)
    source = ShardSource(sorted(tmp_path.glob("*/*.tar")))
    steps = -(-len(source) // world)
    found = [list(loader(source, steps, rank=rank, world=world, workers=workers)) for rank in range(world)]
    assert [len(each) for each in found] == [steps] * world
    assert sorted(in_order(found)[: len(source)]) == sorted(source[i].key for i in range(len(source)))
    assert in_order(found) == keys(list(loader(source, steps * world)))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (4, 2), (1, 3)])
def test_another_number_of_ranks_goes_on_and_every_sample_of_the_epoch_is_read_exactly_once(before: int, after: int) -> None:
    n = 12
    first, state = Light(n).read(before, 2, batch_size=1)
    rest, _ = Light(n).read(after, -(-(n - 2 * before) // after), state=state)
    read = in_order(first) + in_order(rest)
    assert sorted(read[:n]) == sorted(Drawn(n)[i].key for i in range(n))
    assert read[:n] == in_order(Light(n).read(1, n)[0])


def test_what_was_handed_out_counts_and_not_what_workers_read_ahead() -> None:
    whole = keys(list(loader(Drawn(9), 9)))
    for stop in (1, 4):
        for workers, other in ((0, 2), (2, 0), (1, 2)):
            one = loader(Drawn(9), 9, workers=workers)
            read = [loaded for _, loaded in zip(range(stop), one, strict=False)]
            state = one.state_dict()
            assert state["position"] == stop
            again = loader(Drawn(9), 9 - stop, workers=other)
            again.load_state_dict(state)
            assert keys(read) + keys(list(again)) == whole


def test_a_loader_that_is_read_twice_goes_on() -> None:
    one = loader(Drawn(9), 3)
    assert keys(list(one)) + keys(list(one)) == keys(list(loader(Drawn(9), 6)))


class Told(Drawn):
    """Scenes that say what they are."""

    def __init__(self, n: int, fingerprint: str) -> None:
        super().__init__(n)
        self.fingerprint = fingerprint


class Captioned(Drawn):
    """Scenes in files, as far as a run that goes on is concerned: no fingerprint of images, and one of texts."""

    def __init__(self, n: int, texts: str) -> None:
        super().__init__(n)
        self.texts_fingerprint = texts


def test_a_state_of_edited_texts_is_refused_and_one_from_before_they_were_compared_is_not() -> None:
    for wrap in (lambda one: one, Drafted, lambda one: Mixture({"x": MixedSet(one, 1)})):
        state = loader(wrap(Captioned(7, "a")), 1).state_dict()
        loader(wrap(Captioned(7, "a")), 1).load_state_dict(state)
        with pytest.raises(CheckpointError, match=r"the data's fingerprint was .* and is .*: were captions, questions or answers edited since"):
            loader(wrap(Captioned(7, "b")), 1).load_state_dict(state)
        old = {**state, "data": fingerprint_of(wrap(Captioned(7, "a")))}
        loader(wrap(Captioned(7, "b")), 1).load_state_dict(old)


def test_a_state_of_other_data_is_refused() -> None:
    state = loader(Told(7, "a"), 1).state_dict()
    loader(Told(7, "a"), 1, workers=2, batch_size=3).load_state_dict(state)
    for other, message in (
        (loader(Told(7, "a"), 1, seed=6), "train.seed was 5 and is 6"),
        (loader(Told(8, "a"), 1), "images in the data set was 7 and is 8"),
        (loader(Told(7, "b"), 1), "the data's fingerprint was a and is b"),
        (loader(Mixture({"x": MixedSet(Told(7, "a"), 1), "y": MixedSet(Told(7, "a"), 1)}), 1), r"images in the data set was 7 and is \[7, 7\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
