"""Rows of one batch with adapters of their own: other methods, slots and templates, and the frozen model between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import FAMILIES, compose, excite, language, tower
from PIL import Image

from adalink import BASE_NAME, TEXT, AdaLink, Bridge, LoRA, Method, Prompt
from adalink.errors import ConfigError
from multimodal.batches.collate import collate
from multimodal.encoders.tower import load_tower
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from tasks.scenes.parts import encoder_folder

LINEAR, MLP = Bridge(kind="linear"), Bridge(kind="mlp", hidden=8)
BOTH = AdaLink(rank=4, modalities=("image", "text"))
FIVE: dict[str, dict[str, Method]] = {
    "bridged": {"bridge": LINEAR},
    "linked": {"bridge": MLP, "adalink": BOTH},
    "prompted": {"bridge": LINEAR, "soft": Prompt(length=3, init_std=0.5)},
    "blind": {"soft": Prompt(length=5, init_std=0.5), "adalink": AdaLink(rank=2, modalities=("text",))},
    "deep": {"bridge": MLP, "lora": LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, alpha=4)},
}
NAMES = ["blind", "bridged", BASE_NAME, "deep", "prompted", BASE_NAME, "linked"]
QUESTIONS = ["is it red ?", "is it a big red ball ?", "is it ?", "", "is it a cube ?", "is it a big cube ?", "yes ?"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "grey"]
PICTURES = [Image.new("RGB", (50, 40), colour) for colour in COLOURS]


def served(family: str) -> VisionLanguageModel:
    model = compose(family)
    for seed, (name, methods) in enumerate(FIVE.items()):
        excite(model.add_adapter(name, methods).double(), seed)
    return model


@pytest.mark.parametrize(
    ("family", "beams"), [*((family, 4) for family in FAMILIES), ("opt", 1), *(pytest.param(family, 1, marks=pytest.mark.slow) for family in FAMILIES if family != "opt")]
)
def test_a_mixed_batch_says_what_its_rows_say_alone(family: str, beams: int) -> None:
    model, settings = served(family), GenerationSettings(max_new_tokens=7, num_beams=beams)
    mixed = model.generate(PICTURES, QUESTIONS, settings=settings, adapter_names=NAMES)
    alone = [
        model.generate([photo], [question], settings=settings, adapter_names=[name])[0]
        for photo, question, name in zip(PICTURES, QUESTIONS, NAMES, strict=True)
    ]
    assert mixed == alone
    assert len(set(mixed)) > 1
    assert model.generate(PICTURES, QUESTIONS, settings=settings, adapter_names=NAMES[1:] + NAMES[:1]) != mixed  # control


def test_the_frozen_model_answers_the_rows_that_name_none() -> None:
    model, settings = served("opt"), GenerationSettings(max_new_tokens=5)
    with model.disable_adapter():
        plain = model.generate(PICTURES, QUESTIONS, settings=settings)
    assert model.generate(PICTURES, QUESTIONS, settings=settings, adapter_names=[BASE_NAME] * 7) == plain
    assert model.generate(PICTURES, QUESTIONS, settings=settings, adapter_names=[None] * 7) == plain
    assert set(model.row_encoder(BASE_NAME).prompt("is it ?").domain) == {TEXT}


def test_no_pictures_give_no_texts_and_unknown_names_an_error_even_then() -> None:
    model = served("opt")
    assert model.generate([], []) == []
    assert model.generate([], [], adapter_names=[]) == []
    with pytest.raises(ConfigError, match=r"there is no adapter 'linkd': this model has bridged, linked, prompted, blind, deep \(and __base__ for none of them\)"):
        model.generate(PICTURES[:1], QUESTIONS[:1], adapter_names=["linkd"])
    with pytest.raises(ConfigError, match="2 adapter names were given for 1 rows"):
        model.generate(PICTURES[:1], QUESTIONS[:1], adapter_names=["linked", "deep"])
    with pytest.raises(ConfigError, match="there is no adapter 'linkd'"):
        model.row_encoder("linkd")


def test_each_row_is_worded_by_its_own_adapters_template(tmp_path: Path) -> None:
    templates = {"ask": Template(prompt="<image><bos>question: {question}"), "say": Template(prompt="<bos>a <image>", target="{text}")}
    for name, template in templates.items():
        one = compose("opt", template)
        excite(one.add_adapter(name, FIVE["bridged"]).double())
        one.save_pretrained(tmp_path / name, task={"task": name})
    model = compose("opt")
    for name in templates:
        model.load_adapter(tmp_path / name, name).double()
    assert {name: model.template_of(name) for name in templates} == templates
    assert model.template_of(BASE_NAME) == compose("opt").template
    assert len(model.row_encoder("say").prompt("is it ?").ids) == 2 + tower().n_patches
    texts = model.generate(PICTURES[:2], QUESTIONS[:2], adapter_names=["ask", "say"])
    assert texts == [model.generate([PICTURES[i]], [QUESTIONS[i]], adapter_names=[name])[0] for i, name in enumerate(templates)]
    model.save_pretrained(tmp_path / "again")  # the active one is "say": it keeps its own words and its task
    assert model.adapted.read_config(tmp_path / "again").task == {"task": "say", "prompt": "<bos>a <image>", "target": "{text}", "layer": -1}
    model.delete_adapter("say")
    assert (list(model.adapted.adapters), model.adapted.active) == (["ask"], None)


def test_an_adapter_of_another_layers_features_is_refused(tmp_path: Path) -> None:
    below = VisionLanguageModel(load_tower(encoder_folder(), layer=-2), language("opt"), Template(prompt="<image><bos>"))
    below.add_adapter("one", {"bridge": LINEAR})
    below.save_pretrained(tmp_path)
    model = compose("opt")
    with pytest.raises(ConfigError, match=r"reads the features of layer -2, and this model's encoder gives those of layer -1: compose the model with layer=-2"):
        model.load_adapter(tmp_path, "one")
    assert not model.adapted.adapters


def test_training_rows_of_several_adapters_give_each_the_gradients_of_its_own() -> None:
    model = served("opt")
    model.adapted.adapters.requires_grad_(True)  # those that are not active require none unless that is asked for
    names = ["linked", "deep", "linked"]
    rows = [model.row_encoder(name).row(Text("is it red ?", "a red cube")) for name in names]
    batch = collate(rows, range(3), torch.randn(3, tower().n_patches, tower().width).double(), kind="patches", side="right", pad_id=0)
    token_map = model.token_map(batch, names)
    with model.adapted.attachment.bind(token_map):
        logits = model.language.model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position).logits
    logits.square().sum().backward()
    has = {name: [p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapter.parameters()] for name, adapter in model.adapted.adapters.items()}
    assert all(has["linked"])
    assert any(has["deep"])
    assert not any(any(has[name]) for name in ("bridged", "prompted", "blind"))
