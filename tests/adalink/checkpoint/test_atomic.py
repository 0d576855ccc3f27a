from __future__ import annotations

import os
from pathlib import Path

import pytest

from adalink.errors import DataError
from adalink.files import write_whole


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"old", b"new"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("path", ["absent/a.json", "folder"])
def test_a_file_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{path} cannot be written"):
        write_whole(tmp_path / path, b"x")
    assert os.listdir(tmp_path) == ["folder"]
