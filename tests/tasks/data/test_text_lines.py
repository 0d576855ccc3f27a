"""Where a line of a text file ends, in every file of the project that has one thing a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.data.files import text_lines
from tasks.metrics.files import read_graded_questions
from tasks.serve.access import Keys

BOUNDARIES = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_only_line_feeds_and_carriage_returns_end_a_line(boundary: str) -> None:
    assert text_lines(f" a{boundary}b \r\n\r\nc\rd\n \n") == [f"a{boundary}b", "c", "d"]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_files_of_keys_and_of_answers_have_such_lines(tmp_path: Path, boundary: str) -> None:
    file = tmp_path / "lines.txt"
    file.write_text(f"what is{boundary}it ?\na{boundary}chair\n", encoding="utf-8")
    assert Keys(file).keys == (f"what is{boundary}it ?".encode(), f"a{boundary}chair".encode())
    (graded,) = read_graded_questions(file)
    assert set(graded.answers) == {f"a{boundary}chair"}
