"""Several sets in one stream: exact shares, every set in whole epochs, the same order whatever reads it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from composed import Drawn
from hypothesis import given
from hypothesis import strategies as st
from loader_case import keys
from test_loader_state import loader

from adalink.errors import ConfigError
from multimodal.data.order import MixedOrder, MixedSet, Mixture, SampleOrder, fingerprint_of, order_of
from multimodal.sample import BadSample, DamagedSample, Sample

SETS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=4)


def read(sizes: list[int], weights: list[int], positions: range, seed: int = 3) -> list[int]:
    order = MixedOrder(sizes, weights, seed)
    return [order.sample(position) for position in positions]


@given(SETS, st.integers(0, 100))
def test_shares_are_exact_in_every_round_and_each_set_comes_in_whole_epochs(sets: list[tuple[int, int]], seed: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    starts = [0, *itertools.accumulate(sizes)]
    found = read(sizes, weights, range(6 * sum(weights)), seed)
    whose = [max(k for k in range(len(sizes)) if starts[k] <= index) for index in found]
    for at in range(0, len(found), sum(weights)):
        assert Counter(whose[at : at + sum(weights)]) == dict(enumerate(weights))
    for k, size in enumerate(sizes):
        own = [index for index, owner in zip(found, whose, strict=True) if owner == k]
        for at in range(0, len(own) - size + 1, size):
            assert sorted(own[at : at + size]) == list(range(starts[k], starts[k] + size))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_a_position_is_the_same_sample_whatever_was_asked_before(positions: list[int]) -> None:
    order = MixedOrder([5, 9], [3, 2], 7)
    assert [order.sample(position) for position in positions] == [MixedOrder([5, 9], [3, 2], 7).sample(position) for position in positions]


def test_rounds_and_seeds_differ_and_weights_are_taken_in_lowest_terms() -> None:
    assert read([50, 50], [6, 2], range(80)) == read([50, 50], [3, 1], range(80))
    assert read([50, 50], [3, 1], range(80)) != read([50, 50], [3, 1], range(80), seed=4)
    places = [tuple(i for i, index in enumerate(read([50, 50], [3, 1], range(at, at + 4))) if index >= 50) for at in range(0, 80, 4)]
    assert len(set(places)) > 1


def test_sets_of_one_size_are_not_read_in_step() -> None:
    found = read([30, 30], [1, 1], range(60))
    assert [index for index in found if index < 30] != [index - 30 for index in found if index >= 30]


@pytest.mark.parametrize("sizes, weights", [([], []), ([3], [0]), ([0, 2], [1, 1]), ([3, 3], [1])])
def test_senseless_mixtures_are_refused(sizes: list[int], weights: list[int]) -> None:
    with pytest.raises(ConfigError, match="cannot be mixed by the weights"):
        MixedOrder(sizes, weights, 0)


def mixture() -> Mixture:
    return Mixture({"small": MixedSet(Drawn(3), 3), "large": MixedSet(Drawn(8), 1)})


def test_a_mixture_is_its_sets_one_after_the_other_with_their_names_before_the_keys() -> None:
    mixed = mixture()
    assert len(mixed) == 11
    assert [mixed[i].key for i in (0, 2, 3, 10)] == [f"small:{Drawn(3)[0].key}", f"small:{Drawn(3)[2].key}", f"large:{Drawn(8)[0].key}", f"large:{Drawn(8)[7].key}"]
    for index in (-1, 11):
        with pytest.raises(IndexError, match="is outside of these 11 samples"):
            mixed[index]


def test_a_mixture_is_streamed_by_weight_by_any_number_of_workers_and_ranks() -> None:
    expected = keys(list(loader(mixture(), 8)))
    assert Counter(key.split(":")[0] for key in expected) == {"small": 6, "large": 2}
    assert keys(list(loader(mixture(), 8, workers=2))) == expected
    ranks = [list(loader(mixture(), 4, rank=rank, world=2)) for rank in (0, 1)]
    assert [key for step in zip(*ranks, strict=True) for key in keys(step)] == expected
    one = loader(mixture(), 3)
    start = keys(list(one))
    again = loader(mixture(), 5)
    again.load_state_dict(one.state_dict())
    assert start + keys(list(again)) == expected


class Damaged(Drawn):
    def __getitem__(self, index: int) -> Sample:
        raise DamagedSample(BadSample(key="k", reason="damaged bytes", detail="the image of 'k'"))


def test_a_damaged_sample_of_a_mixture_says_of_which_set_it_is() -> None:
    with pytest.raises(DamagedSample, match="the image of 'k'") as raised:
        Mixture({"a": MixedSet(Drawn(1), 1), "b": MixedSet(Damaged(1), 1)})[1]
    assert raised.value.bad.key == "b:k"


def test_mixtures_of_nothing_and_by_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are no data sets to mix"):
        Mixture({})
    with pytest.raises(ConfigError, match="the weight of a data set is 0: give a whole number from 1"):
        MixedSet(Drawn(1), 0)


def test_a_mixture_has_a_fingerprint_where_each_of_its_sets_has_one() -> None:
    known = Drawn(3)
    known.fingerprint = "a"  # type: ignore[attr-defined]
    assert fingerprint_of(Drawn(2)) == fingerprint_of(mixture()) == fingerprint_of(Mixture({"a": MixedSet(known, 1), "b": MixedSet(Drawn(2), 1)})) == ""
    assert len(fingerprint_of(Mixture({"a": MixedSet(known, 1), "b": MixedSet(known, 1)}))) == 64


def test_the_order_of_a_set_and_of_a_mixture() -> None:
    assert isinstance(order_of(Drawn(2), 1), SampleOrder)
    assert isinstance(order_of(mixture(), 1), MixedOrder)
