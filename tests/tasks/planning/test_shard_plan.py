"""What `adalink shards plan` computes is what a simulated cluster, a real set of shards and a real server show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_server import served
from cli_run import adalink
from cluster import Cluster, parts_of, read_through, samples_per_second
from made_shards import made_source

from adalink.errors import ConfigError
from multimodal.data.order import reading_plan
from multimodal.data.shards.members import encode_index
from multimodal.data.shards.order import ShardOrder
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings
from multimodal.data.shards.writer import write_shards
from tasks.planning.shards import ReadingSetup, parsed_number, plan_reading

SMALL = ReadingSetup(samples=40_000, sample_bytes=1e5, samples_per_shard=20, ranks=64, ranks_per_node=8, batch_size=2, workers=4, window=16)


def simulated(setup: ReadingSetup) -> tuple[float, float, float]:
    """Shards that a machine fetches in an epoch, the most samples in its cache, and those of its window."""
    cluster = Cluster(setup.nodes, setup.ranks // setup.nodes, setup.workers, setup.batch_size, ahead=setup.ahead)
    sizes = np.full(setup.shards, setup.samples_per_shard)
    parts = setup.nodes if setup.apart else 1
    order = ShardOrder(sizes, setup.window, 5, parts=parts, step=cluster.step)
    seen = read_through(order, sizes, cluster, 0, setup.samples // cluster.step)
    own = [[len(order.shards_of(window, parts_of(order, cluster, node))) for window in range(order.n_windows)] for node in range(setup.nodes)]
    return float(np.mean(np.sum(own, axis=1))), seen.cached, max(map(max, own)) * setup.samples_per_shard


@pytest.mark.parametrize(
    "changed", [{}, {"apart": False, "window": 100}, {"ranks": 8}, {"ranks": 64, "ranks_per_node": 4, "ahead": 1}, {"window": 3}, {"window": 1000}, {"workers": 1}]
)
def test_requests_bytes_and_cache_are_those_of_the_simulation(changed: dict[str, Any]) -> None:
    setup = replace(SMALL, **changed)
    plan, (fetched, cached, window) = plan_reading(setup), simulated(setup)
    assert 0.9 * plan.requests <= 2 * fetched <= plan.requests  # a shard and its index; the plan counts every shard that two may share
    assert plan.bytes_read == pytest.approx(plan.requests / 2 * 20 * (1e5 + 90))
    assert 0.7 * plan.cache_bytes <= cached * 1e5 <= plan.cache_bytes + 1
    assert 0.8 * plan.least_cache <= window * 1e5 <= plan.least_cache + 20 * 1e5


@pytest.mark.parametrize(
    ("changed", "bottleneck"),
    [
        ({"latency": 0.0, "decode": 1e6, "disk": 1e10}, "network"),
        ({"latency": 0.0, "decode": 1e6}, "disk"),
        ({"latency": 0.5, "connections": 4, "decode": 1e6}, "latency of the store"),
        ({"bandwidth": 1e12, "latency": 0.0, "disk": 1e12}, "decoding"),
        ({"bandwidth": 1e12, "latency": 0.0, "disk": 1e12, "rate": 20.0}, "training"),
        ({"ahead": 0, "rate": 500.0}, "fetching, and making after it (--ahead 0)"),
    ],
)
def test_the_speed_is_that_of_a_simulated_machine(changed: dict[str, Any], bottleneck: str) -> None:
    setup = replace(SMALL, ranks=8, **changed)
    plan = plan_reading(setup)
    assert plan.bottleneck == bottleneck
    made = min(setup.ranks * setup.workers * setup.decode, setup.ranks * setup.rate)
    found = samples_per_second(
        windows=60, shards=16, shard_bytes=2e6, samples_per_shard=20, connections=setup.connections, bandwidth=min(setup.bandwidth, setup.disk / 2),
        latency=setup.latency, made=made, ahead=setup.ahead,
    )  # fmt: skip
    assert plan.samples_per_second == pytest.approx(found, rel=0.1)
    cured: dict[str, dict[str, Any]] = {"network": {"bandwidth": 2e9}, "disk": {"disk": 4e9, "bandwidth": 2e9}, "latency of the store": {"connections": 8}, "decoding": {"workers": 8}, "training": {"rate": 40.0}}
    better = plan_reading(replace(setup, **cured.get(bottleneck, {"ahead": 2})))
    assert better.samples_per_second > 1.2 * plan.samples_per_second  # the control
    assert plan_reading(replace(setup, batch_size=4)).samples_per_second == plan.samples_per_second


def test_more_machines_are_as_much_faster_where_each_reads_shards_of_its_own_and_no_faster_where_they_do_not() -> None:
    one, many = (replace(SMALL, ranks=ranks, samples=4_000_000, decode=1e9, window=32) for ranks in (8, 64))
    assert plan_reading(many).samples_per_second / plan_reading(one).samples_per_second == pytest.approx(8, rel=0.05)
    together = [plan_reading(replace(each, apart=False)).samples_per_second for each in (one, many)]
    assert together[0] == together[1]


def test_an_order_of_single_samples_is_a_request_each_and_waits_for_the_store() -> None:
    setup = replace(SMALL, samples=400_000_000, samples_per_shard=4000, ranks=1024, workers=8)
    plan, rows = plan_reading(setup, "global"), plan_reading(setup)
    assert plan.requests == 400_000_000 / 128 + 100_000
    assert plan.bottleneck == "latency of the store"
    assert rows.requests < plan.requests / 1000
    assert rows.samples_per_second > 5 * plan.samples_per_second


def test_requests_and_memory_are_those_of_a_real_set_on_a_real_server(tmp_path: Path) -> None:
    write_shards(made_source(60), tmp_path / "set", samples_per_shard=4)
    sizes = np.full(15, 4)
    plan = plan_reading(ReadingSetup(samples=60, sample_bytes=1e3, samples_per_shard=4, ranks=1, ranks_per_node=1, window=3, workers=1))
    with served(tmp_path / "set") as server:
        source = ShardSource(server.url, remote=RemoteSettings(cache=tmp_path / "cache", ahead=0))
        opened = server.asked.total()
        order = ShardOrder(sizes, 3, 0)
        ahead = source.follow(reading_plan(order)[0])
        assert ahead is not None
        for position in range(60):
            ahead.at(position)
            assert source[order.sample(position)].key == str(order.sample(position))
        assert server.asked.total() - opened == plan.requests == 30
    rows = source._touched.table.rows
    assert 0.5 < rows.itemsize / 200 <= 1.1
    indexes: list[Any] = [source._touched.table[number] for number in range(15)]
    index = sum(len(encode_index(replace(shard, members=shard.members.load()))) for shard in indexes) / 60
    assert 80 < index < 120  # 90 in a shard of more samples, whose head is shared


@pytest.mark.parametrize(
    ("text", "value"), [("400M", 4e8), ("100KB", 1e5), ("1 GiB", 2**30), ("1.25GB/s", 1.25e9), ("12", 12), ("1e3", 1000), ("64mib", 2**26), (".5K", 500)]
)
def test_numbers_have_units(text: str, value: float) -> None:
    assert parsed_number(text) == value


@pytest.mark.parametrize("text", ["", "many", "-3", "4 parsecs", "1,000"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no number: give digits and perhaps a unit, such as 400M"):
        parsed_number(text)


def test_the_command_prints_both_orders_and_the_bottleneck() -> None:
    words = ("shards", "plan", "--samples", "400M", "--bytes", "100KB", "--ranks", "1024", "--samples_per_shard", "4000")
    done = adalink(*words, "--bandwidth", "1.25GB/s")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "400,000,000 samples of 100 KB in 100,000 shards of 400 MB, 40 TB in all; 1,024 ranks on 128 machines"
    assert lines[-1].split() == ["bottleneck", "decoding", "latency", "of", "the", "store"]
    assert "819,200" in lines[-4]
    found = json.loads(adalink(*words, "--json").out)
    assert [one["order"] for one in found["plans"]] == ["shards", "global"]
    assert found["plans"][0] == {**found["plans"][0], "bottleneck": plan_reading(setup_of(found)).bottleneck}


def setup_of(found: dict[str, Any]) -> ReadingSetup:
    return ReadingSetup(**{name: value for name, value in found.items() if name != "plans" and value is not None})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "many"), "'many' is no number"),
        (("--samples", "0"), "--samples is 0: give a positive number"),
        (("--samples", "1K", "--ranks", "12"), "12 ranks are not a whole number of machines with 8 each"),
        (("--samples", "1K", "--window", "0"), "--window is 0: give a positive number"),
        (("--samples", "1K", "--ahead", "-1"), "--ahead is -1: give 0 or more"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words: tuple[str, ...], message: str) -> None:
    done = adalink("shards", "plan", *words)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
