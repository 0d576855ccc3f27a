"""Texts that say too little are told; texts that are alike by right are not."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from cli_run import adalink, train

from multimodal.generation.generate import GenerationSettings
from tasks.evaluation.evaluate import degenerate_note

GREEDY, BEAMS = GenerationSettings(), GenerationSettings(num_beams=3)
SAME, OTHERS = "how many people are there? 2.", [f"a dog runs past tree {i}." for i in range(30)]


@pytest.mark.parametrize(
    ("texts", "settings", "note"),
    [
        ([SAME] * 16 + OTHERS, BEAMS, f"16 of 46 texts are the same, {SAME!r}: 3 beams find what the frozen model thinks most probable"),
        ([SAME] * 16 + OTHERS, GREEDY, f"16 of 46 texts are the same, {SAME!r}: the adapter hardly distinguishes the images"),
        ([SAME] * 15 + OTHERS, BEAMS, ""),
        ([""] * 4 + OTHERS, BEAMS, "4 of 34 texts are empty: 3 beams find"),
        ([""] * 3 + OTHERS, BEAMS, ""),
        (["yes"] * 30, BEAMS, ""),  # answers
        ([SAME] * 19, BEAMS, ""),  # few
        ([], GREEDY, ""),
    ],
)
def test_what_is_told_of_texts(texts: list[str], settings: GenerationSettings, note: str) -> None:
    sentence = degenerate_note(texts, settings)
    assert sentence.startswith(note)
    assert bool(sentence) == bool(note)


def test_the_screen_and_the_report_tell_it(tmp_path: Path) -> None:
    """An adapter of two steps says the same of every image."""
    done = train("captioning", tmp_path / "run", "--data.val.scenes", "val/20", "--generation.max_new_tokens", "6", "--generation.num_beams", "2")
    assert done.code in (0, None), done
    note = [line for line in done.err.splitlines() if "texts are the same" in line]
    assert len(note) == 1
    assert "20 texts are the same" in note[0]
    assert note[0] in html.unescape((tmp_path / "run" / "report.html").read_text())
    again = adalink("evaluate", "--config", tmp_path / "run" / "config.yaml", "--adapter", tmp_path / "run" / "adapter", "--generation.num_beams", "1")
    assert "compare with generation.num_beams 1" not in again.err
