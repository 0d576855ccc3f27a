"""A frozen model that a device map spreads over memory and disk trains and writes as one that lies in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composed import excite
from tiny_llava import save_llava
from train_case import weights

from adalink import AdaLink, BaseSettings, Bridge, LoRA, Precision
from adalink.errors import ConfigError
from multimodal.loading import is_spread, on_device
from multimodal.model import VisionLanguageModel
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.captioning import Captioning
from tasks.runs.compose import compose, frozen_model
from tasks.runs.config import Parts
from tasks.scenes.dataset import Scenes

METHODS = {
    "bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=2, modalities=("image", "text")), "lora": LoRA(groups={"image": ("image",)}, rank=2, alpha=4),
}  # fmt: skip


def trained(folder: Path, base: BaseSettings) -> tuple[VisionLanguageModel, list[str]]:
    """After two steps on four scenes, and what it then writes about another."""
    torch.manual_seed(0)
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template, base=base)
    model.add_adapter("one", METHODS)
    train(model, Scenes(split="train", size=4), Captioning().texts, TrainSettings(steps=2, batch_size=2, learning_rate=1e-2), folder)
    return model, model.eval().generate(Scenes(split="val", size=1)[0].image)


def places(model: VisionLanguageModel) -> set[str]:
    return {parameter.device.type for parameter in model.language.model.parameters()}


@pytest.mark.parametrize("memory", ["1KB", "3MB"])
def test_weights_that_lie_on_disk_learn_and_write_the_same(memory: str, tmp_path: Path) -> None:
    model, text = trained(tmp_path / "whole", BaseSettings())
    spread, spread_text = trained(tmp_path / "spread", BaseSettings(device_map="auto", max_memory={"cpu": memory}, offload_folder=str(tmp_path / "disk")))
    assert places(model) == {"cpu"}
    assert places(spread) == ({"meta"} if memory == "1KB" else {"cpu", "meta"})
    assert (tmp_path / "disk").is_dir()
    assert spread_text == text
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(spread)[name], value, rtol=0, atol=1e-4)
    assert spread.adapted.parts["language_model"].fingerprint == model.adapted.parts["language_model"].fingerprint
    spread.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "from_the_other")


def test_a_model_that_sees_already_writes_the_same_from_disk(tmp_path: Path) -> None:
    save_llava(tmp_path / "model", std=0.5)
    image, texts = Scenes(split="val", size=1)[0].image, []
    for base in (BaseSettings(), BaseSettings(device_map="auto", max_memory={"cpu": "1KB"}, offload_folder=str(tmp_path / "disk"))):
        model = frozen_model(Parts(model=str(tmp_path / "model"), base=base), template=Captioning().template)
        torch.manual_seed(0)
        adapter = model.add_adapter("one", {"adalink": AdaLink(rank=2, modalities=("image", "text"))})
        excite(adapter)
        texts.append(model.eval().generate(image))
        assert places(model) == ({"meta"} if base else {"cpu"})
    assert texts[0] == texts[1]


def test_what_is_spread_stays_where_it_is(tmp_path: Path) -> None:
    base = BaseSettings(device_map="auto", max_memory={"cpu": "1KB"}, offload_folder=str(tmp_path))
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template, base=base)
    assert is_spread(model)
    assert not is_spread(model.tower)
    with pytest.raises(NotImplementedError, match="meta"):  # control
        model.to("cpu")
    on_device(model, torch.device("meta"))  # stands for a GPU
    assert {parameter.device.type for parameter in model.tower.parameters()} == {"meta"}


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"device_map": "all"}, r"base\.device_map is 'all': give one of none, auto, balanced, balanced_low_0, sequential"),
    ({"max_memory": {"cpu": "1GiB"}}, r"base\.max_memory bounds what a device holds of a model that is spread, and base\.device_map is none: give"),
    ({"device_map": "auto", "language_model": Precision(quantise="nf4")}, r"base\.device_map places weights as the checkpoint has them, and base casts or"),
    ({"device_map": "auto", "language_model": Precision(dtype="bfloat16")}, r"leave dtype and quantise out, or give a checkpoint that is stored so"),
]


@pytest.mark.parametrize(("fields", "message"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BaseSettings(**fields)
