"""A training stream that reads windows of shards: the same for any workers and ranks, and exact after a change of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_server import served
from composed import Drawn, tower, two_texts
from loader_case import ENCODER, keys
from made_shards import ListSource, made_sample, made_source

from adalink.errors import CheckpointError, ConfigError
from multimodal.batches.packing import separate_rows
from multimodal.data.feature_cache.encode import PatchTable
from multimodal.data.inputs import Drafted
from multimodal.data.loader import TrainLoader, train_loader
from multimodal.data.order import MixedSet, Mixture, reading_plan, shard_sizes_of
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.storage import RemoteSettings
from multimodal.data.shards.writer import write_shards
from multimodal.sample import Sample, SampleSource
from tasks.data.sources import Chosen

N = 50  # samples, in shards of 4: the last has 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    write_shards(made_source(N), folder, samples_per_shard=4)
    return folder


def loader(source: SampleSource, steps: int = N, **more: Any) -> TrainLoader:
    settings = {"batch_size": 1, "seed": 5, "workers": 0, "order": "shards", "window": 2, **more}
    table = PatchTable(torch.zeros(len(source), tower().n_patches, 2).half(), {})
    return train_loader(source, two_texts, ENCODER, separate_rows, tower().preprocess, steps=steps, patches=table, **settings)


def read(source: SampleSource, samples: int, state: dict[str, Any] | None = None, *, world: int = 1, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """The keys of all ranks in the order of the stream, and its state."""
    ranks = [loader(source, samples // (world * more.get("batch_size", 1)), rank=rank, world=world, **more) for rank in range(world)]
    for one in ranks:
        if state is not None:
            one.load_state_dict(state)
    found = [list(one) for one in ranks]
    return [key for step in zip(*found, strict=True) for key in keys(step)], ranks[0].state_dict()


def test_every_epoch_has_each_sample_once_a_window_at_a_time_for_any_number_of_workers_and_ranks(shards: Path) -> None:
    source = ShardSource(shards)
    stream, _ = read(source, 2 * N)
    for epoch in (stream[:N], stream[N:]):
        assert sorted(epoch) == sorted(source[i].key for i in range(N))
        assert max(len({int(key) // 4 for key in epoch[at : at + 6]}) for at in range(0, N, 8)) <= 4  # of 13 shards; of two windows at most
    assert stream[:N] != stream[N:]
    assert read(source, 2 * N, workers=2)[0] == stream
    assert read(source, 2 * N, world=5, batch_size=2)[0] == stream
    plain, _ = read(source, N, order="global")
    assert max(len({int(key) // 4 for key in plain[at : at + 6]}) for at in range(0, N, 8)) > 4  # the control


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("world", "batch_size", "workers"), [(1, 1, 0), (1, 4, 1), (2, 2, 0), (3, 1, 0), (6, 2, 0)])
def test_other_ranks_and_workers_go_on_at_the_next_sample(shards: Path, nodes: int, world: int, batch_size: int, workers: int) -> None:
    source = ShardSource(shards)
    whole, _ = read(source, 3 * N // 4 * 4, world=2, batch_size=2, nodes=nodes)
    first, state = read(source, 28, world=2, batch_size=2, nodes=nodes)
    more = {"world": world, "batch_size": batch_size, "workers": workers, "nodes": world}
    second, later = read(source, 48, state, **more)
    third, _ = read(source, 24, later, world=2, batch_size=2, nodes=1)
    assert first + second + third == whole[:100]
    assert sorted(whole[:N]) == sorted(source[i].key for i in range(N))
    assert state.get("shard_parts", 1) == later.get("shard_parts", 1) == nodes


def test_machines_read_shards_of_their_own(shards: Path) -> None:
    source = ShardSource(shards)

    def read_by_both(nodes: int) -> float:
        """The share of shards that both of two ranks read in a window."""
        ranks = [loader(source, 6, rank=rank, world=2, nodes=nodes, batch_size=4, window=3) for rank in range(2)]
        plans = [reading_plan(one._positions.order, rank, 2, 4)[0] for rank, one in enumerate(ranks)]
        shared = 0
        for one, plan in zip(ranks, plans, strict=True):
            assert plan is not None
            steps = [{int(key) // 4 for key in keys([step])} for step in one]
            for number, found in enumerate(steps):
                windows = [window for at in range(number * 8, number * 8 + 8) for window in plan.windows(at)]
                assert found <= set(np.concatenate([plan.shards_of(window) for window in windows]).tolist())
        for window in range(-(-13 // (3 * nodes))):
            first, second = (set(plan.shards_of(window).tolist()) for plan in plans if plan is not None)
            shared += len(first & second)
        return shared / 13

    assert read_by_both(2) <= 3 / 13  # at most one in each window
    assert read_by_both(1) == 1  # the control


def test_auto_is_shards_for_servers_and_global_for_disks_each_set_of_a_mixture_for_itself(shards: Path) -> None:
    with served(shards) as server:
        remote, local = ShardSource(server.url), ShardSource(shards)
        cases: list[tuple[SampleSource, list[int]]] = [
            (remote, [2]), (local, [0]), (Drafted(remote), [2]), (Chosen(remote, range(9)), [2]), (Chosen(remote, [3, 1]), [0]), (Drawn(5), [0]),
            (Mixture({"a": MixedSet(local, 2), "b": MixedSet(Drafted(remote), 3), "c": MixedSet(Drawn(5), 1)}), [0, 2, 0]),
        ]  # fmt: skip
        for source, windows in cases:
            one = loader(source, order="auto")
            assert one.state_dict().get("window", [0] * len(windows)) == windows
        assert loader(remote, order="auto").order_note == "order: shards in a drawn order, the samples of 2 shuffled together"
        assert loader(remote, order="auto", world=4, nodes=2).order_note.endswith("shuffled together, in each of 2 parts of a step")
        assert loader(cases[-1][0], order="auto").order_note == "order: shards in a drawn order, the samples of [0, 2, 0] of the sets (0: all) shuffled together"
        bytes_of_two = int(np.sort(remote.shard_bytes)[-2:].sum())
        for room, note in ((bytes_of_two, "order: shards"), (bytes_of_two - 1, "order: global")):  # a cache that holds no window
            cached = ShardSource(server.url, remote=RemoteSettings(cache=shards.parent / "cache", cache_bytes=room))
            assert loader(cached, order="auto").order_note.startswith(note)
    assert loader(local, order="auto").order_note == "order: global, all samples are shuffled together"


def test_a_mixture_keeps_its_shares_and_each_set_is_read_by_its_own_windows(shards: Path) -> None:
    other = ListSource(made_sample(i, f"other{i}") for i in range(30))
    mixed = Mixture({"shards": MixedSet(ShardSource(shards), 3), "other": MixedSet(other, 1)})
    stream, _ = read(mixed, 200)
    for at in range(0, 200, 4):
        assert sum(key.startswith("shards:") for key in stream[at : at + 4]) == 3
    own = [key.removeprefix("shards:") for key in stream if key.startswith("shards:")]
    assert own == read(ShardSource(shards), 150, seed=6)[0]
    first, state = read(mixed, 60, world=3)
    assert first + read(mixed, 140, state, world=2, workers=1)[0] == stream


def test_texts_of_like_length_share_a_batch_within_the_windows(shards: Path) -> None:
    source = ShardSource(shards)
    stream, _ = read(source, 2 * N, bucket_pool=3, batch_size=4)
    assert sorted(stream[:N]) == sorted(source[i].key for i in range(N))
    assert stream != read(source, 2 * N, batch_size=4)[0]
    first, state = read(source, 28, bucket_pool=3, world=2, batch_size=2, nodes=2)
    assert first + read(source, 72, state, bucket_pool=3)[0] == stream


def test_the_first_samples_of_shards_are_read_in_a_row_too(shards: Path) -> None:
    source = ShardSource(shards)
    for n in (1, 4, 9, N):
        sizes = shard_sizes_of(Chosen(source, range(n)))
        assert sizes is not None
        assert sizes.sum() == n
        assert sorted(read(Chosen(source, range(n)), n)[0]) == sorted(source[i].key for i in range(n))
    assert shard_sizes_of(Chosen(source, range(1, 9))) is None


def test_a_state_of_another_order_is_refused_and_auto_goes_on_as_it_was(shards: Path) -> None:
    source = ShardSource(shards)
    state, plain = loader(source).state_dict(), loader(source, order="global").state_dict()
    coarse = tmp_shards(shards)
    for one, found, message in (
        (loader(source, window=3), state, r"train.window \(0 where train.order is global\) was 2 and is 3"),
        (loader(source, order="global"), state, r"train.window \(0 where train.order is global\) was 2 and is 0"),
        (loader(source), plain, r"train.window \(0 where train.order is global\) was 0 and is 2"),
        (loader(coarse), state, "the data's fingerprint was .* and is .*"),
        (loader(coarse), {**state, "data": ""}, r"the check sum of the shards' sizes was [0-9a-f]{16} and is [0-9a-f]{16}"),
        (loader(Mixture({"a": MixedSet(source, 1), "b": MixedSet(source, 1)})), state, "images in the data set was 50 and is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            one.load_state_dict(found)
    for found, order in ((state, "shards"), (plain, "global")):
        again, expected = loader(source, order="auto"), loader(source, order=order)
        again.load_state_dict(found)
        assert keys(list(again)) == keys(list(expected))


def tmp_shards(shards: Path) -> ShardSource:
    """The same samples in shards of 5."""
    folder = shards.parent / "coarse"
    write_shards(made_source(N), folder, samples_per_shard=5)
    return ShardSource(folder)


def test_what_has_no_shards_cannot_be_read_in_a_row(shards: Path) -> None:
    for source in (Drawn(5), Mixture({"a": MixedSet(Drawn(5), 1)})):
        with pytest.raises(ConfigError, match=r"train\.order is shards, and the data is not in shards: write it with `adalink shards from`, or set"):
            loader(source)


class Unread(ShardSource):
    """Says in which order it is read."""

    def __getitem__(self, index: int) -> Sample:
        self.read = [*getattr(self, "read", []), index // 4]
        return super().__getitem__(index)


def test_a_shard_is_read_in_one_window_of_an_epoch(shards: Path) -> None:
    """What a reader that fetches shards whole goes by: once a window is read, none of its shards comes again before the next epoch."""
    source = Unread(shards)
    one = loader(source)
    list(one)
    plan = reading_plan(one._positions.order)[0]
    assert plan is not None
    for position, shard in enumerate(source.read):
        assert [window for window in range(plan.order.n_windows) if shard in plan.shards_of(window)] == list(plan.windows(position))


def test_a_machine_of_another_number_fetches_the_parts_that_its_ranks_come_to(tmp_path: Path) -> None:
    """Four machines made the order, two go on with steps of half the size: each reads every second part, and fetches half of the shards."""
    write_shards(made_source(192), tmp_path / "set", samples_per_shard=4)
    whole, state = read(ShardSource(tmp_path / "set"), 0, batch_size=2, world=4, nodes=4, window=3)
    expected, _ = read(ShardSource(tmp_path / "set"), 192, batch_size=2, world=4, nodes=4, window=3)
    read_by = []
    for rank in range(2):
        with served(tmp_path / "set") as server:
            source = ShardSource(server.url, remote=RemoteSettings(cache=tmp_path / f"cache{rank}", ahead=0))
            one = loader(source, 48, batch_size=2, rank=rank, world=2, nodes=2, window=3, order="auto")
            one.load_state_dict(state)
            server.asked.clear()  # of opening, which looks at each shard's size
            read_by.append([keys([step]) for step in one])
            fetched = [name for name in server.asked if name.endswith(".tar")]
            assert 24 <= len(fetched) <= 24 + 4 * 3  # four windows, and where two parts meet each reads the shard
            assert max(server.asked[name] for name in fetched) == 1
    assert whole == []
    assert [key for step in zip(*read_by, strict=True) for both in step for key in both] == expected


def test_a_stream_that_goes_on_as_it_was_fetches_as_it_was(shards: Path, tmp_path: Path) -> None:
    with served(shards) as server:
        source = ShardSource(server.url, remote=RemoteSettings(cache=tmp_path / "cache"))
        state = loader(ShardSource(shards), order="global").state_dict()
        one = loader(source, order="auto")
        assert [id(ahead.plan.order) for ahead in one._positions._ahead] == [id(one._positions.order)]
        one.load_state_dict(state)
        assert one._positions._ahead == ()
        assert keys(list(one)) == keys(list(loader(ShardSource(shards), order="global")))
        again = loader(source, order="auto")
        again.load_state_dict(loader(ShardSource(shards)).state_dict())
        assert [id(ahead.plan.order) for ahead in again._positions._ahead] == [id(again._positions.order)]
        assert keys(list(again)) == keys(list(loader(ShardSource(shards))))
