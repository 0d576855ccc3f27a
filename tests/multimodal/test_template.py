from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adalink.errors import ConfigError
from multimodal.template import MARKERS, Template

VQA = Template(prompt="<image><bos>question: {question} answer:", target=" {text}<eos>")


def test_the_example_of_the_docstring() -> None:
    assert VQA.prompt_parts("is it red?") == ["<image>", "<bos>", "question: is it red? answer:"]
    assert VQA.target_parts("yes") == [" yes", "<eos>"]


def test_markers_are_read_before_anything_is_filled_in() -> None:
    assert VQA.prompt_parts("is <image> a <bos>{question}?") == ["<image>", "<bos>", "question: is <image> a <bos>{question}? answer:"]
    assert VQA.target_parts("<eos> {text}") == [" <eos> {text}", "<eos>"]


@given(st.text())
def test_a_question_changes_the_words_alone(question: str) -> None:
    parts = VQA.prompt_parts(question)
    assert [part for part in parts if part in MARKERS] == ["<image>", "<bos>"] or question.strip() in MARKERS
    assert "".join(parts) == f"<image><bos>question: {question} answer:"


def test_an_empty_question_leaves_no_empty_part() -> None:
    assert Template(prompt="{question}<image>").prompt_parts("") == ["", "<image>"]
    assert Template(prompt="<image><bos>").prompt_parts("") == ["<image>", "<bos>"]


WRONG = [
    ({"prompt": "an image of"}, r"'an image of' has 0 places for the image: write <image> once"),
    ({"prompt": "<image> and <image>"}, "has 2 places for the image"),
    ({"prompt": "<image>", "target": "<eos>"}, r"target template '<eos>' must hold \{text\}, and not <image>"),
    ({"prompt": "<image>", "target": "<image>{text}"}, r"must hold \{text\}, and not <image>"),
    ({"prompt": "<image>{qestion}"}, r"the prompt template '<image>\{qestion\}' has a place \{qestion\} that nothing fills: it may have \{question\}"),
    ({"prompt": "<image>{}"}, r"has a place \{\} that nothing fills"),
    ({"prompt": "<image>", "target": "{text}{question}"}, r"the target template .* has a place \{question\} that nothing fills: it may have \{text\}"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_template_that_cannot_be_filled_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Template(**fields)
