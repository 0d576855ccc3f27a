from __future__ import annotations

import pytest

from multimodal import progress as module
from multimodal.progress import StepProgress, progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_long_loop_without_a_terminal_says_a_line_every_half_minute(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(10), "encoding"):
        seconds[0] += 16.0
    assert capsys.readouterr().err.splitlines() == [f"encoding: {n} of 10 batches, {16 * (10 - n)} s left" for n in (2, 4, 6, 8)]
    for _ in progress(iter(range(3)), "reading"):
        seconds[0] += 31.0
    assert capsys.readouterr().err.splitlines() == [f"reading: {n} of unknown batches" for n in (1, 2)]


def test_one_process_of_several_says_it(seconds: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for _ in progress(range(3), "encoding"):
        seconds[0] += 31.0
    assert capsys.readouterr().err == ""


def test_steps_say_a_line_where_nothing_is_logged_for_half_a_minute(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    displayed = StepProgress(first=10, last=16, is_visible=True)
    for step in range(11, 17):
        seconds[0] += 10.0
        displayed.step()
        if step == 16:
            displayed.logged(step, 1.5, 1e-3)
    displayed.close()
    assert capsys.readouterr().err.splitlines() == ["step 13/16  0.10 steps/s  30 s left", "step 16/16  0.10 steps/s  0 s left", "step 16/16  loss 1.500  learning rate 1.0e-03  0.10 steps/s  0 s left"]
