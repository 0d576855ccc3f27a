"""How good an order by windows of shards is, and what it costs to ask: beside all samples shuffled, without a byte of data.

    PYTHONPATH=.:tests/support python tests/benchmarks/studies/shard_order.py quality
    PYTHONPATH=.:tests/support python tests/benchmarks/studies/shard_order.py cluster [--shards 100000 --samples 1000]
    PYTHONPATH=.:tests/support python tests/benchmarks/studies/shard_order.py position

`quality` takes a sorted set, each shard with a label of its own, and asks how its labels spread over batches and how far one epoch's places
say those of the next. `cluster` counts what 1,024 ranks with 8 workers each read and fetch. `position` times a lookup.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from cluster import Cluster, parts_of, read_through, stream
from numpy.typing import NDArray

from multimodal.data.shards.order import ShardOrder, epoch_permutation

Epoch = Callable[[int], NDArray[np.int64]]


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["quality", "cluster", "position"])
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    values = parser.parse_args()
    if values.what == "quality":
        quality(values.shards or 1000, values.samples)
    elif values.what == "cluster":
        cluster(values.shards or 100_000, values.samples)
    else:
        position(values.shards or 100_000, values.samples)


def quality(n_shards: int, each: int, batch: int = 256) -> None:
    """Markdown: a row for each order."""
    sizes = np.full(n_shards, each)
    orders: dict[str, Epoch] = {"global": lambda epoch: epoch_permutation(n_shards * each, 0, epoch)}
    for window in (1, 2, 4, 8, 16, 32, 64, 128):
        orders[f"windows of {window}"] = whole(ShardOrder(sizes, window, 0))
    orders["windows of 16, 8 machines"] = whole(ShardOrder(sizes, 16, 0, parts=8, step=batch))
    print("| order | rank correlation | neighbours' distance | labels in a batch | spread of a batch | of 16 batches | of 256 |\n|---|---|---|---|---|---|---|")
    base = {n: spread(orders["global"](0) // each, n * batch, n_shards) for n in (1, 16, 256)}
    orders["windows of 1, the set not sorted (control)"] = orders["windows of 1"]
    mixed = np.random.default_rng(0).permutation(np.arange(n_shards * each) // each)
    for name, epoch in orders.items():
        first, second = epoch(0), epoch(1)
        labels = mixed[first] if "not sorted" in name else first // each
        n_labels = np.mean([len(np.unique(labels[at : at + batch])) for at in range(0, len(labels) - batch, batch * 7)])
        ratios = [spread(labels, n * batch, n_shards) / base[n] for n in (1, 16, 256)]
        print(f"| {name} | {correlation(first, second):+.4f} | {distance(first, second):.3f} | {n_labels:.1f} | {' | '.join(f'{one:.2f}' for one in ratios)} |")


def whole(order: ShardOrder) -> Epoch:
    """The samples of an epoch in their order."""
    return lambda epoch: np.concatenate([stream(order, window)[1] for window in range(epoch * order.n_windows, (epoch + 1) * order.n_windows)])


def places(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sample -> place."""
    found = np.empty_like(order)
    found[order] = np.arange(len(order))
    return found


def correlation(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Spearman's, of a sample's places in two epochs: 0 where the one says nothing of the other."""
    return float(np.corrcoef(places(first), places(second))[0, 1])


def distance(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """How far two samples that follow each other in one epoch are from each other in the next, at the median, as a share of the epoch."""
    return float(np.median(np.abs(np.diff(places(second)[first]))) / len(first))


def spread(labels: NDArray[np.int64], batch: int, n_labels: int) -> float:
    """The mean squared difference of a batch's counts of labels from those of the whole set."""
    total, number = 0.0, 0
    for at in range(0, len(labels) - batch + 1, batch * max(1, len(labels) // batch // 500)):
        total += float(((np.bincount(labels[at : at + batch], minlength=n_labels) - batch / n_labels) ** 2).sum())
        number += 1
    return total / number


def cluster(n_shards: int, each: int) -> None:
    """An epoch of 1,024 ranks on 128 machines, to its end, and to its middle and on with 120 machines."""
    batch = max(1, 16 * each // 1000)
    own, sizes = Cluster(128, 8, 8, batch), np.full(n_shards, each)
    for after in (own, Cluster(120, 8, 8, batch)):
        order, started = ShardOrder(sizes, 16, 0, parts=128, step=own.step), time.perf_counter()
        first = read_through(order, sizes, own, 0, int(sizes.sum()) // own.step // 2)
        rest = read_through(order, sizes, after, first.end, (int(sizes.sum()) - first.end) // after.step)
        read = first.samples + rest.samples
        later = np.concatenate([order.shards_of(order.n_windows + extra) for extra in range(rest.held + own.ahead)])
        times = rest.fetched.copy()
        times[:, later] = 0  # fetched for the next epoch too
        parts = [parts_of(order, after, node) for node in range(after.nodes)]
        window = max(len(order.shards_of(number, own_parts)) for number in range(order.n_windows) for own_parts in parts)
        print(
            f"{own.nodes} machines, then {after.nodes}: {len(read):,} samples in {n_shards:,} shards, {first.steps} and {rest.steps} steps of every rank; "
            f"each sample is read {read.max()} times at most, {first.number + rest.number:,} in all, {int((read == 0).sum()):,} are left for the next step; "
            f"a machine fetches a shard {max(first.fetched.max(), times.max())} times at most, all together {(first.fetched > 0).sum() / n_shards:.3f} and "
            f"{(times > 0).sum() / n_shards:.3f} times; a machine holds {rest.cached / each:,.0f} shards at most, "
            f"{(rest.held + own.ahead)} windows of {window} are {(rest.held + own.ahead) * window:,}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )


def position(n_shards: int, each: int) -> None:
    """Processor time to find a position in an epoch that was not asked for, in one that was, and to read its sample."""
    order = ShardOrder(np.full(n_shards, each), 16, 0)
    order.window(0)  # torch is imported late
    asks: dict[str, list[float]] = {"new epoch": [], "known epoch": [], "its sample (a new window)": [], "the next sample": []}
    for epoch in range(1, 50):
        at = epoch * n_shards * each + epoch * 12345
        for (_, times), ask in zip(asks.items(), (order.window, order.window, order.sample, order.sample), strict=True):
            started = time.thread_time()
            ask(at)
            times.append(time.thread_time() - started)
            at += 1
    print(", ".join(f"{name} {np.median(times) * 1e3:.3f} ms" for name, times in asks.items()))


if __name__ == "__main__":
    main()
