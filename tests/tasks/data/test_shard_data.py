"""Shards as a config names them: a URL with its cache, several sets by weight, and a run that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server, served
from cli_run import refused, train
from made_shards import ListSource, everything, made_sample, made_shards, tar_of
from safetensors.torch import load_file

from adalink.errors import ConfigError, DataError
from multimodal.data.order import Mixture
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from tasks.commands.shards import shards_img2dataset
from tasks.data.sources import DataConfig, saved_data
from tasks.scenes.dataset import Scenes

FEW = ("--train.steps", "3", "--train.batch_size", "2", "--data.val.scenes", "val/2", "--generation.max_new_tokens", "2", "--data.train.scenes", "null")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_shards(Scenes(split="train", size=7), tmp_path / "web" / "set", samples_per_shard=3)
    with served(tmp_path / "web") as one:
        yield one


def test_a_run_reads_a_url_as_it_reads_the_folder(server: Server, tmp_path: Path) -> None:
    adapters = []
    for name, place in (("folder", server.folder / "set"), ("url", server.url + "/set")):
        cache = ["--data.train.cache", str(tmp_path / "cache")] if name == "url" else []
        done = train("captioning", tmp_path / name, "--data.train.shards", place, *cache, "--train.order", "global", small=FEW)
        assert done.code == 0, done.err
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all((value == adapters[1][name]).all() for name, value in adapters[0].items())
    server.faults["set/shard-000001.tar"] = [404]
    sentence = refused(train("captioning", tmp_path / "gone", "--data.train.shards", server.url + "/set", small=FEW))
    assert sentence.endswith("/set/shard-000001.tar is not there (the server answered 404 Not Found); check the URL, or put the file there again")
    assert not (tmp_path / "gone").exists()


def test_a_run_mixes_sets_by_weight(server: Server, tmp_path: Path) -> None:
    write_shards(Scenes(split="val", size=2), tmp_path / "other", samples_per_shard=2)
    mix = json.dumps({str(server.folder / "set"): 1, str(tmp_path / "other"): 1})
    done = train("captioning", tmp_path / "run", "--data.train.mix", mix, small=FEW)
    assert done.code == 0, done.err
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").read_text())["data"]
    assert (state["samples"], state["weights"], state["position"]) == ([7, 2], [1, 1], 6)


def test_sets_of_a_mix_are_told_apart_and_their_bad_samples_named(tmp_path: Path) -> None:
    made_shards(tmp_path / "a" / "set", 3)
    made_shards(tmp_path / "b" / "set", 4)
    (tmp_path / "foreign").mkdir()
    tar_of(tmp_path / "foreign" / "x.tar", [("k.jpg", b"x"), ("k.txt", b"x"), ("bad.txt", b"x")])
    shards_img2dataset(shards=tmp_path / "foreign", bad_samples=1)
    (tmp_path / "foreign" / "manifest.json").unlink()
    opened = DataConfig(mix={str(tmp_path / "a" / "set"): 2, str(tmp_path / "b" / "set"): 1, str(tmp_path / "foreign"): 1}).open()
    assert isinstance(opened.source, Mixture)
    assert opened.source.weights == (2, 1, 1)
    assert [opened.source[i].key for i in (0, 3, 7)] == [f"{tmp_path}/a/set:0", f"{tmp_path}/b/set:0", "foreign:k"]
    assert [bad.key for bad in opened.problems] == ["foreign:bad"]


def test_every_kind_of_data_set_may_be_drafted(tmp_path: Path) -> None:
    made_shards(tmp_path / "set", 3)
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]})
    )
    (tmp_path / "1.jpg").write_bytes(ShardSource(tmp_path / "set")[0].image)  # type: ignore[arg-type]
    kinds: list[dict[str, object]] = [
        {"shards": tmp_path / "set"}, {"shards": tmp_path / "set", "limit": 2}, {"mix": {str(tmp_path / "set"): 1}},
        {"images": tmp_path, "annotations": tmp_path / "captions.json"},
    ]  # fmt: skip
    for fields in kinds:
        exact, dry_run = (DataConfig(**fields, decode=decode).open().source for decode in ("exact", "draft"))  # type: ignore[arg-type]
        assert [source[0].decode for source in (exact, dry_run)] == ["exact", "draft"]
        assert isinstance(dry_run, Mixture) == ("mix" in fields)  # its order is a mixture's
        assert len(exact) == len(dry_run)


def test_a_folder_may_be_given_as_text_or_path(tmp_path: Path) -> None:
    made_shards(tmp_path / "set")
    for place in (str(tmp_path / "set"), tmp_path / "set"):
        assert everything(DataConfig(shards=place).open().source) == everything(ShardSource(tmp_path / "set"))


def test_a_list_of_shards_is_one_set_and_a_saved_config_gives_it_again(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(ListSource([made_sample(n, f"{name}{n}") for n in range(4)]), tmp_path / name, samples_per_shard=2)
    places = [str(tmp_path / "b" / "shard-{000001..000001}.tar"), str(tmp_path / "[a]")]
    for config in (DataConfig(shards=places), saved_data({"shards": places})):
        assert [sample.key for sample in everything(config.open().source)] == ["b2", "b3", "a0", "a1", "a2", "a3"]
    for name in ("shards", "path"):
        assert getattr(saved_data({name: "https://host/set"}), name) == "https://host/set"  # a Path would lose a slash
    with pytest.raises(DataError, match="the list of shards is empty"):
        DataConfig(shards=[]).open()


@pytest.mark.parametrize(
    "fields, message",
    [({"mix": {}}, r"mix is {} and limit 0: give data sets by path, each with a whole number from 1"),
     ({"mix": {"a": 0}}, "mix is {'a': 0}"),
     ({"mix": {"a": 1}, "limit": 3}, "and limit 3"),
     ({"mix": {"a": 1}, "scenes": "val/2"}, "needs one of path, images, shards, mix, glue, table, disk and scenes, got mix, scenes"),
     ({"scenes": "val/2", "after_shots": 1}, "shots is 0, shots_seed 0 and after_shots 1: give 0 or more, and shots with after_shots"),
     ({"mix": {"a": 1}, "shots": 1}, "shots is 1 and mix was given, whose weights choose images"),
     ({"scenes": "val/2", "decode": "draft"}, r"decode is 'draft': give exact or draft, which is for JPEGs \(scenes are none\)"),
     ({"shards": "x", "decode": "half"}, "decode is 'half': give exact or draft"),
     ({"scenes": "val/2", "cache": Path("c")}, "the cache c would not be used: it keeps shards from a URL and unpacked parquet, and the data set is scenes"),
     ({"shards": "http://x/y", "cache_gib": -1.0}, "its cache_gib -1.0: give 0 or more")],
)  # fmt: skip
def test_senseless_settings_of_shards_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [42, 1])
def test_shots_are_those_of_published_subsets_and_what_follows_overlaps_nothing(seed: int) -> None:
    from datasets import Dataset

    published = Dataset.from_dict({"row": list(range(60))}).shuffle(seed=seed)["row"]
    assert list(published) != list(range(60))  # the control

    def keys(**chosen: int) -> list[str]:
        return [sample.key for sample in everything(DataConfig(scenes="train/60", shots_seed=seed, **chosen).open().source)]

    whole = [sample.key for sample in everything(DataConfig(scenes="train/60").open().source)]
    assert keys(shots=20) == [whole[row] for row in published[:20]]
    assert keys(shots=5) == keys(shots=20)[:5]
    assert keys(shots=20, after_shots=30) == [whole[row] for row in published[20:50]]
    assert len(keys(shots=50, after_shots=30)) == 10
    assert set(keys(shots=8, limit=10)) < set(whole[:10])
    with pytest.raises(DataError, match="shots is 61, and it holds 60 samples: give fewer shots"):
        keys(shots=61)
    with pytest.raises(DataError, match="shots is 60 with samples after them, and it holds 60 samples"):
        keys(shots=60, after_shots=1)
