"""`adalink slim`, `slice`, `probe` and `steer`: folders that load as any other, with what was lost; what is refused leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_run import adalink, refused
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adalink import AdaLink, AdaptedModel, Method
from adalink.lifecycle.base import SLIM_FILE, FactoredLinear
from adalink.methods.bridge import Bridge
from multimodal.language import load_language
from tasks.captioning import Captioning
from tasks.runs.compose import compose, load_adapted
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import part_folder

LANGUAGE = "scenes:language"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "captions.txt"
    source = Scenes(split="train", size=16)
    path.write_text("\n".join(caption for i in range(16) for caption in source[i].captions) + "\n")
    return path


@pytest.fixture(scope="module")
def slim(texts: Path) -> Path:
    out = texts.parent / "slim"
    done = adalink("slim", "--language_model", LANGUAGE, "--texts", texts, "--ratio", "3", "--steps", "60", "--out", out)
    assert done.code == 0, done.err
    assert "linears of low rank, by a ratio of 3" in done.out
    return out


def test_distillation_brings_a_slim_base_nearer_to_its_base_and_the_report_has_both(slim: Path) -> None:
    report = json.loads((slim / SLIM_FILE).read_text())["report"]
    assert list(report) == ["base", "slim", "distilled"]
    assert report["slim"]["parameters"] == report["distilled"]["parameters"] < report["base"]["parameters"]
    assert report["distilled"]["loss"] < report["slim"]["loss"]
    assert 0 == report["base"]["features"] < report["distilled"]["features"] < report["slim"]["features"]


def test_a_slim_base_loads_by_its_folder_and_refuses_adapters_of_its_base_by_both_names(slim: Path, tmp_path: Path) -> None:
    language = load_language(slim)
    assert sum(isinstance(module, FactoredLinear) for module in language.model.modules()) > 0
    assert not any(parameter.requires_grad for parameter in language.model.parameters())
    model = compose("scenes:encoder", LANGUAGE, template=Captioning().template)
    methods: dict[str, Method] = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=2, modalities=("text",))}
    model.add_adapter("default", methods)
    model.save_pretrained(tmp_path / "adapter", task={"task": "captioning"})
    with pytest.raises(Exception, match=f"was trained on the language model {LANGUAGE} .*but this one is {slim}"):
        load_adapted(tmp_path / "adapter", language_model=str(slim))
    own = compose("scenes:encoder", str(slim), template=Captioning().template)
    own.add_adapter("default", methods)
    own.save_pretrained(tmp_path / "own", task={"task": "captioning"})
    load_adapted(tmp_path / "own")
    sentence = refused(adalink("slim", "--language_model", slim, "--texts", tmp_path / "t.txt", "--out", tmp_path / "again"))
    assert "cannot be read" in sentence
    (tmp_path / "t.txt").write_text("a red circle\na blue square\n")
    assert "this base is slim already" in refused(adalink("slim", "--language_model", slim, "--texts", tmp_path / "t.txt", "--out", tmp_path / "again"))


def test_a_slice_is_a_plain_folder_of_transformers(texts: Path, tmp_path: Path) -> None:
    done = adalink("slice", "--language_model", LANGUAGE, "--texts", texts, "--shares", "[0.5]", "--out", tmp_path / "half")
    assert done.code == 0, done.err
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    whole = AutoModelForCausalLM.from_pretrained(part_folder("language"))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    assert "this model was not trained to be sliced so far" in done.out
    n = whole.config.num_hidden_layers
    shares = str([1.0] + [0.5] * (n - 1))
    sentence = refused(adalink("slice", "--language_model", LANGUAGE, "--texts", texts, "--shares", shares, "--out", tmp_path / "mixed"))
    assert "one number for all layers" in sentence
    assert not (tmp_path / "mixed").exists()


def test_a_steered_adapter_moves_texts_along_the_probe_and_comes_off(texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text().splitlines()
    for name, word in (("with", "red"), ("without", "")):
        chosen = [line for line in lines if ("red" in line) == bool(word)][:40]
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    probe = tmp_path / "probe.safetensors"
    done = adalink("probe", "--language_model", LANGUAGE, "--negative", tmp_path / "without.txt", "--positive", tmp_path / "with.txt", "--out", probe)
    assert done.code == 0, done.err
    out = tmp_path / "steered"
    done = adalink("steer", "--language_model", LANGUAGE, "--probe", probe, "--alpha", "3", "--rows", "16", "--domains", "[answer]", "--out", out)
    assert done.code == 0, done.err
    language = load_language(part_folder("language"))
    ids = torch.tensor([language.tokenizer(lines[0])["input_ids"]])
    before = language.model(input_ids=ids).logits
    adapted = AdaptedModel(language.model)
    adapted.load_adapter(out, "steer")
    assert not torch.allclose(adapted(input_ids=ids, labels=ids).logits, before, atol=1e-4)  # labels: all is answer
    adapted.delete_adapter("steer")
    assert torch.equal(language.model(input_ids=ids).logits, before)
    save_file({"probe": torch.ones(3)}, tmp_path / "other.safetensors")
    given = ("--alpha", "1", "--rows", "4", "--out", tmp_path / "no")
    assert "the probe has 3 numbers" in refused(adalink("steer", "--language_model", LANGUAGE, "--probe", tmp_path / "other.safetensors", *given))
    assert "is no probe that can be read" in refused(adalink("steer", "--language_model", LANGUAGE, "--probe", texts, *given))
    assert "is there already" in refused(
        adalink("probe", "--language_model", LANGUAGE, "--negative", texts, "--positive", texts, "--out", probe)
    )
