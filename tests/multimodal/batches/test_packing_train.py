"""Training picks the way that texts share their image, and says so; half precision and compiled models learn the same from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from composed import Drawn, compose, two_texts
from sharing import adapted, batch_of, gradients, graphs_of, slots_of
from torch import Tensor

from adalink import AdaLink, Bridge, LoRA
from multimodal.batches.packing import arrangement_of, fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import trained_domains
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train
from tasks.scenes.parts import encoder_folder

BRIDGED = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("text",))}


def test_training_tells_how_texts_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compose("opt", Template(prompt="<image><bos>question: {question} answer:"))
    adapter = model.add_adapter("one", BRIDGED).double()
    adapter.get_submodule("bridge").requires_grad_(False)
    _, note = arrangement_of(model, "whole")
    train(model, Drawn(4), two_texts, TrainSettings(steps=2, batch_size=2), tmp_path)
    assert note in capsys.readouterr().out
    assert note.startswith("nothing trained reads or writes the first")


def test_pictures_of_a_trained_encoder_and_trained_language_models_are_read_with_gradient() -> None:
    model = compose("opt", Template(prompt="<image><bos>question: {question} answer:"))
    adapter = model.add_adapter("one", BRIDGED).double()
    adapter.get_submodule("bridge").requires_grad_(False)
    assert arrangement_of(model)[0] != pack_rows  # the control
    model.language.model.requires_grad_(True)
    assert arrangement_of(model)[0] == pack_rows
    model.language.model.requires_grad_(False)
    seen = VisionLanguageModel(load_tower(encoder_folder()), model.language, model.template)  # a tower of its own: others share theirs
    seen.add_adapter("two", BRIDGED).double().get_submodule("bridge").requires_grad_(False)
    seen.add_vision_adapter({"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2.0)})
    assert arrangement_of(seen)[0] == pack_rows


def test_training_leaves_texts_apart_where_a_trial_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose("opt", Template(prompt="<image><bos>question: {question} answer:"))
    adapter = model.add_adapter("one", BRIDGED).double()
    assert arrangement_of(model)[0] is pack_rows  # no trial is needed
    adapter.get_submodule("bridge").requires_grad_(False)
    monkeypatch.setattr("multimodal.batches.packing.forks_exactly", lambda adapted: False)
    arrange, note = arrangement_of(model)
    assert arrange is separate_rows
    assert note == "one row per text: opt was tried with a cache of what texts share, and reads them otherwise after it"


@pytest.mark.parametrize("name", ["llama", "gemma2", "mpt"])
def test_half_precision_is_as_near_in_every_way(name: str) -> None:
    """Under autocast to bfloat16, of a model in float32, as training runs on a GPU."""
    model = adapted(name)
    model.float()
    ways = (fork_rows,) if name == "mpt" else (pack_rows, fork_rows)
    exact = gradients(model, batch_of(separate_rows, slots_of(model)))
    with torch.autocast("cpu", torch.bfloat16):
        apart = gradients(model, batch_of(separate_rows, slots_of(model)))
        shared = [gradients(model, batch_of(arrange, slots_of(model))) for arrange in ways]
    allowed = 3 * far(apart, exact)
    assert 0 < allowed < 0.3
    assert all(far(found, exact) < allowed for found in shared)


def far(found: list[Tensor], exact: list[Tensor]) -> float:
    """How far gradients are from the exact ones, as a share of these."""
    one, other = (torch.cat([gradient.flatten().float() for gradient in gradients[1:]]) for gradients in (found, exact))
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text_only"), [("llama", False), ("llama", True), ("mpt", False)])
def test_compiled_calls_after_a_beginning_are_the_same(name: str, text_only: bool) -> None:
    """Two graphs for each of the two calls, one for the first length and one for any other, and one for images with other numbers of texts."""
    model = adapted(name, BRIDGED)
    model.active_adapter().get_submodule("bridge").requires_grad_(not text_only)
    arrange = partial(pack_rows, trained=trained_domains(model.active_adapter())) if text_only else fork_rows
    batches = [batch_of(arrange, texts=texts) for texts in ([(2, [5, 7])], [(2, [9, 3, 4]), (3, [4, 2])], [(3, [5, 7]), (4, [2, 3])])]
    assert graphs_of(model, batches) <= 5
