"""How many tokens an image may cost: larger images are scaled down, smaller ones up, and the bounds go with the adapter."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_families import MADE
from PIL import Image

from adalink import AdaLink, FrozenPart
from adalink.errors import ConfigError, DataError
from multimodal.batches.prepared import Prepared
from multimodal.existing.budget import ImageTokens
from multimodal.existing.words import Processor
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from tasks.runs.config import Parts

TEMPLATE = Template(prompt="<image>{question}")
PANORAMA, SMALL = Image.linear_gradient("L").resize((300, 16)).convert("RGB"), Image.new("RGB", (9, 8), "red")


@cache
def made(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = MADE[name]()
    return model.eval(), processor


def new(name: str, **bounds: int) -> VisionLanguageModel:
    return VisionLanguageModel.from_model(*made(name), template=TEMPLATE, image_tokens=ImageTokens(**bounds))


def prepared(model: VisionLanguageModel, image: Image.Image) -> Prepared:
    found = model.tower.preprocess(image)
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize(("name", "most"), [("qwen2_vl", 7), ("pixtral", 5), ("qwen3_vl", 12)])
def test_a_panorama_is_scaled_until_it_fits(name: str, most: int) -> None:
    model = new(name, max=most)
    assert prepared(new(name), PANORAMA).n_vectors > most  # the control
    assert most // 2 <= prepared(model, PANORAMA).n_vectors <= most
    row = model.row_encoder().row(Text("how many?", "two"), prepared(model, PANORAMA))
    assert sum(one >= 0 for one in row.vector) == prepared(model, PANORAMA).n_vectors
    assert prepared(model, SMALL).wording == prepared(new(name), SMALL).wording  # one that fits is as it was
    assert len(model.generate([PANORAMA, SMALL], ["how many?"] * 2, max_new_tokens=2)) == 2


def test_a_small_image_is_scaled_up() -> None:
    assert prepared(new("qwen2_vl"), SMALL).n_vectors < 6
    assert 6 <= prepared(new("qwen2_vl", min=6, max=12), SMALL).n_vectors <= 12


def test_between_bounds_that_no_scale_keeps_an_image_has_fewer_tokens() -> None:
    """A square of three rows and columns of tokens becomes one of two."""
    processor = new("qwen2_vl").tower.processor  # type: ignore[union-attr]
    narrow = Processor(processor.real, list(processor.image_ids), processor.inputs, ImageTokens(min=7, max=7))
    assert narrow.prepare([Image.new("RGB", (24, 24))]).n_vectors == 4


@pytest.mark.parametrize(
    ("name", "bounds", "words", "count"),
    [("llava", {"max": 8}, "at most 8 tokens", 16), ("llava", {"min": 20}, "at least 20 tokens", 16), ("qwen2_vl", {"min": 90, "max": 99}, "at least 90 and at most 99 tokens", 15)],
)  # fmt: skip
def test_bounds_that_a_processor_cannot_keep_are_refused_at_once(name: str, bounds: dict[str, int], words: str, count: int) -> None:
    sentence = f"image_tokens allows {words}, and the processor of '.*' makes {count} of a test image at the nearest scale: give bounds that hold {count}, or none"
    with pytest.raises(ConfigError, match=sentence):
        new(name, **bounds)
    assert new("llava", min=16, max=16).tower.example.n_vectors == 16  # type: ignore[union-attr]


def test_an_image_that_no_scale_brings_there_is_a_bad_one() -> None:
    processor = new("llava").tower.processor  # type: ignore[union-attr]
    with pytest.raises(DataError, match="an image of 300 x 16 has 16 tokens at any scale, and image_tokens allows 8"):
        Processor(processor.real, list(processor.image_ids), processor.inputs, ImageTokens(max=8)).prepare([PANORAMA])


def test_they_are_saved_with_the_adapter_and_used_again(tmp_path: Path) -> None:
    model = new("qwen2_vl", max=7)
    model.add_adapter("one", {"adalink": AdaLink(rank=2, modalities=("image",))})
    model.save_pretrained(tmp_path / "adapter")
    model.adapted.unload()
    made("qwen2_vl")[0].save_pretrained(tmp_path / "model")
    made("qwen2_vl")[1].save_pretrained(tmp_path / "model")
    again = VisionLanguageModel.from_pretrained(tmp_path / "adapter", language_model=tmp_path / "model")
    assert prepared(again, PANORAMA).n_vectors <= 7
    assert again.tower.processor.settings()["image_tokens"] == '{"max": 7}'  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="was trained on images of at most 7 tokens, and here an image has as many tokens as its processor makes: load it on a"):
        new("qwen2_vl").load_adapter(tmp_path / "adapter", "one")


def test_bounds_that_say_nothing_sensible_are_refused() -> None:
    for bounds, sentence in (
        ({"max": 0}, "image_tokens.max is 0: give 1 or more"),
        ({"min": 9, "max": 8}, "image_tokens.min is 9 and image_tokens.max is 8: give a min that is not above max"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            ImageTokens(**bounds)
    with pytest.raises(ConfigError, match="image_tokens was given without model: an encoder of its own makes as many vectors of every image; leave it out"):
        Parts(encoder="one", language_model="two", image_tokens=ImageTokens(max=9)).check()
    known = Parts.of({"language_model": FrozenPart("one", "")}, {"image_tokens": {"max": 9}})
    assert Parts().over(known).image_tokens == ImageTokens(max=9)
    assert Parts(image_tokens=ImageTokens(max=5)).over(known).image_tokens == ImageTokens(max=5)
