"""Many machines that read one stream by windows of shards, each with a cache of whole shards: counted, without a byte of data."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from multimodal.data.shards.order import ShardOrder


@dataclass(frozen=True)
class Cluster:
    """prefetch: steps that each worker makes ahead. ahead: windows that are fetched before anybody reads them."""

    nodes: int
    ranks_per_node: int
    workers: int
    batch_size: int
    prefetch: int = 2
    ahead: int = 2

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def step(self) -> int:
        return self.world * self.batch_size


@dataclass(frozen=True)
class Seen:
    """What was read.

    samples   int8 [samples]: how often each, within a window at most once; `number` counts them all
    number    of samples that were read
    fetched   int16 [nodes, shards]: how often each machine fetched each
    cached    the most samples that a machine's shards held at one time
    held      the most windows that the processes of a machine read at one time
    steps     of each rank
    end       the position after the last
    """

    samples: NDArray[np.int8]
    number: int
    fetched: NDArray[np.int16]
    cached: int
    held: int
    steps: int
    end: int


def read_through(order: ShardOrder, sizes: NDArray[np.int64], cluster: Cluster, first: int, steps: int) -> Seen:
    """What `steps` steps from a position on read. Raises AssertionError where a rank reads a shard that is not in its machine's cache."""
    parts = [parts_of(order, cluster, node) for node in range(cluster.nodes)]
    end, n_shards, ranks = first + steps * cluster.step, len(sizes), cluster.batch_size * cluster.ranks_per_node
    samples, fetched = np.zeros(int(sizes.sum()), dtype=np.int8), np.zeros((cluster.nodes, n_shards), dtype=np.int16)
    cached = held = number = 0
    ends = np.cumsum(sizes)
    caches: list[set[int]] = [set() for _ in parts]
    done = order.window(first)
    for low, high in events(order, cluster, first, steps):
        held = max(held, high - low + 1)
        for node, own in enumerate(parts):
            needed = set(np.concatenate([order.shards_of(window, own) for window in range(low, high + cluster.ahead + 1)]).tolist())
            fetched[node, sorted(needed - caches[node])] += 1
            caches[node] = needed
            cached = max(cached, int(sizes[sorted(needed)].sum()))
        for window in range(done, high + 1):  # made ahead of the step that is handed out
            positions, found = stream(order, window)
            inside = (positions >= first) & (positions < end)
            samples[found[inside]] += 1
            number += int(inside.sum())
            reader = (positions[inside] - first) % cluster.step // ranks
            read = np.zeros(cluster.nodes * n_shards, dtype=bool)
            read[reader * n_shards + np.searchsorted(ends, found[inside], side="right")] = True
            missing = [pair for pair in np.flatnonzero(read).tolist() if pair % n_shards not in caches[pair // n_shards]]
            assert not missing, missing[:3]
        done = max(done, high + 1)
    return Seen(samples, number, fetched, cached, held, steps, end)


def parts_of(order: ShardOrder, cluster: Cluster, node: int) -> list[int]:
    """Those that the ranks of a machine read."""
    ranks = range(node * cluster.ranks_per_node, (node + 1) * cluster.ranks_per_node)
    return sorted({part for rank in ranks for part in order.parts_of(rank, cluster.world, cluster.batch_size)})


def events(order: ShardOrder, cluster: Cluster, first: int, steps: int) -> list[tuple[int, int]]:
    """The first and the last window that are read at one time, each time that one of the two changes."""
    found: list[tuple[int, int]] = []
    end = first + steps * cluster.step
    for step in range(steps):
        at = first + step * cluster.step
        pair = order.window(at), order.window(min(at + (1 + cluster.prefetch * cluster.workers) * cluster.step, end) - 1)
        if found[-1:] != [pair]:
            found.append(pair)
    return found


def stream(order: ShardOrder, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions of a window, and the sample at each: as `order.sample`, for all at once."""
    own = [order.samples_of(window, part) for part in range(order.parts)]
    first = order.first_position(window)
    positions = np.arange(first, first + sum(map(len, own)))
    part, samples = (positions % order.step * order.parts // order.step).astype(np.uint16), np.empty(len(positions), dtype=np.int64)
    samples[np.argsort(part, kind="stable")] = np.concatenate(own)
    return positions, samples


def samples_per_second(
    *, windows: int, shards: int, shard_bytes: float, samples_per_shard: float, connections: int, bandwidth: float, latency: float, made: float, ahead: int
) -> float:
    """Of one machine that fetches windows ahead over a few connections, and makes samples of a window once all of it is there.

    made   samples per second that it makes where it waits for nothing
    """
    free = [0.0] * connections
    begun, ended, there = [0.0] * windows, 0.0, 0.0
    for window in range(windows):
        may_begin = begun[window - ahead - 1] if window > ahead else 0.0
        if ahead == 0:
            may_begin = ended
        for _ in range(shards):
            start = max(heapq.heappop(free), may_begin)
            there = max(there, start + latency + shard_bytes * connections / bandwidth)
            heapq.heappush(free, start + latency + shard_bytes * connections / bandwidth)
        begun[window] = max(ended, there)
        ended = begun[window] + shards * samples_per_shard / made
    warm = windows // 4
    return (windows - 1 - warm) * shards * samples_per_shard / (begun[-1] - begun[warm])
