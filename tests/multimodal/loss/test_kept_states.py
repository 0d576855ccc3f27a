"""A run that keeps the states of its texts ends as one that does not, goes on bit for bit, and says plainly where nothing can be kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, patches, two_texts
from torch import Tensor, nn

from adalink import EPALM, AdaLink, Bridge, Ladder, LoRA, Prompt
from adalink.errors import ConfigError
from multimodal.batches.collate import collate
from multimodal.data.images.decode import decode_image
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from multimodal.training.prepare import hidden_state_model
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

SETTINGS = {"steps": 6, "batch_size": 3, "log_every": 1, "checkpoint_every": 2, "warmup": 0.0, "learning_rate": 1e-2}


def composed(methods: Any = None, family: str = "deep_opt") -> VisionLanguageModel:
    model = compose(family, Template(prompt="<image><bos>question: {question} answer:"))
    torch.manual_seed(5)
    excite(model.add_adapter("one", methods or {"epalm": EPALM(layers=(1, 3), n_taps=2, connector="shared")}).double())
    return model


def trained(folder: Path, *, resume: bool = False, **fields: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    model = composed()
    train(model, Drawn(6), two_texts, TrainSettings(**{**SETTINGS, **fields}), folder, resume=resume)
    assert model.language_loss.lower is None
    return {name: value.detach().clone() for name, value in model.adapted.active_adapter().named_parameters()}


def test_a_run_that_keeps_states_ends_as_one_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, retained = trained(tmp_path / "plain"), trained(tmp_path / "kept", states_gib=0.1)
    assert "the first 1 of 3 layers run once for each text, as long as its states fit into 0.1 GiB" in capsys.readouterr().out
    assert all(torch.allclose(value, plain[name], rtol=1e-6, atol=1e-6) for name, value in retained.items())


@pytest.mark.parametrize("fields", [{}, {"precision": "bf16"}, {"row_tokens": 64}, {"checkpointing": True}], ids=str)
def test_a_run_that_keeps_states_goes_on_bit_for_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**fields, "states_gib": 0.1, "final_rate": 1.0}
    trained(tmp_path / "resumed", steps=2, **fields)
    whole = trained(tmp_path / "whole", **fields)
    resumed = trained(tmp_path / "resumed", resume=True, **fields)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_texts_are_written_while_states_are_kept_as_they_are_without(tmp_path: Path) -> None:
    model = composed()
    images, stated = [decode_image(Drawn(2)[i].image) for i in range(2)], []
    for gib in (0.0, 0.1):
        with hidden_state_model(model, gib, 2):
            stated.append(model.generate(images, ["is it red ?", ""]))
    assert stated[0] == stated[1]


LADDERS = {
    "every second layer": {"bridge": Bridge(kind="linear"), "ladder": Ladder(reduction=2, rungs=(0, 2), image="side_only")},
    "added": {"bridge": Bridge(kind="linear"), "ladder": Ladder(reduction=2, rungs=(1,), image="side_only", output="add")},
}


@pytest.mark.parametrize(("name", "family"), [("every second layer", "deep_opt"), ("added", "deep_opt"), ("added", "llama"), ("added", "gpt2")])
def test_beside_a_ladder_no_layer_of_the_model_runs_a_second_time(name: str, family: str) -> None:
    """Loss and gradients are those of the whole model; images are others at the second reading, which the model itself does not see."""
    model = composed(LADDERS[name], family)
    own = list(model.adapted.active_adapter().parameters())
    found: list[list[Tensor]] = []
    ran: list[nn.Module] = []
    layer = model.adapted.attachment.stack.get_submodule(model.adapted.anatomy.layers[0])
    next(module for module in layer.modules() if not list(module.children())).register_forward_hook(lambda module, *call: ran.append(module))
    rows = [model.row_encoder().row(text) for text in two_texts(Drawn(1)[0], random.Random(0))]
    for gib in (0.0, 0.1):
        with hidden_state_model(model, gib, 2):
            for reading in (0, 1):
                ran.clear()
                loss = model(collate(rows, [0, 1], patches(2, seed=reading), kind="patches", side="right", pad_id=0))
                assert bool(ran) == (not gib or reading == 0)
                found.append([loss.detach(), *torch.autograd.grad(loss, own)])
    for one, two in zip(found[:2], found[2:], strict=True):
        for value, other in zip(one, two, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-9)
    assert not torch.equal(found[0][0], found[1][0])  # control: the ladder sees other images


def test_what_writes_before_the_layers_is_named_where_a_ladder_reads_them() -> None:
    bridge, tail = Bridge(kind="linear"), "writes what enters them: give train.states_gib: 0, or let the ladder have the image to itself"
    sentence = "train.states_gib caches what a ladder reads of the frozen layers, and"
    refused(composed({"bridge": bridge, "ladder": Ladder(reduction=2)}), rf"{sentence} bridge.image {tail}")
    prompt = Prompt(length=2, init_std=0.5)
    refused(composed({"bridge": bridge, "prompt": prompt, "ladder": Ladder(reduction=2, image="side_only")}), rf"{sentence} prompt.soft {tail}")
    refused(composed({"bridge": bridge, "ladder": Ladder(reduction=2, image="side_only")}, "t5"), "caches what a ladder reads of a decoder-only model, and this one")


def refused(model: VisionLanguageModel, match: str) -> None:
    with pytest.raises(ConfigError, match=match), hidden_state_model(model, 1.0, 6):
        pass


def test_what_writes_too_low_is_named() -> None:
    tail = r"give train.states_gib: 0, or methods in deeper layers alone, as eP-ALM without a prompt"
    epalm = EPALM(layers=(1, 3), n_taps=2, connector="shared")
    for name, method, where in (
        ("prompt", Prompt(length=2, init_std=0.5), r"prompt.soft acts on what enters the layers"),
        ("adalink", AdaLink(rank=2, modalities=("text",)), r"adalink.text acts on what enters the layers"),
        ("lora", LoRA(groups={"all": ("all",)}, rank=2, alpha=2, targets=("query",)), r"lora.all.0.q_proj acts on the first layer"),
        ("epalm", EPALM(layers=(0, 2), n_taps=2, connector="shared"), r"epalm.tap0 acts on the first layer"),
    ):
        refused(composed({"epalm": epalm, name: method}), rf"train.states_gib caches the output of the layers below .*, and {where}: {tail}")


def test_a_slot_that_reads_padding_is_refused() -> None:
    epalm = EPALM(layers=(1, 2), n_taps=2, connector="shared", mask="published")
    refused(composed({"epalm": epalm}), "caches nothing of padding, and a slot of this adapter reads it: train eP-ALM with mask: causal, or give train.states_gib: 0")


def test_a_frozen_model_that_is_not_frozen_is_refused() -> None:
    model = composed()
    next(model.language.model.parameters()).requires_grad_()
    refused(model, r"caches the states of a frozen language model, and model.decoder.embed_tokens.weight is trained: give train.states_gib: 0")


def test_a_head_that_chooses_is_refused() -> None:
    model = composed()
    model.add_answer_head(["yes", "no"])
    refused(model, "train.states_gib acts on models that write, and this one chooses among answers: give train.states_gib: 0")


def test_a_split_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.training.prepare.FSDPModule", VisionLanguageModel)
    refused(composed(), "runs texts in each process apart, and FSDP2 splits the model over them: train with DDP, or give train.states_gib: 0")


def test_a_model_that_cannot_be_started_is_refused() -> None:
    model = compose("t5")
    model.add_adapter("one", {"epalm": EPALM(layers=(1, 2), n_taps=2, connector="shared")}).double()
    refused(model, "t5 was tried without the first 1 of 2 layers, given their output for a text, and gives other logits then: give train.states_gib: 0")


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    model = composed({"prompt": Prompt(length=2, init_std=0.5)})
    with hidden_state_model(model, 0.0, 6):
        assert model.language_loss.lower is None
