"""What files say about themselves when a run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from multimodal.sample import Question, Sample
from tasks.data.files import FileSource
from tasks.data.sources import Chosen

QUESTION = Question(question_id=1, text="is it red?", answers=("yes", "no"), marks=("1", "2"))
SAMPLE = Sample(key="a", image_id=1, image=Path("images/a.jpg"), captions=("a ball", "a cube"), questions=(QUESTION,))


def source(*samples: Sample) -> FileSource:
    return FileSource(samples, (), read_from=Path("file"))


def test_the_same_texts_have_one_fingerprint_wherever_the_pictures_lie() -> None:
    own = source(SAMPLE).texts_fingerprint
    assert own == source(replace(SAMPLE)).texts_fingerprint == source(replace(SAMPLE, image=Path("elsewhere/a.png"))).texts_fingerprint


@pytest.mark.parametrize(
    "other",
    [
        replace(SAMPLE, captions=("a ball", "a cubE")),
        replace(SAMPLE, captions=("a ball a cube",)),
        replace(SAMPLE, captions=("a cube", "a ball")),
        replace(SAMPLE, key="b"),
        replace(SAMPLE, questions=(replace(QUESTION, text="is it blue?"),)),
        replace(SAMPLE, questions=(replace(QUESTION, answers=("yes", "yes")),)),
        replace(SAMPLE, questions=(replace(QUESTION, answers=("yes", "no", "1"), marks=("2",)),)),
        replace(SAMPLE, questions=()),
    ],
)
def test_any_edit_of_a_text_is_another_fingerprint(other: Sample) -> None:
    assert source(other).texts_fingerprint != source(SAMPLE).texts_fingerprint
    assert Chosen(source(other), [0]).texts_fingerprint != Chosen(source(SAMPLE), [0]).texts_fingerprint
