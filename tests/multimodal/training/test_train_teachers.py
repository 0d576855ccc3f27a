"""A training that follows two saved adapters: it resumes bit for bit, leaves the model as it was, and refuses teachers that it cannot follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, two_texts
from train_case import METHODS, SETTINGS, Stop, losses, stop_at, weights

from adalink import AdaLink, Bridge, Method, Prompt
from adalink.errors import CheckpointError, ConfigError
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from multimodal.training.prepare import following, mean_loss
from multimodal.training.settings import Teachers, TrainSettings
from multimodal.training.train import train

WORDS = Template(prompt="<image><bos>question: {question} answer:")


def saved(folder: Path, seed: int, methods: Mapping[str, Method] = METHODS, task: str = "vqa", family: str = "opt", words: Template = WORDS) -> Path:
    """The folder of an adapter with random weights."""
    model = compose(family, words)
    torch.manual_seed(5)
    excite(model.add_adapter("one", methods).double(), seed)
    model.save_pretrained(folder, task={"task": task})
    return folder


@pytest.fixture
def teachers(tmp_path: Path) -> Teachers:
    other = {**METHODS, "adalink": AdaLink(rank=7, modalities=("image",))}
    return Teachers(old=saved(tmp_path / "old", 1, other), new=saved(tmp_path / "new", 2))


def student(teachers: Teachers, family: str = "opt") -> VisionLanguageModel:
    model = compose(family, WORDS)
    model.load_adapter(teachers.new, "one").double()
    return model


def trained(folder: Path, teachers: Teachers, model: VisionLanguageModel, **fields: Any) -> VisionLanguageModel:
    folder.mkdir(exist_ok=True, parents=True)
    options = {name: fields.pop(name) for name in ("resume", "measure") if name in fields}
    train(model, Drawn(8), two_texts, TrainSettings(**{**SETTINGS, "teachers": teachers, **fields}), folder, **options)
    return model


def test_a_run_that_stops_goes_on_bit_for_bit_and_leaves_no_teacher_on_the_model(teachers: Teachers, tmp_path: Path) -> None:
    before = weights(student(teachers))
    fields: dict[str, Any] = {"steps": 4, "checkpoint_every": 1, "measure_every": 1}
    whole = trained(tmp_path / "whole", teachers, student(teachers), measure=lambda: {"figure": 1.0}, **fields)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", teachers, student(teachers), measure=stop_at(2), **fields)
    again = trained(tmp_path / "cut", teachers, student(teachers), measure=lambda: {"figure": 1.0}, resume=True, **fields)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert whole.adapter_names == ["one"]
    assert whole.language_loss.followed is None
    plain = trained(tmp_path / "plain", Teachers(), student(teachers), **fields, measure=lambda: {"figure": 1.0})
    moved = {name: max(float((value - before[name]).abs().max()) for value in (weights(whole)[name], weights(plain)[name])) for name in before}
    assert min(moved.values()) > 0
    assert not all(torch.equal(value, weights(plain)[name]) for name, value in weights(whole).items())  # control: the texts alone
    with pytest.raises(CheckpointError, match=r"cannot be continued exactly: teachers was "):
        trained(tmp_path / "cut", Teachers(old=teachers.new, new=teachers.new), student(teachers), resume=True, **{**fields, "steps": 5}, measure=lambda: {"figure": 1.0})


def test_a_student_of_one_teacher_alone_comes_nearer_to_it_and_has_no_gradient_where_it_is_already(teachers: Teachers, tmp_path: Path) -> None:
    model = student(teachers)
    (batch, *_) = model.batches(Drawn(4), two_texts, batch_size=4)
    with following(model, Teachers(old=teachers.new, new=teachers.new)):
        loss = model(batch)
    gradients = torch.autograd.grad(loss, list(model.adapted.active_adapter().parameters()))
    assert float(loss.detach()) < 1e-12  # the teachers are in float32
    assert max(float(one.abs().max()) for one in gradients) < 1e-5
    trained(tmp_path / "other", Teachers(old=teachers.old, new=teachers.old), student(teachers), steps=12)
    found = losses(tmp_path / "other")
    assert found[-1] < 0.7 * found[0]


def test_the_loss_on_validation_data_is_that_of_the_texts(teachers: Teachers) -> None:
    model = student(teachers)
    batches = list(model.batches(Drawn(4), two_texts, batch_size=4))
    plain = mean_loss(model, batches)
    with following(model, teachers):
        assert mean_loss(model, batches) == plain
        assert float(model(batches[0]).detach()) != pytest.approx(plain)
    assert mean_loss(model, batches) == plain


@pytest.mark.slow
def test_packed_rows_in_rows_of_several_images_learn_what_separate_rows_learn(teachers: Teachers, tmp_path: Path) -> None:
    packed = trained(tmp_path / "packed", teachers, student(teachers), features="memory")
    joined = trained(tmp_path / "joined", teachers, student(teachers), features="memory", row_tokens=400)
    assert max(float((value - weights(joined)[name]).abs().max()) for name, value in weights(packed).items()) < 1e-8
    accumulated = trained(tmp_path / "accumulated", teachers, student(teachers), features="memory", batch_size=2, accumulation=2)
    assert max(float((value - weights(accumulated)[name]).abs().max()) for name, value in weights(packed).items()) < 1e-8


@pytest.mark.slow
def test_an_encoder_decoder_model_has_teachers_too(tmp_path: Path) -> None:
    methods = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))}
    own = Teachers(old=saved(tmp_path / "old", 1, methods, family="t5"), new=saved(tmp_path / "new", 2, methods, family="t5"))
    trained(tmp_path / "run", own, student(own, "t5"), steps=6)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_what_cannot_be_followed_is_refused_in_a_sentence_and_nothing_stays_on_the_model(
    teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer, gated = {**METHODS, "prompt": Prompt(length=3)}, Template(prompt="<image><bos>what is {question} answer:")
    other_base = tmp_path / "gpt2"
    saved(other_base, 1, {"bridge": Bridge(kind="linear")}, family="gpt2")
    for folder, kind, sentence in (
        (saved(tmp_path / "longer", 1, longer), ConfigError, r"reserves \d+ positions in a row and this adapter \d+, of the kinds"),
        (saved(tmp_path / "captions", 1, task="captioning"), ConfigError, "was trained for captioning, and what it teaches for vqa: give teachers of one task"),
        (saved(tmp_path / "words", 1, words=gated), ConfigError, "its words would not align; give one with the same template"),
        (other_base, CheckpointError, "was trained on the language model tiny-gpt2"),
        (tmp_path / "absent", CheckpointError, "absent"),
    ):
        model = student(teachers)
        with pytest.raises(kind, match=sentence):
            trained(tmp_path / "run", Teachers(old=folder, new=teachers.new), model)
        assert (model.adapter_names, model.language_loss.followed) == (["one"], None)
    chooses = student(teachers)
    chooses.add_answer_head(["yes", "no"])
    with pytest.raises(ConfigError, match="this model chooses among answers: train it without teachers"):
        trained(tmp_path / "run", teachers, chooses)
    monkeypatch.setattr("multimodal.training.prepare.FSDPModule", VisionLanguageModel)
    with pytest.raises(ConfigError, match="FSDP2 splits it over processes: train with DDP"):
        trained(tmp_path / "run", teachers, student(teachers))
    for fields in ({"compile": "default"}, {"states_gib": 1.0}):
        with pytest.raises(ConfigError, match="what they save is of one adapter, and three read each text; leave one out"):
            TrainSettings(teachers=teachers, **fields)
    with pytest.raises(ConfigError, match=r"train.teachers.labels is -1: give a weight of 0 or more"):
        Teachers(old=teachers.old, new=teachers.new, labels=-1)
    with pytest.raises(ConfigError, match=r"train.teachers.old is given and train.teachers.new is not: give both adapter folders, or neither"):
        Teachers(old=teachers.old)
