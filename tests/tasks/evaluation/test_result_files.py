from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adalink.errors import ConfigError, DataError
from tasks.metrics.files import caption_results_name, vqa_results_name, write_caption_results, write_vqa_results


def test_results_are_written_in_the_official_formats_and_in_the_order_given(tmp_path: Path) -> None:
    write_caption_results(tmp_path / "c.json", {42: "a dog .", 7: "une forêt"})
    write_vqa_results(tmp_path / "v.json", {420: "yes", 70: ""})
    assert json.loads((tmp_path / "c.json").read_text()) == [
        {"image_id": 42, "caption": "a dog ."},
        {"image_id": 7, "caption": "une forêt"},
    ]
    assert json.loads((tmp_path / "v.json").read_text()) == [{"question_id": 420, "answer": "yes"}, {"question_id": 70, "answer": ""}]


def test_result_files_are_named_as_the_servers_want_them() -> None:
    assert caption_results_name("val2014", "adalink") == "captions_val2014_adalink_results.json"
    assert vqa_results_name("test-dev2015", "adalink") == "v2_OpenEnded_mscoco_test-dev2015_adalink_results.json"


@pytest.mark.parametrize("value", ["", "my_run", "../x", "a b", "a\n"])
def test_a_part_that_a_name_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"the split .* cannot stand in a result file's name"):
        vqa_results_name(value, "adalink")
    with pytest.raises(ConfigError, match=r"the algorithm .* cannot stand in a result file's name"):
        caption_results_name("val2014", value)


@pytest.mark.parametrize("results", [{"42": "yes"}, {True: "yes"}, {42: None}, {42: 3}])
def test_wrong_types_are_refused_before_anything_is_written(tmp_path: Path, results: dict[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"expected a whole number \(question_id\) and a text \(answer\)"):
        write_vqa_results(tmp_path / "v.json", results)
    assert os.listdir(tmp_path) == []


def test_no_results_and_no_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results to write to .*; expected at least one image_id with its caption"):
        write_caption_results(tmp_path / "c.json", {})
    with pytest.raises(DataError, match="cannot be written: No such file or directory"):
        write_caption_results(tmp_path / "absent" / "c.json", {1: "a"})
