"""Many ranks on many machines read one set by windows: each sample once, each shard once a machine, within the cache."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster, parts_of, read_through, stream
from numpy.typing import NDArray

from multimodal.data.shards.order import ShardOrder


def uneven(n: int, mean: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(mean // 2, mean + mean // 2, size=n)


@pytest.mark.parametrize(("parts", "step"), [(1, 1), (4, 24), (3, 7)])
def test_the_stream_of_a_window_is_the_order_of_its_positions(parts: int, step: int) -> None:
    order = ShardOrder(uneven(30, 10), 2, 5, parts=parts, step=step)
    for window in (0, order.n_windows - 1, 3 * order.n_windows + 1):
        positions, samples = stream(order, window)
        assert samples.tolist() == [order.sample(position) for position in positions.tolist()]
        assert {order.window(position) for position in positions.tolist()} == {window}


@pytest.mark.parametrize("apart", [True, False], ids=["a part for each machine", "one part"])
def test_each_sample_is_read_once_an_epoch_and_each_shard_is_fetched_once_by_a_machine(apart: bool) -> None:
    """128 ranks with 8 workers each on 16 machines, 2,000 shards: all ranks take the same steps, and what they read is in the cache by then."""
    cluster, sizes = Cluster(16, 8, 8, 2), uneven(2000, 20)
    order = ShardOrder(sizes, 16 if apart else 100, 5, parts=16 if apart else 1, step=cluster.step)
    seen = read_through(order, sizes, cluster, 0, sizes.sum() // cluster.step)
    assert seen.end == sizes.sum() - sizes.sum() % cluster.step
    assert seen.samples.max() == 1
    assert seen.samples.sum() == seen.number == seen.end
    later = [order.shards_of(window) for window in range(order.n_windows, order.n_windows + seen.held + cluster.ahead)]
    assert seen.fetched.max() == 2
    assert set(np.flatnonzero(seen.fetched.max(axis=0) == 2)) <= set(np.concatenate(later))  # for the next epoch
    epoch = sum(len(order.shards_of(window, parts_of(order, cluster, node))) for window in range(order.n_windows) for node in range(16))
    extra = epoch / len(sizes) - (1 if apart else 16)
    assert 0 <= extra <= order.n_windows * 15 / len(sizes) if apart else extra == 0  # shards that two machines share
    window = 17 if apart else 100
    assert seen.cached <= (seen.held + cluster.ahead) * window * sizes.max()
    assert seen.cached >= 0.5 * (seen.held + cluster.ahead) * window * sizes.mean()


@pytest.mark.parametrize("after", [Cluster(16, 4, 8, 4), Cluster(4, 8, 2, 2), Cluster(6, 8, 8, 2), Cluster(1, 1, 0, 1)])
def test_another_world_in_the_middle_of_a_window_reads_the_rest_once(after: Cluster) -> None:
    before, sizes = Cluster(8, 8, 8, 2), uneven(600, 20)
    order = ShardOrder(sizes, 8, 5, parts=8, step=before.step)
    first = read_through(order, sizes, before, 0, 37)
    assert order.first_position(order.window(first.end)) < first.end
    second = read_through(ShardOrder(sizes, 8, 5, parts=8, step=before.step), sizes, after, first.end, (sizes.sum() - first.end) // after.step)
    read = first.samples + second.samples
    assert read.max() == 1
    assert read.sum() == first.number + second.number
    assert sizes.sum() - read.sum() < after.step
    assert second.fetched.max() <= 2  # of this epoch and of the next
    n_parts = max(len(parts_of(order, after, node)) for node in range(after.nodes))
    assert n_parts <= {16: 1, 4: 2, 6: 4, 1: 8}[after.nodes]


def test_what_is_not_fetched_is_noticed() -> None:
    """The control: a machine that is given the parts of another reads shards that are not in its cache."""
    cluster, sizes = Cluster(4, 2, 1, 2), uneven(60, 20)
    right = ShardOrder(sizes, 4, 5, parts=4, step=cluster.step)
    read_through(right, sizes, cluster, 0, 20)

    class Wrong(ShardOrder):
        def parts_of(self, rank: int, world: int, batch_size: int) -> range:
            return super().parts_of((rank + 2) % world, world, batch_size)

    with pytest.raises(AssertionError):
        read_through(Wrong(sizes, 4, 5, parts=4, step=cluster.step), sizes, cluster, 0, 20)
