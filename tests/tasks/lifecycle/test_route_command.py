"""`adalink route`: the folder that it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from cli_run import RECIPES, adalink, refused
from PIL import Image
from served import photo, save_adapters

from adalink import AdaptedModel
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.flat import read_flat, start_of
from adalink.lifecycle.route import read_router
from multimodal.data.images.decode import decode_image
from tasks.commands.lifecycle.route import example_rows
from tasks.runs.compose import adapters_on
from tasks.scenes.dataset import Scenes
from tasks.serve.server import served_model
from tasks.serve.settings import ServeSettings

ASKED = tuple("" if i % 2 else Scenes(split="train", size=60)[i].questions[i].text for i in range(4))
RIGHT = ("vqa", "cap", "vqa", "cap")
N = 60
FEW = ("--examples", N)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters in folders, and the config of a run for each task."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder)
    for task, recipe in RECIPES.items():
        config = yaml.safe_load(recipe.read_text())
        (folder / f"{task}.yaml").write_text(yaml.safe_dump({**config, "data": {"train": {"scenes": f"train/{N}"}, "val": {"scenes": "val/4"}}}))
    return folder


def command(adapters: Path, out: Path, *options: object, vqa: str = "vqa") -> Any:
    given = ("--adapter", f"cap={adapters / 'cap'}", f"vqa={adapters / vqa}")
    return adalink("route", *given, "--data", f"cap={adapters / 'captioning.yaml'}", f"vqa={adapters / 'vqa.yaml'}", "--out", out, *FEW, *options)


@pytest.fixture(scope="module")
def routed(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a router."""
    out = tmp_path_factory.mktemp("routed") / "out"
    done = command(adapters, out)
    assert done.code == 0, done.err
    assert f"cap: {N} examples; of those held out 100.0 % are routed right\n" in done.out
    assert "a router by gate over 2 adapters" in done.out
    return out


def test_prototypes_and_links_route_as_well(adapters: Path, tmp_path: Path) -> None:
    done = command(adapters, tmp_path / "out", "--by", "prototypes", "--centers", "2", "--unknown", "refuse", "--link", "true")
    assert done.code == 0, done.err
    saved = read_router(tmp_path / "out")
    assert saved.folders == {"cap": adapters / "cap", "vqa": adapters / "vqa"}
    assert (saved.router.gate, saved.router.settings.unknown, len(saved.router.centres)) == (None, "refuse", 4)
    model = served_model(ServeSettings(router=tmp_path / "out"), {})
    assert model.route([decode_image(photo(i)) for i in range(4)], ASKED) == list(RIGHT)


def test_examples_are_by_default_those_of_the_adapters_own_run(adapters: Path, tmp_path: Path) -> None:
    for task, name in (("captioning", "cap"), ("vqa", "vqa")):
        shutil.copytree(adapters / name, tmp_path / name / "adapter")
        shutil.copy(adapters / f"{task}.yaml", tmp_path / name / "config.yaml")
    done = adalink("route", "--adapter", f"cap={tmp_path / 'cap' / 'adapter'}", f"vqa={tmp_path / 'vqa' / 'adapter'}", "--out", tmp_path / "out", *FEW)
    assert done.code == 0, done.err
    assert f"vqa: {N} examples" in done.out


def test_questions_that_a_data_set_lacks_are_no_examples(adapters: Path) -> None:
    model = adapters_on({"cap": adapters / "cap"})
    samples = [Scenes(split="train", size=3)[i] for i in range(3)]
    assert len(example_rows(model, samples, "captioning", 9, 0)) == 3
    samples[1] = replace(samples[1], questions=())
    assert len(example_rows(model, samples, "vqa", 9, 0)) == 2
    assert len(example_rows(model, samples[1:2], "vqa", 9, 0)) == 0


def test_pruned_copies_hold_a_tenth_of_what_training_changed(adapters: Path, tmp_path: Path) -> None:
    done = command(adapters, tmp_path / "out", "--prune", "0.9")
    assert done.code == 0, done.err
    model = adapters_on({"cap": adapters / "cap"})
    whole, copy = read_flat(adapters / "cap"), read_flat(tmp_path / "out" / "members" / "cap")
    start = start_of(adapters / "cap", model.adapted)
    for name, part in whole.parts().items():
        change, left = ((flat.vector - start.vector)[part] for flat in (whole, copy))
        assert torch.equal(left != 0, change.abs() > change.abs().quantile(0.9)), name
        torch.testing.assert_close(left[left != 0], change[left != 0], atol=1e-7, rtol=0)
    assert AdaptedModel.read_config(tmp_path / "out" / "members" / "cap").derived["settings"] == {"prune": 0.9}
    served_model(ServeSettings(router=tmp_path / "out"), {})


def test_a_compressed_adapter_is_routed_to_as_any(adapters: Path, tmp_path: Path) -> None:
    assert adalink("compress", adapters / "vqa", "--out", tmp_path / "small").code == 0
    done = command(adapters, tmp_path / "out", vqa=str(tmp_path / "small"))
    assert done.code == 0, done.err
    model = served_model(ServeSettings(router=tmp_path / "out"), {})
    assert model.generate([decode_image(photo(0))], [ASKED[0]], adapter_names="auto") == model.generate([decode_image(photo(0))], [ASKED[0]], adapter_names=["vqa"])
    (tmp_path / "out" / "members" / "vqa" / "adapter_model.compressed").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="the adapter vqa in"):
        read_router(tmp_path / "out")


def test_rows_of_random_pixels_and_words_are_like_no_example(adapters: Path, tmp_path: Path) -> None:
    assert command(adapters, tmp_path / "out", "--link", "true").code == 0
    model, draw = served_model(ServeSettings(router=tmp_path / "out"), {}), Random(0)
    words = [word for word in model.language.tokenizer.get_vocab() if word.isalpha()]
    images = [Image.frombytes("RGB", (48, 48), draw.randbytes(48 * 48 * 3)) for _ in range(40)]
    questions = [" ".join(draw.choices(words, k=6)) for _ in images]
    assert model.route(images, questions).count("__base__") >= 38
    scenes = [Scenes(split="val", size=40)[i] for i in range(40)]
    known = model.route([decode_image(sample.image) for sample in scenes], [sample.questions[0].text for sample in scenes])  # type: ignore[arg-type]
    assert known.count("vqa") >= 38  # the control


def test_bad_input_is_one_sentence_and_writes_nothing(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    two = ("--adapter", f"cap={adapters / 'cap'}", f"vqa={adapters / 'vqa'}")
    assert "--adapter names 1 adapters, and a router chooses among two or more" in refused(adalink("route", *two[:2], "--out", out))
    assert "--adapter names 0 adapters" in refused(adalink("route", "--out", out))
    assert "--adapter is 'cap': expected NAME=DIR" in refused(adalink("route", "--adapter", "cap", "--out", out))
    assert "--data names other, and the adapters are cap, vqa" in refused(adalink("route", *two, "--data", "other=x.yaml", "--out", out))
    assert "the examples of cap are looked for in" in refused(adalink("route", *two, "--out", out))
    (tmp_path / "odd.yaml").write_text("task: captioning\n")
    assert "names no task with data.train" in refused(adalink("route", *two, "--data", f"cap={tmp_path / 'odd.yaml'}", "--out", out))
    assert "is no adapter folder" in refused(command(adapters, out, vqa=str(tmp_path)))
    assert "the nearest prototype has no weights" in refused(command(adapters, out, "--by", "prototypes", "--top", "2"))
    assert "--prune 0.9 with --link: give" in refused(command(adapters, out, "--prune", "0.9", "--link", "true"))
    assert "--prune 1: give" in refused(command(adapters, out, "--prune", "1"))
    assert "--examples is 1" in refused(command(adapters, out, "--examples", "1"))
    assert not out.exists()


def test_adapters_of_other_frozen_parts_are_refused(adapters: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters / "vqa", other)
    config = json.loads((other / "adalink_config.json").read_text())
    config["base"]["language_model"]["fingerprint"] = "0" * len(config["base"]["language_model"]["fingerprint"])
    config["base"]["language_model"]["sketches"] = {}
    (other / "adalink_config.json").write_text(json.dumps(config))
    sentence = refused(command(adapters, tmp_path / "out", vqa=str(other)))
    assert "was trained on the language model" in sentence
    assert not (tmp_path / "out").exists()


def test_a_server_refuses_a_router_that_is_none_or_whose_adapters_changed(routed: Path, tmp_path: Path) -> None:
    assert "is no router folder" in refused(adalink("serve", "--router", tmp_path))
    changed = tmp_path / "changed"
    shutil.copytree(routed, changed)
    (changed / "members" / "cap" / "adapter_model.safetensors").write_bytes((routed / "members" / "vqa" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"the adapter cap in .* is not the one that the router"):
        served_model(ServeSettings(router=changed), {})
    with pytest.raises(ConfigError, match="the adapter's name is 'cap'"):
        served_model(ServeSettings(router=routed), {"cap": routed / "members" / "cap"})
