"""Cached vectors of models that see already: each image has a number of its own, and its words and grid stand beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_families import MADE
from feature_case import same_images
from PIL import Image
from torch import Tensor

from adalink import AdaLink
from adalink.errors import ConfigError
from multimodal.data.feature_cache.encode import encode_all, opened_writer, write_features
from multimodal.data.feature_cache.format import all_contents
from multimodal.data.feature_cache.reader import FeatureCache, matching_features
from multimodal.data.inputs import CachedFeatures
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample, Sample
from multimodal.template import Template, Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

N, BAD = 7, 2
SIZES = ((40, 30), (70, 24), (8, 8), (24, 60), (16, 16), (50, 50), (30, 44))
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 3, "log_every": 1, "checkpoint_every": 1, "warmup": 0.0, "learning_rate": 1e-2}


class Unlike:
    """Images of unlike sizes, of which one is none."""

    def __init__(self, n: int = N, shade: int = 0) -> None:
        self.n, self.shade = n, shade

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        image = Image.linear_gradient("L").rotate(90 * index).resize(SIZES[index]).point(lambda value: value // 2 + self.shade).convert("RGB")
        return Sample(key=str(index), image_id=index, image=b"no image" if index == BAD else image)


@cache
def model_of(name: str = "qwen3_vl") -> VisionLanguageModel:
    """In float32, with an adapter that a test may train."""
    torch.manual_seed(0)
    model, processor = MADE[name]()
    return VisionLanguageModel.from_model(model.eval(), processor, template=Template(prompt="<image>{question}"))


def fresh() -> VisionLanguageModel:
    model = model_of()
    if model.adapter_names:
        model.delete_adapter("one")
    torch.manual_seed(5)
    adapter = model.add_adapter("one", {"adalink": AdaLink(rank=4, modalities=("image", "text"))})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def texts(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text("what color is the square?", "red"), Text("how many?", rng.choice(["two of them", "none"]))]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_what_is_kept_is_what_the_tower_says(name: str, tmp_path: Path) -> None:
    """Qwen3-VL has deep features beside each vector, and a grid for each image; LLaVA has neither."""
    model, source = model_of(name), Unlike()
    contents = all_contents(model.tower, "float32")
    kept, known = write_features(model.tower, source, tmp_path / "kept", contents, budget=1), encode_all(model, source, dtype="float32")
    assert kept.shape == known.shape == ((1, 96) if name == "qwen3_vl" else (1, 32))
    assert kept.usable() == known.usable() == [0, 1, 3, 4, 5, 6]
    assert isinstance(kept[BAD], BadSample)
    assert all(same_images(kept[i], known[i]) for i in kept.usable())
    assert len({kept[i].n_vectors for i in kept.usable()}) == (5 if name == "qwen3_vl" else 1)
    assert all(same_images(matching_features(tmp_path / "kept", model.tower, source, contents)[i], known[i]) for i in kept.usable())


def weights(folder: Path, given: Path | CachedFeatures | None, *, resume: bool = False, killed_at: int = 0, **fields: Any) -> dict[str, Tensor]:
    model, source, calls = fresh(), Unlike(), iter(range(1, 100))

    def measure() -> dict[str, float]:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return {}

    how = "fill" if isinstance(given, Path) else "encode"
    settings = TrainSettings(**{**SETTINGS, "measure_every": int(killed_at > 0), "features": how, **fields})
    with opened_writer(model.tower, source, given, all_contents(model.tower)) if isinstance(given, Path) else nullcontext(given) as features:
        train(model, source, texts, settings, folder, resume=resume, patches=features, measure=measure)
    return {name: value.detach().clone() for name, value in model.adapted.active_adapter().named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_filling_trains_what_vectors_written_before_train_also_when_it_was_killed(tmp_path: Path) -> None:
    model = model_of()
    before = write_features(model.tower, Unlike(), tmp_path / "before", all_contents(model.tower), budget=1)
    expected = weights(tmp_path / "read", before)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed", tmp_path / "resumed", killed_at=2)
    assert equal(weights(tmp_path / "killed", tmp_path / "resumed", resume=True), expected)
    assert all(same_images(FeatureCache.open(tmp_path / "resumed")[i], before[i]) for i in before.usable())
    assert not equal(weights(tmp_path / "other", before, steps=1), expected)  # the control


def _dimmed(model: VisionLanguageModel) -> None:
    next(iter(model.tower.language.model.get_input_embeddings().parameters())).data += 0.1  # type: ignore[union-attr]


def _sized(model: VisionLanguageModel) -> None:
    model.tower.processor.real.image_processor.size["longest_edge"] = 640  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_dimmed, r"are of the model \w+ \(\w+\), and here it is \w+ \(\w+\): give another folder"),
        (_sized, r'are of a processor whose image_processor.size is \{"longest_edge": 1280.*\}, and here it is \{"longest_edge": 640'),
    ],
)
def test_vectors_of_another_model_or_processor_are_refused(change: Callable[[VisionLanguageModel], None], sentence: str, tmp_path: Path) -> None:
    model_of.cache_clear()
    model = model_of()
    contents = all_contents(model.tower)
    write_features(model.tower, Unlike(2), tmp_path / "kept", contents)
    with pytest.raises(ConfigError, match="are of the data set"):
        matching_features(tmp_path / "kept", model.tower, Unlike(2, shade=9), contents)
    change(model)
    with pytest.raises(ConfigError, match=sentence):
        matching_features(tmp_path / "kept", model.tower, Unlike(2), contents)
    model_of.cache_clear()


def test_an_adapter_in_the_language_model_changes_no_vector(tmp_path: Path) -> None:
    model = model_of()
    contents = all_contents(model.tower)
    write_features(model.tower, Unlike(2), tmp_path / "kept", contents)
    assert len(matching_features(tmp_path / "kept", fresh().tower, Unlike(2), contents)) == 2
