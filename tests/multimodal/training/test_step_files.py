"""How many files a reader opens to follow one training step from the loss to the gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from composed import Drawn, compose, two_texts
from shared import ROOT

from adalink import AdaLink, Bridge
from multimodal.data.feature_cache.encode import encode_all

MOST = 8  # with the loop, multimodal/training/train.py
VALUES = {"adalink/tokens.py", "adalink/edit.py", "multimodal/batches/collate.py"}  # what is passed: they decide nothing


def test_a_step_is_read_in_eight_files() -> None:
    model = compose("opt")
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))})
    samples = Drawn(4)
    batches = iter(model.batches(samples, two_texts, batch_size=2, features=encode_all(model, samples)))
    model(next(batches)).backward()  # the first step tries out what the model takes
    passed: set[str] = set()

    def note(frame: FrameType, event: str, value: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT) and ".venv" not in file.parts:
            passed.add(file.relative_to(ROOT).as_posix())

    batch = next(batches)
    sys.setprofile(note)
    try:
        model(batch).backward()
    finally:
        sys.setprofile(None)
    methods = {file for file in passed if file.startswith("adalink/methods/")}
    steps = {"multimodal/training/train.py", *passed} - VALUES - methods - {Path(__file__).relative_to(ROOT).as_posix()}
    assert "multimodal/model.py" in steps  # the control: something was seen
    assert methods == {"adalink/methods/adalink.py", "adalink/methods/bridge.py"}
    assert len(steps) + 1 <= MOST, sorted(steps)  # and the method's
