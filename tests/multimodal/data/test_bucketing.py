"""Samples of like length share a batch, and nothing of the order's exactness is lost."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from multimodal.data.order import BucketedOrder, MixedOrder, SampleOrder

N, POOL, BATCH = st.integers(1, 90), st.integers(1, 6), st.integers(1, 12)


def lengths(n: int, seed: int = 1, longest: int = 40) -> NDArray[np.int64]:
    return np.random.RandomState(seed).randint(1, longest, n).astype(np.int64)


def bucketed(n: int, pool: int, batch: int, seed: int = 3, order: Any = None) -> BucketedOrder:
    return BucketedOrder(order or SampleOrder(n, seed), lengths(n), seed=seed, pool=pool, batch=batch)


def read(order: Any, positions: range) -> list[int]:
    return [order.sample(position) for position in positions]


@given(N, POOL, BATCH, st.integers(0, 6), st.integers(0, 1000))
def test_every_epoch_has_every_sample_once_whatever_the_pools(n: int, pool: int, batch: int, epoch: int, seed: int) -> None:
    found = read(bucketed(n, pool, batch, seed), range(epoch * n, (epoch + 1) * n))
    assert sorted(found) == list(range(n))


@given(N, POOL, BATCH, st.lists(st.integers(0, 400), min_size=1, max_size=20))
def test_a_position_is_the_same_sample_whatever_was_asked_before(n: int, pool: int, batch: int, positions: list[int]) -> None:
    order = bucketed(n, pool, batch)
    assert [order.sample(position) for position in positions] == [bucketed(n, pool, batch).sample(position) for position in positions]


@given(N, POOL, BATCH, st.integers(0, 5))
def test_a_pool_holds_what_its_positions_held_and_each_of_its_batches_is_a_run_of_the_sorted_pool(n: int, pool: int, batch: int, epoch: int) -> None:
    """Batches are those of the stream's steps: they begin at multiples of their size, but for what an epoch's two ends cut off."""
    order = bucketed(n, pool, batch)
    long = lengths(n)
    at = epoch * n
    while at < (epoch + 1) * n:
        first, end = order.bounds(at)
        assert first == at
        assert first % batch == 0 or first == epoch * n
        assert end % batch == 0 or end == (epoch + 1) * n
        assert end - first < (pool + 1) * batch
        found = read(order, range(first, end))
        assert sorted(found) == sorted(read(SampleOrder(n, 3), range(first, end)))
        borders = [first, *(b for b in range(first + 1, end) if b % batch == 0), end]
        batches = [sorted(long[found[a - first : b - first]].tolist()) for a, b in itertools.pairwise(borders)]
        assert list(itertools.chain(*sorted(batches, key=lambda one: (one[0], one[-1])))) == sorted(long[found].tolist())
        at = end


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=4), POOL, BATCH)
def test_of_several_sets_every_pool_holds_what_it_held_and_no_sample_gets_ahead_of_its_set(sets: list[tuple[int, int]], pool: int, batch: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    plain, order = MixedOrder(sizes, weights, 3), bucketed(sum(sizes), pool, batch, order=MixedOrder(sizes, weights, 3))
    starts = [0, *itertools.accumulate(sizes)]
    at, found = 0, Counter[int]()
    while at < 3 * sum(sizes):
        first, end = order.bounds(at)
        part = read(order, range(first, end))
        assert sorted(part) == sorted(read(plain, range(first, end)))
        found.update(part)
        for k, size in enumerate(sizes):
            times = [found[index] for index in range(starts[k], starts[k] + size)]
            assert max(times) - min(times) <= 1
        at = end


def test_sets_whose_weights_are_as_their_sizes_have_each_sample_once_an_epoch() -> None:
    order = bucketed(40, 2, 4, order=MixedOrder([30, 10], [3, 1], 3))
    for epoch in range(3):
        assert sorted(read(order, range(40 * epoch, 40 * epoch + 40))) == list(range(40))


def test_seeds_epochs_and_pools_are_shuffled_each_in_its_own_way() -> None:
    def batches_by_length(order: BucketedOrder, first: int) -> tuple[int, ...]:
        """Where the batches of a pool of ten stand in the order of their lengths."""
        found = [float(lengths(1000)[read(order, range(at, at + 10))].mean()) for at in range(first, first + 100, 10)]
        return tuple(sorted(range(10), key=lambda i: found[i]))

    seen = [batches_by_length(bucketed(1000, 10, 10, seed), first) for seed in (0, 1) for first in (0, 100, 1000)]
    assert len(set(seen)) == 6
    assert tuple(range(10)) not in seen


def test_batches_differ_between_epochs() -> None:
    order = bucketed(1000, 10, 10)
    batches = [{frozenset(read(order, range(at, at + 10))) for at in range(epoch * 1000, epoch * 1000 + 1000, 10)} for epoch in (0, 1)]
    assert not batches[0] & batches[1]


def test_within_batches_lengths_spread_far_less_than_at_random() -> None:
    def spread(order: Any) -> float:
        return float(np.mean([np.ptp(lengths(2000)[read(order, range(at, at + 16))]) for at in range(0, 2000, 16)]))

    assert spread(SampleOrder(2000, 3)) > 30
    assert spread(bucketed(2000, 25, 16)) < 3


def test_a_pool_of_one_batch_changes_the_order_within_batches_alone() -> None:
    order, plain = bucketed(40, 1, 8), SampleOrder(40, 3)
    for at in range(0, 40, 8):
        assert sorted(read(order, range(at, at + 8))) == sorted(read(plain, range(at, at + 8)))
    assert read(order, range(40)) != read(plain, range(40))


def test_the_order_is_this_one_for_ever() -> None:
    """A resumed run depends on it. Torch 2.13; the pools by hand: 6 2 0 3 | 4 1 5 || 6 3 1 4 2 | 0 5 of lengths 2 4 5 1 | 3 1 9 || 2 1 1 3 4 | 5 9."""
    order = BucketedOrder(SampleOrder(7, 3), np.array([5, 1, 4, 1, 3, 9, 2]), seed=3, pool=2, batch=2)
    assert read(order, range(14)) == [3, 6, 2, 0, 1, 4, 5, 6, 3, 1, 4, 2, 0, 5]


class Counted(SampleOrder):
    """How often it was asked."""

    asked = 0

    def sample(self, position: int) -> int:
        self.asked += 1
        return super().sample(position)


def test_a_pool_is_made_once() -> None:
    """What a lookup costs is in tests/benchmarks/RESULTS.md."""
    plain = Counted(100, 3)
    order = bucketed(100, 4, 8, order=plain)
    read(order, range(300))
    assert plain.asked == 300
    read(order, range(296, 300))
    assert plain.asked == 300


def test_what_the_order_is_a_function_of_is_told() -> None:
    order = bucketed(40, 3, 8)
    note = order.state()
    assert note == {"seed": 3, "samples": [40], "weights": [1], "bucket_pool": 3, "bucket_batch": 8, "lengths": note["lengths"]}
    assert BucketedOrder(SampleOrder(40, 3), lengths(40, seed=2), seed=3, pool=3, batch=8).state()["lengths"] != note["lengths"]
