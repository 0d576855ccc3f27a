from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multimodal.data.order import SampleOrder
from multimodal.training.settings import MAX_SEED


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = SampleOrder(n, seed)
    assert sorted(order.sample(epoch * n + i) for i in range(n)) == list(range(n))


@given(st.integers(2, 30), st.lists(st.integers(0, 200), min_size=1, max_size=30))
def test_a_position_is_the_same_sample_whatever_was_asked_before(n: int, positions: list[int]) -> None:
    order = SampleOrder(n, 7)
    assert [order.sample(position) for position in positions] == [SampleOrder(n, 7).sample(position) for position in positions]


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        order = SampleOrder(100, seed)
        return [order.sample(epoch * 100 + i) for i in range(100)]

    orders = [first(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert first(0, 0) != list(range(100))


def test_the_largest_seed_gives_an_order() -> None:
    assert sorted(SampleOrder(5, MAX_SEED).sample(10**6 * 5 + i) for i in range(5)) == list(range(5))


def test_the_order_is_this_one_for_ever() -> None:
    """A resumed run depends on it. torch.randperm of a generator seeded with 3 * 1,000,003 + epoch, torch 2.13."""
    order = SampleOrder(6, 3)
    assert [order.sample(i) for i in range(12)] == [2, 5, 4, 0, 3, 1, 3, 1, 5, 2, 4, 0]
