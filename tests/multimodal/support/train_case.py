"""Short trainings of small composed models, stopped where a test says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composed import Drawn, compose, excite, two_texts
from torch import Tensor

from adalink import AdaLink, Bridge, Method, Prompt
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import Trained, train

METHODS: dict[str, Method] = {
    "bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"), bias=True), "prompt": Prompt(length=2, init_std=0.1),
}  # fmt: skip
SETTINGS = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "warmup": 0.0, "learning_rate": 1e-2}


def model_of(family: str = "opt") -> VisionLanguageModel:
    model = compose(family)
    torch.manual_seed(5)
    excite(model.add_adapter("one", METHODS).double())
    return model


def trained(
    folder: Path, source: Any = None, texts: Callable[[Sample, random.Random], list[Text]] = two_texts, family: str = "opt", **fields: Any
) -> tuple[VisionLanguageModel, Trained]:
    folder.mkdir(exist_ok=True, parents=True)
    model = model_of(family)
    options = {name: fields.pop(name) for name in ("resume", "measure", "judged_by", "known_bad", "also_trained") if name in fields}
    return model, train(model, source or Drawn(8), texts, TrainSettings(**{**SETTINGS, **fields}), folder, **options)


def weights(model: VisionLanguageModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.adapted.active_adapter().named_parameters()}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def close(first: VisionLanguageModel, second: VisionLanguageModel, tolerance: float) -> bool:
    return all(torch.allclose(value, weights(second)[name], rtol=tolerance, atol=tolerance) for name, value in weights(first).items())


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[], dict[str, float]]:
    calls = iter(range(1, 100))

    def measure() -> dict[str, float]:
        if next(calls) == step:
            raise Stop
        return {"figure": 1.0}

    return measure
