"""A model generates without dropout, whatever it was doing before, and trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import Drawn, compose, excite, patches, two_texts

from adalink import Bridge
from multimodal.batches.collate import collate
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

DROPPED = {"bridge": Bridge(kind="linear", dropout=0.5, feature_dropout=0.5)}
QUESTIONS = ["is it red ?", "is it a big red ball ?", "is it ?"]


def model_of() -> VisionLanguageModel:
    model = compose("opt")
    excite(model.add_adapter("one", DROPPED).double())
    return model


def stated(model: VisionLanguageModel, beams: int) -> list[str]:
    rows = [model.row_encoder().prompt(question) for question in QUESTIONS]
    batch = collate(rows, range(3), patches(3), kind="patches", side="left", pad_id=0)
    return model.generate_batch(batch, GenerationSettings(max_new_tokens=8, num_beams=beams))


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_eval_mode_and_the_mode_stays(beams: int) -> None:
    model = model_of()
    drawn = [stated(model, beams) for _ in range(3)]
    assert model.adapted.active_adapter().training
    model.eval()
    assert drawn == [stated(model, beams)] * 3
    assert not model.adapted.active_adapter().training


def test_answers_are_chosen_without_dropout() -> None:
    model = model_of()
    model.add_answer_head([f"answer {i}" for i in range(50)]).double()
    assert stated(model, 1) == stated(model, 1) == stated(model, 1)


def test_a_loaded_adapter_is_still_until_it_is_trained(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "adapter")
    loaded = compose("opt")
    adapter = loaded.load_adapter(tmp_path / "adapter", "again")
    assert not any(module.training for module in adapter.modules())
    settings = TrainSettings(steps=1, batch_size=2)
    train(loaded, Drawn(4), two_texts, settings, tmp_path / "run")
    assert all(module.training for module in adapter.modules())
    torch.manual_seed(0)
    assert stated(loaded, 1) == stated(loaded, 1)
