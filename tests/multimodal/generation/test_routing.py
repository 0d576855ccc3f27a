"""Rows whose adapter the model finds itself: what is read of a row, and texts that are those of the named adapter, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose, excite
from existing_families import made
from PIL import Image
from torch import nn

from adalink import BASE_NAME, AdaLink, Bridge, LoRA, Prompt
from adalink.errors import CheckpointError, ConfigError, DataError
from adalink.lifecycle.route import Router, RouteSettings, write_router
from multimodal.generation.routing import Routing, RowFeatures, encoded
from multimodal.generation.settings import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.template import Template

METHODS: dict[str, dict[str, Any]] = {
    "asks": {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "captions": {"bridge": Bridge(kind="mlp", hidden=8), "soft": Prompt(length=3, init_std=0.5), "lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=4)},
}
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "grey", "pink"]
PHOTOS = [Image.new("RGB", (50, 40), colour) for colour in COLOURS]
QUESTIONS = ["is it red ?", "", "is it a big red ball ?", "", "is it ?", "", "is it a cube ?", ""]
RIGHT = ["asks", "captions"] * 4


def model_of(family: str = "opt") -> VisionLanguageModel:
    model = compose(family)
    for seed, (name, methods) in enumerate(METHODS.items()):
        excite(model.add_adapter(name, methods).double(), seed)
        model.adapted.task = {"generation": {"max_new_tokens": 5 + 2 * seed}, **Template(prompt="<bos><image>" if seed else "<image><bos>{question}").saved()}
    return model


def features_of(model: VisionLanguageModel, photos: Sequence[Any], questions: Sequence[str]) -> torch.Tensor:
    pixels = torch.stack([model.tower.preprocess(photo) for photo in photos])
    return RowFeatures(model.language, model.tower).of(encoded(model, pixels), range(len(photos)), questions)


def routed_model(family: str = "opt", **settings: Any) -> VisionLanguageModel:
    model = model_of(family)
    words = ["red", "ball", "cube", "big", "yes", "is it blue ?", "is it a red cube ?", "is it a ball ?"]
    rows = {"asks": features_of(model, PHOTOS, words), "captions": features_of(model, PHOTOS, [""] * 8)}
    model.routing = Routing(Router.fit(rows, RouteSettings(**settings)), RowFeatures(model.language, model.tower))
    return model


# ----------------------------------------
# What is read of a row.


def test_a_rows_features_are_its_patches_and_its_questions_words_alone() -> None:
    model = model_of()
    row, blank = features_of(model, PHOTOS[:2], ["is it red ?", ""])
    patches = model.encode(torch.stack([model.tower.preprocess(photo) for photo in PHOTOS[:2]]))[:, : model.vision_tower.n_patches].double()
    unit = nn.functional.normalize(nn.functional.layer_norm(patches, patches.shape[2:]).mean(1), dim=-1)
    table = model.language.model.get_input_embeddings().weight
    words = table[model.language.tokenizer("is it red ?", add_special_tokens=False)["input_ids"]].double().mean(0)
    n = unit.shape[1]
    torch.testing.assert_close(row, torch.cat([unit[0], nn.functional.normalize(words, dim=0), torch.zeros(1)]).double() / 2**0.5, atol=1e-12, rtol=0)
    torch.testing.assert_close(blank[:n], unit[1] / 2**0.5, atol=1e-12, rtol=0)
    assert blank[n:-1].abs().max() == 0
    assert float(blank[-1]) == pytest.approx(2**-0.5)


def test_features_and_routes_of_a_row_are_the_same_bits_in_any_company() -> None:
    model = routed_model()
    routing = model.routing
    assert routing is not None
    images = encoded(model, torch.stack([model.tower.preprocess(photo) for photo in PHOTOS]))
    together = routing.features.of(images, range(8), QUESTIONS)
    for i in range(8):
        (alone,) = routing.features.of(images[i : i + 1], [0], QUESTIONS[i : i + 1])
        assert torch.equal(alone, together[i])
        route, other = routing.router.route(alone), routing.routes(images, [7, i, 0], [QUESTIONS[0], QUESTIONS[i], "?"])[1]
        assert (route, route.weights, route.cosine, route.margin) == (other, other.weights, other.cosine, other.margin)


@pytest.mark.parametrize("by", ["gate", "prototypes"])
def test_the_question_tells_tasks_apart_that_see_the_same_images(by: str) -> None:
    """The control: a router that reads the image half alone says the same of both tasks, so half of its answers are right at best."""
    model = routed_model(by=by)
    assert model.route(PHOTOS, QUESTIONS) == RIGHT
    seen = features_of(model, PHOTOS, [""] * 8)
    blind = Router.fit({"asks": seen, "captions": seen}, RouteSettings(by=by))  # type: ignore[arg-type]
    assert sum(blind.route(row) == name for row in seen for name in METHODS) <= len(seen)


# ----------------------------------------
# Texts.


@pytest.mark.parametrize("family", ["opt", pytest.param("llama", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)])
def test_a_routed_batch_says_what_the_named_one_does_and_each_row_what_it_says_alone(family: str) -> None:
    model, settings = routed_model(family), GenerationSettings(max_new_tokens=6)
    auto = model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names="auto")
    assert auto == model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=RIGHT)
    assert auto == [model.generate([photo], [question], settings=settings, adapter_names=["auto"])[0] for photo, question in zip(PHOTOS, QUESTIONS, strict=True)]
    assert auto == model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=model.route(PHOTOS, QUESTIONS))
    mixed = ["auto", BASE_NAME, "captions", "auto", None, "auto", "auto", "asks"]
    named = [right if name == "auto" else name for name, right in zip(mixed, RIGHT, strict=True)]
    assert model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=mixed) == model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=named)
    assert auto != model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=RIGHT[::-1])  # the control


def test_logits_of_a_routed_batch_are_those_of_the_named_one_bit_for_bit() -> None:
    model, settings = routed_model(), GenerationSettings(max_new_tokens=4)
    seen: list[torch.Tensor] = []
    handle = model.language.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names="auto")
    n = len(seen)
    model.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names=RIGHT)
    handle.remove()
    assert len(seen) == 2 * n
    assert all(torch.equal(a, b) for a, b in zip(seen[:n], seen[n:], strict=True))


def test_each_routed_row_is_generated_as_its_own_adapter_was_saved() -> None:
    model = routed_model()
    auto = model.generate(PHOTOS, QUESTIONS, adapter_names="auto")
    for name, start in (("asks", 0), ("captions", 1)):
        assert auto[start::2] == model.generate(PHOTOS[start::2], QUESTIONS[start::2], adapter_names=[name] * 4)
    with pytest.raises(ConfigError, match="were saved with different generation settings"):
        model.generate(PHOTOS, QUESTIONS, adapter_names=RIGHT)


@pytest.mark.parametrize("unknown", ["base", "refuse"])
def test_a_row_like_no_example_is_served_by_the_frozen_model_or_refused(unknown: str) -> None:
    model, settings = routed_model(unknown=unknown), GenerationSettings(max_new_tokens=4)
    strange = "cube cube cube ball ball yes yes yes"
    assert model.routing is not None
    high = model.routing.router.floors + 10  # nothing is as near as that
    model.routing = Routing(Router(**{**vars(model.routing.router), "floors": high}), model.routing.features)
    (route,) = model.route(PHOTOS[:1], [strange])
    assert (route, route.weights) == (BASE_NAME, {})
    if unknown == "base":
        assert model.generate(PHOTOS[:1], [strange], settings=settings, adapter_names="auto") == model.generate(
            PHOTOS[:1], [strange], settings=settings, adapter_names=[BASE_NAME]
        )
        return
    with pytest.raises(DataError, match=r"row 0 is like none of the examples of asks, captions \(the nearest has a cosine of 0\.\d+\): name an adapter for it, or"):
        model.generate(PHOTOS[:1], [strange], settings=settings, adapter_names="auto")


def test_rows_of_a_model_that_sees_already_are_routed_by_their_last_turn() -> None:
    model = VisionLanguageModel.from_model(*made("qwen2_vl"), template=Template(prompt="<image>{question}"))
    for name in ("asks", "captions"):
        excite(model.add_adapter(name, LoRA(groups={"all": ("all",)}, rank=2, alpha=4)).double())
    photos = [Image.new("RGB", (40, 40), colour) for colour in COLOURS[:4]]
    images, about = encoded_rows(model, photos)
    features = RowFeatures(model.language, model.tower)
    words = [word for word in ("is it red?", "how many circles?", "what color is it?", "red?") for _ in about]
    rows = {"asks": features.of(images, about * 4, words), "captions": features.of(images, about, [""] * 4)}
    model.routing = Routing(Router.fit(rows, RouteSettings()), features)
    talk = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "is it red?"}]
    assert model.route(photos[:2], ["", talk]) == ["captions", "asks"]
    settings = GenerationSettings(max_new_tokens=4)
    auto = model.generate(photos, ["", "how many circles?", "", "red?"], settings=settings, adapter_names="auto")
    assert auto == model.generate(photos, ["", "how many circles?", "", "red?"], settings=settings, adapter_names=RIGHT[1:5])


def encoded_rows(model: VisionLanguageModel, photos: Sequence[Any]) -> tuple[Any, list[int]]:
    from multimodal.batches.collate import stacked

    return encoded(model, stacked([model.tower.preprocess(photo) for photo in photos])), list(range(len(photos)))


def soft_model(top: int = 0) -> VisionLanguageModel:
    """Two adapters with the same words, a router that mixes them, and images that each has in part."""
    model = compose("opt")
    for seed, name in enumerate(("left", "right")):
        excite(model.add_adapter(name, METHODS["asks"]).double(), seed)
    rows = {"left": features_of(model, PHOTOS[:6], [""] * 6), "right": features_of(model, PHOTOS[2:], [""] * 6)}
    model.routing = Routing(Router.fit(rows, RouteSettings(top=top)), RowFeatures(model.language, model.tower))
    model.adapted.add_mixture(["left", "right"])
    return model


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_adapters_serve_together_are_in_a_batch_what_they_are_alone(beams: int) -> None:
    model, settings = soft_model(), GenerationSettings(max_new_tokens=8, num_beams=beams)
    routes = model.route(PHOTOS, "")
    assert {str(route) for route in routes} == {"auto"}
    assert all(0 < route.weights["left"] < 1 and sum(route.weights.values()) == pytest.approx(1) for route in routes)
    auto = model.generate(PHOTOS, "", settings=settings, adapter_names="auto")
    names = ["auto", "left", "auto", BASE_NAME, "auto", "auto", "right", "auto"]
    mixed = model.generate(PHOTOS, "", settings=settings, adapter_names=names)
    for i in range(8):
        (alone,) = model.generate([PHOTOS[i]], "", settings=settings, adapter_names=["auto"])
        assert auto[i] == alone
        assert (mixed[i] == alone) or names[i] != "auto"
    assert auto != model.generate(PHOTOS, "", settings=settings, adapter_names=["left"] * 8)  # the control


def test_adapters_with_other_words_are_not_mixed(tmp_path: Path) -> None:
    folder = written(routed_model(top=0), tmp_path)
    model = compose("opt")
    with pytest.raises(ConfigError, match="the adapters asks and captions were trained with other templates or generation settings"):
        model.load_router(folder)
    assert (model.adapter_names, model.routing) == ([], None)


# ----------------------------------------
# The folder, and what is refused.


def written(model: VisionLanguageModel, folder: Path) -> Path:
    assert model.routing is not None
    folders = {}
    for name in METHODS:
        model.set_adapter(name)
        model.save_pretrained(folder / "members" / name)
        folders[name] = folder / "members" / name
    write_router(folder, model.routing.router, folders)
    return folder


def test_a_folder_brings_its_adapters_and_routes_as_before(tmp_path: Path) -> None:
    before, after = routed_model(), compose("opt")
    settings = GenerationSettings(max_new_tokens=5)
    texts = before.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names="auto")
    after.load_router(written(before, tmp_path))
    after.adapted.double()
    assert after.adapter_names == ["asks", "captions"]
    assert after.active_adapters == []
    assert after.generate(PHOTOS, QUESTIONS, settings=settings, adapter_names="auto") == texts


def test_a_router_that_cannot_be_used_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder = written(routed_model(), tmp_path)
    other = compose("llama")
    with pytest.raises(CheckpointError, match="was trained on the language model"):
        other.load_router(folder)
    assert (other.adapter_names, other.routing) == ([], None)
    named = compose("opt")
    named.add_adapter("captions", METHODS["asks"])
    with pytest.raises(ConfigError, match="the adapter's name is 'captions'"):
        named.load_router(folder)
    assert (named.adapter_names, named.routing) == (["captions"], None)
    (folder / "members" / "asks" / "adalink_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the adapter asks in .* is not the one that the router in"):
        compose("opt").load_router(folder)


def test_auto_needs_a_router_and_is_no_adapters_name() -> None:
    model = compose("opt")
    with pytest.raises(ConfigError, match="a row names 'auto', and this model has no router that would choose: load one with load_router"):
        model.generate(PHOTOS[:1], [""], adapter_names="auto")
    with pytest.raises(ConfigError, match="the adapter's name is 'auto'"):
        model.add_adapter("auto", METHODS["asks"])
    assert routed_model().generate([], [], adapter_names="auto") == []
