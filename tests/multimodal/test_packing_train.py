"""Training picks the way that texts share their picture, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import Drawn, compose, two_texts

from adalink import AdaLink, Bridge
from multimodal.packing import arrangement_of
from multimodal.template import Template
from multimodal.train import train
from multimodal.train_settings import TrainSettings

BRIDGED = {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("text",))}


def test_training_tells_how_texts_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compose("opt", Template(prompt="<image><bos>question: {question} answer:"))
    adapter = model.add_adapter("one", BRIDGED).double()
    adapter.get_submodule("bridge").requires_grad_(False)
    _, told = arrangement_of(model, "whole")
    train(model, Drawn(4), two_texts, TrainSettings(steps=2, batch_size=2), tmp_path)
    assert told in capsys.readouterr().out
    assert told.startswith("nothing trained reads or writes the first")
