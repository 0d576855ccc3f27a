"""What reading a large set of shards from a store needs, and how fast it can be: arithmetic, before there is a machine or a set."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from adalink.errors import ConfigError
from multimodal.sample import counted

__all__ = ["ReadingPlan", "ReadingSetup", "parsed_number", "plan_reading", "reading_as_json", "reading_as_text"]

_ROW, _DRAWN = 200, 32  # bytes of a shard in memory: its line of the manifest, and its places in the orders of two epochs
_INDEX = 90  # bytes of a sample in its shard's index: places and check sums of three parts, and a short key
_MAPPED = 2**26  # most bytes of indexes that a process maps at a time
_PREFETCH = 2  # steps that each worker process makes ahead


@dataclass(frozen=True, kw_only=True)
class ReadingSetup:
    """A set, the machines, and the way between them. Rates are bytes or samples per second."""

    samples: int
    sample_bytes: float
    samples_per_shard: int = 1000
    ranks: int = 8
    ranks_per_node: int = 8
    batch_size: int = 16  # images of a step of each rank
    workers: int = 8  # processes of each rank
    window: int = 16  # as train.window
    ahead: int = 2  # windows that are fetched before they are read
    connections: int = 8  # shards that a machine fetches at a time
    bandwidth: float = 1.25e9  # from the store to each machine
    latency: float = 0.05  # seconds until a request's first byte
    disk: float = 2e9  # of a machine, reading and writing together
    decode: float = 100.0  # samples that a worker process decodes
    rate: float = math.inf  # samples that a rank trains; infinite where it is not known
    apart: bool = True  # machines read shards of their own; not where sets are mixed or batches are grouped by length

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        for one in dataclasses.fields(self):
            value, least = getattr(self, one.name), 0 if one.name in ("ahead", "latency", "apart") else 1e-9
            if not value >= least:
                raise ConfigError(f"--{one.name} is {value}: give {'0 or more' if least == 0 else 'a positive number'}")
        if self.ranks % min(self.ranks, self.ranks_per_node):
            raise ConfigError(f"{self.ranks} ranks are not a whole number of machines with {self.ranks_per_node} each: change one of the two")

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, self.ranks // self.ranks_per_node)

    @property
    def shards(self) -> int:
        """Of the set."""
        return -(-self.samples // self.samples_per_shard)


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """What one order of reading needs. Numbers are those of one machine, unless a line says otherwise.

    requests      to the store in an epoch
    bytes_read    from the store in an epoch
    cache_bytes   the most that whole shards take on the disk; more is not used in the middle of an epoch
    least_cache   below which a run is refused
    memory        bytes of a process: the manifest's lines, the indexes that are mapped (shared by processes), and a window's samples
    limits        what bounds the speed -> samples per second of all machines together
    """

    order: Literal["shards", "global"]
    requests: float
    bytes_read: float
    cache_bytes: float
    least_cache: float
    memory: float
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str:
        """The smallest limit's name."""
        return min(self.limits, key=self.limits.__getitem__)

    @property
    def samples_per_second(self) -> float:
        """Of all machines together."""
        return self.limits[self.bottleneck]


def plan_reading(setup: ReadingSetup, order: Literal["shards", "global"] = "shards") -> ReadingPlan:
    """An epoch's reading, once the first windows are there. With `global` the cache is smaller than the set, so that each sample is a request."""
    return _by_windows(setup) if order == "shards" else _by_samples(setup)


def _by_windows(setup: ReadingSetup) -> ReadingPlan:
    parts = setup.nodes if setup.apart else 1
    windows = -(-setup.shards // (setup.window * parts))
    # Two parts that follow each other may share a shard in each window.
    fetched = (setup.shards + windows * (parts - 1)) / parts
    shard_bytes = setup.sample_bytes * setup.samples_per_shard
    of_window = math.ceil(math.ceil(setup.shards / windows) / parts) + (parts > 1)
    made_ahead = setup.ranks * setup.batch_size * (1 + _PREFETCH * setup.workers)
    spanned = min(windows, 1 + math.ceil(made_ahead * windows / setup.samples))  # windows that the processes of a machine read at one time
    held = min(setup.shards, of_window * (spanned + setup.ahead)) * shard_bytes
    per_shard = setup.samples / parts / fetched  # samples of a machine's own that a fetched shard brings
    network = min(setup.bandwidth / shard_bytes, setup.connections / (setup.latency + shard_bytes * setup.connections / setup.bandwidth))
    name = "network" if setup.latency * setup.bandwidth < shard_bytes * setup.connections else "latency of the store"
    every = setup.nodes if parts > 1 else 1  # where each machine reads all, more of them are no faster
    limits = {name: network * per_shard * every, "disk": setup.disk / 2 / shard_bytes * per_shard * every, **_making(setup)}
    if setup.ahead == 0:  # fetched while nothing is made
        limits = {"fetching, and making after it (--ahead 0)": 1 / sum(1 / min(one) for one in (list(limits.values())[:2], list(limits.values())[2:]))}
    return ReadingPlan(
        order="shards", requests=2 * fetched, bytes_read=fetched * setup.samples_per_shard * (setup.sample_bytes + _INDEX), cache_bytes=held,
        least_cache=min(setup.shards, of_window) * shard_bytes, memory=_memory(setup, of_window * setup.samples_per_shard), limits=limits,
    )  # fmt: skip


def _by_samples(setup: ReadingSetup) -> ReadingPlan:
    own = setup.samples / setup.nodes
    readers = min(setup.ranks, setup.ranks_per_node) * setup.workers
    network = min(setup.bandwidth / setup.sample_bytes, readers / (setup.latency + setup.sample_bytes * readers / setup.bandwidth)) * setup.nodes
    name = "network" if setup.latency * setup.bandwidth < setup.sample_bytes * readers else "latency of the store"
    indexes = setup.shards * setup.samples_per_shard * _INDEX
    return ReadingPlan(
        order="global", requests=own + setup.shards, bytes_read=own * setup.sample_bytes + indexes, cache_bytes=0, least_cache=0,
        memory=_memory(setup, setup.samples), limits={name: network, **_making(setup)},
    )  # fmt: skip


def _making(setup: ReadingSetup) -> dict[str, float]:
    limits = {"decoding": setup.ranks * setup.workers * setup.decode}
    return limits if math.isinf(setup.rate) else {**limits, "training": setup.ranks * setup.rate}


def _memory(setup: ReadingSetup, shuffled: float) -> float:
    indexes = min(_MAPPED, setup.samples * _INDEX)
    return setup.shards * (_ROW + _DRAWN) + indexes + 8 * shuffled


# ----------------------------------------
# As text.


_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmgtp]?)(i?)(b?)(?:/s)?", re.IGNORECASE)


def parsed_number(text: str) -> float:
    """`400M` -> 4e8, `100KB` -> 1e5, `1 GiB` -> 2**30, `1.25GB/s` -> 1.25e9. Raises ConfigError."""
    if text.strip() == "inf":
        return math.inf
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no number: give digits and perhaps a unit, such as 400M, 100KB, 64MiB or 1.25GB/s")
    base = 1024.0 if found[3] else 1000.0
    return float(found[1]) * math.pow(base, "kmgtp".index(found[2].lower()) + 1 if found[2] else 0)


def reading_as_json(setup: ReadingSetup, plans: tuple[ReadingPlan, ...]) -> str:
    """Both, with the bottleneck; a rate that is not known is null."""
    given = {name: None if value == math.inf else value for name, value in dataclasses.asdict(setup).items()}
    return json.dumps(
        {**given, "plans": [{**dataclasses.asdict(one), "bottleneck": one.bottleneck, "samples_per_second": one.samples_per_second} for one in plans]}, indent=2
    )


def reading_as_text(setup: ReadingSetup, plans: tuple[ReadingPlan, ...]) -> str:
    """A table with a column for each order."""
    rows: list[tuple[str, list[str]]] = [
        ("", [f"order: {one.order}" for one in plans]),
        ("requests, each machine and epoch", [f"{one.requests:,.0f}" for one in plans]),
        ("read from the store, each machine and epoch", [_bytes(one.bytes_read) for one in plans]),
        ("cache on each machine", [_bytes(one.cache_bytes) if one.cache_bytes else "smaller than the set" for one in plans]),
        ("  at least", [_bytes(one.least_cache) if one.cache_bytes else "" for one in plans]),
        ("memory of a process", [_bytes(one.memory) for one in plans]),
    ]
    for name in dict.fromkeys(name for one in plans for name in one.limits):
        rows.append((f"samples per second by {name}", [f"{one.limits[name]:,.0f}" if name in one.limits else "" for one in plans]))
    rows += [
        ("samples per second", [f"{one.samples_per_second:,.0f}" for one in plans]),
        ("asked of the store in a second, by all", [_asked(setup, one) for one in plans]),
        ("an epoch takes", [_time(setup.samples / one.samples_per_second) for one in plans]),
        ("bottleneck", [one.bottleneck for one in plans]),
    ]
    widths = [max(len(name) for name, _ in rows), *(max(len(cells[i]) for _, cells in rows) for i in range(len(plans)))]
    head = (
        f"{setup.samples:,} samples of {_bytes(setup.sample_bytes)} in {setup.shards:,} shards of {_bytes(setup.sample_bytes * setup.samples_per_shard)}, "
        f"{_bytes(setup.samples * setup.sample_bytes)} in all; {counted(setup.ranks, 'rank')} on {counted(setup.nodes, 'machine')}"
    )
    lines = ["  ".join([name.ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(cells))]).rstrip() for name, cells in rows]
    return "\n".join([head, "", *lines])


def _asked(setup: ReadingSetup, plan: ReadingPlan) -> str:
    seconds = setup.samples / plan.samples_per_second / setup.nodes
    return f"{plan.requests / seconds:,.0f} requests, {_bytes(plan.bytes_read / seconds)}"


def _bytes(value: float) -> str:
    unit = min(5, int(math.log(max(value, 1), 1000)))
    return f"{value / 1000**unit:,.3g} {('B', 'KB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
