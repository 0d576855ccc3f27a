"""An order that reads shards in a row: exact, the same from any position, and known ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.data.order import BucketedOrder, MixedOrder, Order, Reading, SampleOrder, reading_plan
from multimodal.data.shards.order import ShardOrder

some_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def order_of(sizes: list[int], window: int = 3, seed: int = 5, parts: int = 1, step: int = 1) -> ShardOrder:
    return ShardOrder(np.array(sizes, dtype=np.int64), window, seed, parts=parts, step=step)


def shard_of(sizes: list[int], sample: int) -> int:
    return int(np.searchsorted(np.cumsum(sizes), sample, side="right"))


@given(some_sizes, st.integers(1, 14), st.integers(0, 1000), st.integers(0, 3), st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_has_each_sample_once_and_a_part_of_a_step_only_its_own_shards(
    sizes: list[int], window: int, seed: int, epoch: int, parts: int, more: int
) -> None:
    order, n = order_of(sizes, window, seed, parts, step := parts + more), sum(sizes)
    positions = range(epoch * n, (epoch + 1) * n)
    assert sorted(map(order.sample, positions)) == list(range(n))
    windows = [order.window(position) for position in positions]
    assert windows == sorted(windows)
    assert windows[0] >= epoch * order.n_windows
    assert windows[-1] < (epoch + 1) * order.n_windows
    for position, number in zip(positions, windows, strict=True):
        part = position % step * parts // step
        assert shard_of(sizes, order.sample(position)) in order.shards_of(number, [part])
    read = [order.shards_of(number) for number in range(epoch * order.n_windows, (epoch + 1) * order.n_windows)]
    assert sorted(np.concatenate(read).tolist()) == list(range(len(sizes)))
    assert max(map(len, read)) <= window * parts
    assert max(map(len, read)) - min(map(len, read)) <= 1
    for number, whole in enumerate(read, epoch * order.n_windows):
        cut = np.concatenate([order.shards_of(number, [part]) for part in range(parts)])
        assert set(cut) == {shard for shard in whole if sizes[shard]}  # one without samples is read by nobody
        assert len(cut) <= len(whole) + parts - 1  # of two parts that follow each other one shard may be both's
        assert set(order.shards_of(number, range(parts))) == set(cut)


@pytest.mark.parametrize(
    ("world", "step", "most"), [(1, 24, 4), (2, 24, 2), (3, 24, 2), (4, 24, 1), (6, 24, 2), (8, 24, 1), (2, 12, 2), (1, 12, 4), (3, 18, 4), (4, 48, 2)]
)
def test_a_rank_reads_only_the_parts_that_are_its_own(world: int, step: int, most: int) -> None:
    """Of four parts of steps of 24; of steps of half the size, two ranks read two parts each as four read one."""
    order, union = order_of([30] * 16, 2, parts=4, step=24), set()
    for rank in range(world):
        parts, read = order.parts_of(rank, world, step // world), set()
        assert len(parts) <= most
        for start in range(0, 960, step):
            for position in range(start + rank * step // world, start + (rank + 1) * step // world):
                read.add(position % 24 * 4 // 24)
                shards = order.shards_of(order.window(position), parts)
                assert shard_of([30] * 16, order.sample(position)) in shards
                assert len(shards) <= 2 * len(parts) + 2
        assert read <= set(parts)
        assert read == set(parts) or len(parts) == 4  # and no more
        union |= read
    assert union == {0, 1, 2, 3}


@given(some_sizes, st.lists(st.integers(0, 300), min_size=1, max_size=20), st.integers(1, 3))
def test_a_position_is_the_same_sample_whatever_was_asked_before(sizes: list[int], positions: list[int], parts: int) -> None:
    order = order_of(sizes, parts=parts, step=3)
    assert [order.sample(position) for position in positions] == [order_of(sizes, parts=parts, step=3).sample(position) for position in positions]
    assert [order.window(position) for position in positions] == [order_of(sizes, parts=parts, step=3).window(position) for position in positions]


def test_epochs_seeds_and_windows_differ_and_shards_do_not_come_as_they_are_stored() -> None:
    def read(window: int, seed: int, epoch: int) -> tuple[int, ...]:
        order = order_of([10] * 10, window, seed)
        return tuple(order.sample(epoch * 100 + i) for i in range(100))

    assert len({read(window, seed, epoch) for window in (1, 2, 10) for seed in (0, 1) for epoch in (0, 1)}) == 12
    assert [shard_of([10] * 10, sample) for sample in read(1, 0, 0)] != sorted(shard_of([10] * 10, sample) for sample in read(1, 0, 0))


def test_the_order_is_this_one_for_ever() -> None:
    """A resumed run depends on it: torch.randperm of shards as of samples, and of a part of a window by a sha256 of seed, window and part."""
    order = order_of([2, 3, 1, 2], 2, 3)
    assert [order.sample(i) for i in range(16)] == [1, 5, 0, 3, 2, 7, 4, 6, 6, 0, 7, 1, 2, 5, 4, 3]
    assert [order.shards_of(number).tolist() for number in range(4)] == [[0, 2], [1, 3], [3, 0], [1, 2]]
    parts = order_of([2, 3, 1, 2], 1, 3, parts=2, step=4)
    assert [parts.sample(i) for i in range(16)] == [1, 0, 5, 6, 3, 2, 4, 7, 6, 7, 0, 1, 2, 3, 5, 4]


def test_what_cannot_be_an_order_is_refused() -> None:
    for sizes, window in (([3, 4], 0), ([], 2), ([0, 0], 1), ([3, -1], 1)):
        with pytest.raises(ConfigError, match=f"{len(sizes)} shards cannot be read {window} at a time: give a window of 1 shard or more"):
            order_of(sizes, window)
    for parts in (0, 5):
        with pytest.raises(ConfigError, match=f"a step of 4 images cannot be read in {parts} parts: give from 1 part to 4"):
            order_of([3], parts=parts, step=4)


def test_its_state_says_what_it_is_a_function_of() -> None:
    state = order_of([2, 3]).state()
    assert state == {"seed": 5, "samples": [5], "weights": [1], "window": [3], "shards": state["shards"]}
    assert order_of([3, 2]).state()["shards"] != state["shards"]
    assert order_of([2, 3], parts=2, step=4).state() == {**state, "shard_parts": 2, "shard_step": 4}


def plans(sizes: list[int]) -> dict[str, tuple[Order, int]]:
    """Orders of the set alone, in a mixture, and rearranged; and which of their sets it is."""
    own, n = order_of(sizes), sum(sizes)
    mixed = MixedOrder([7, n], [2, 3], 5, [SampleOrder(7, 6), own])
    lengths: NDArray[np.int64] = np.random.default_rng(0).integers(1, 50, size=7 + n)
    return {
        "alone": (own, 0),
        "mixed": (mixed, 1),
        "bucketed": (BucketedOrder(own, lengths[:n], seed=5, pool=2, batch=4), 0),
        "mixed and bucketed": (BucketedOrder(mixed, lengths, seed=5, pool=2, batch=4), 1),
    }


@pytest.mark.parametrize("name", list(plans([1])))
@settings(max_examples=30)
@given(sizes=some_sizes)
def test_what_is_read_at_a_position_is_in_the_windows_that_the_plan_says(name: str, sizes: list[int]) -> None:
    order, number = plans(sizes)[name]
    readings = reading_plan(order)
    reading, first = readings[number], 7 * number  # the other set of the mixture comes first
    assert reading is not None
    assert sum(one is not None for one in readings) == 1
    start = 0
    for position in range(2 * (first + sum(sizes))):
        windows, sample = reading.windows(position), order.sample(position) - first
        assert windows.start >= start  # what was left behind is needed no more
        start = windows.start
        if sample >= 0:
            assert shard_of(sizes, sample) in np.concatenate([reading.shards_of(window) for window in windows])


def test_the_windows_of_a_plan_are_no_more_than_are_read_there() -> None:
    order, number = plans([4] * 12)["mixed and bucketed"]
    reading = reading_plan(order)[number]
    assert isinstance(reading, Reading)
    assert max(len(reading.windows(position)) for position in range(200)) == 2
    alone = replace(reading, whole=reading.order, number=0)
    assert {len(alone.windows(position)) for position in range(200)} == {1}
