"""`adalink merge`: folders in, an ordinary folder out, or one sentence, exit code 2 and nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import adalink, refused
from safetensors.torch import load_file, save_file
from shared import fixtures

from adalink import AdaLink, Bridge, Method
from adalink.checkpoint.folder import read_config
from adalink.lifecycle.flat import read_flat
from adalink.lifecycle.merge import MergeSettings
from multimodal.template import Template
from tasks.commands.lifecycle.merge import candidates
from tasks.runs.compose import compose


def succeeded(*arguments: object) -> str:
    """What a command prints that must succeed."""
    done = adalink(*arguments)
    assert done.code == 0, done
    return done.out


METHODS: dict[str, Method] = {"bridge": Bridge(kind="mlp", hidden=16, init_scale=8.0), "adalink": AdaLink(rank=2, modalities=("image", "text"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b of one seed, c of another: captions and answers of the scenes."""
    folder = tmp_path_factory.mktemp("runs")
    model = compose("scenes:encoder", "scenes:language", template=Template(prompt="<image><bos>"))
    for name, seed, moved, task in (("a", 0, 1, "captioning"), ("b", 0, 2, "vqa"), ("c", 1, 3, "captioning")):
        torch.manual_seed(seed)
        adapter = model.add_adapter(name, METHODS)
        generator = torch.Generator().manual_seed(moved)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.template = Template(prompt=f"<image><bos>{name}")
        model.save_pretrained(folder / name, task={"task": task})
    return folder


def test_a_merged_folder_is_evaluated_as_any_other(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    printed = succeeded("merge", runs / "a", runs / "b", "--out", out, "--weights", 0.7, 0.3)
    assert "stack (weights 0.7 0.3) of 2 adapters" in printed
    assert "their words differ" in printed
    config = read_config(out)
    assert config.derived["sources"] == [str(runs / "a"), str(runs / "b")]
    assert config.derived["digests"] == [read_flat(runs / name).digest for name in "ab"]
    assert config.task["prompt"] == "<image><bos>a"
    evaluated = ("evaluate", "--adapter", out, "--data.val.scenes", "val/2", "--generation.max_new_tokens", 3)
    succeeded(*evaluated, "--out", tmp_path / "evaluated")
    assert len(json.loads((tmp_path / "evaluated" / "results.json").read_text())) == 2


@pytest.mark.parametrize("method", [("arithmetic", "--scale", 0.5), ("ties",), ("pcb", "--keep", 0.3)], ids=str)
def test_the_start_is_drawn_again_on_the_frozen_parts_that_the_folder_names(method: tuple[Any, ...], runs: Path, tmp_path: Path) -> None:
    succeeded("merge", runs / "a", runs / "b", "--out", tmp_path / "out", "--method", *method, "--template_of", runs / "b")
    assert read_config(tmp_path / "out").task["task"] == "vqa"
    if method[0] == "arithmetic":
        succeeded("merge", runs / "a", runs / "b", "--out", tmp_path / "average", "--method", "average")
        files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "average")]
        assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_compressed_folders_merge_as_their_decompressed_ones(runs: Path, tmp_path: Path) -> None:
    for name in "ab":
        succeeded("compress", runs / name, "--out", tmp_path / name)
        succeeded("decompress", tmp_path / name, "--out", tmp_path / f"{name}_plain")
    for end in ("", "_plain"):
        succeeded("merge", tmp_path / f"a{end}", tmp_path / f"b{end}", "--out", tmp_path / f"merged{end}")
    assert read_flat(tmp_path / "merged").digest == read_flat(tmp_path / "merged_plain").digest
    assert read_flat(tmp_path / "a_plain").digest != read_flat(runs / "a").digest  # the control: it was compressed


REFUSED: list[tuple[tuple[Any, ...], str]] = [
    (("a", "c", "--method", "average"), "the adapters start from different weights (seed 0 and seed 1)"),
    (("a", "b", "--weights", 0.5, 0.6), "the weights sum to 1.1"),
    (("a", "b", "--method", "ties", "--keep", 1.5), "keep is 1.5"),
    (("a", "--method", "pcb"), "one adapter was given: there is nothing to merge"),
    (("a", "other_base"), "were trained on other language models"),
    (("a", "none"), "none is no adapter folder"),
    (("a", "cut"), "is damaged"),
    (("a", "early", "--method", "average"), "early names no start"),
    (("a", "head"), "has an answer head, which cannot be merged"),
    (("a", "b", "--template_of", "c"), "template_of is"),
    (("a", "b", "--search", "missing.yaml"), "missing.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_refused_merge_is_a_sentence_and_writes_nothing(number: int, runs: Path, tmp_path: Path) -> None:
    arguments, sentence = REFUSED[number]
    there = {name: shutil.copytree(runs / name.split("_")[0], tmp_path / name) for name in "abc"}
    for name in ("other_base", "cut", "early", "head"):
        there[name] = shutil.copytree(runs / "b", tmp_path / name)
    for name, change in (("other_base", {"language_model": {"name": "another", "fingerprint": "0" * 16}}), ("early", None)):
        file = tmp_path / name / "adalink_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base": {**config["base"], **change}} if change else {key: config[key] for key in config if key != "start"}))
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes((runs / "b" / "adapter_model.safetensors").read_bytes()[:-9])
    (tmp_path / "none").mkdir()
    save_file({"linear.bias": torch.zeros(1)}, tmp_path / "head" / "answer_head.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    given = [tmp_path / one if isinstance(one, str) and (tmp_path / one).is_dir() else one for one in arguments]
    assert sentence in refused(adalink("merge", *given, "--out", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_taken_folder_is_refused(runs: Path) -> None:
    assert "is there already: give another --out" in refused(adalink("merge", runs / "a", runs / "b", "--out", runs / "c"))


def test_what_a_search_tries() -> None:
    nine = candidates(MergeSettings(method="average"), 2)
    assert [one.weights for one in nine][:2] == [(0.1, 0.9), (0.2, 0.8)]
    assert len(nine) == 9
    assert len(candidates(MergeSettings(), 3)) == 36
    assert {(one.weights, one.scale) for one in candidates(MergeSettings(method="arithmetic"), 2)} >= {((1.0, 1.0), 0.7), ((1.4, 0.6), 1.0)}
    assert [one.scale for one in candidates(MergeSettings(method="ties"), 2)] == [0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5]


@pytest.mark.slow
def test_a_search_writes_every_try_and_takes_the_best(tmp_path: Path) -> None:
    folders = [fixtures("scenes_adapters") / name for name in ("captioning", "vqa")]
    configs = []
    for task in ("captioning", "vqa"):
        configs.append(tmp_path / f"{task}.yaml")
        configs[-1].write_text((Path(__file__).parents[3] / "tasks" / "scenes" / f"{task}.yaml").read_text().replace("val/200", "val/3"))
    printed = succeeded("merge", *folders, "--out", tmp_path / "out", "--search", *configs)
    found = json.loads((tmp_path / "out" / "merge_search.json").read_text())
    assert len(found["tries"]) == 9
    assert [one["metric"] for one in found["data"]] == ["CIDEr", "accuracy"]
    limits = [max(one["metrics"][i] for one in found["alone"]) for i in (0, 1)]
    for one in found["tries"]:
        assert one["score"] == pytest.approx(min(metric / limit for metric, limit in zip(one["metrics"], limits, strict=True)))
    best = max(found["tries"], key=lambda one: one["score"])
    assert read_config(tmp_path / "out").derived["settings"] == best["settings"]
    assert len({one["score"] for one in found["tries"]}) > 2  # the weights matter
    assert "9 of 9" in printed
