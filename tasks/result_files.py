"""Result files as the official evaluation servers of COCO captions and VQAv2 take them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from adalink.atomic import write_whole
from adalink.errors import ConfigError, DataError

__all__ = ["caption_results_name", "vqa_results_name", "write_caption_results", "write_vqa_results"]


def write_caption_results(path: Path, captions: Mapping[int, str]) -> None:
    """Writes `[{"image_id": 42, "caption": "a dog ."}, ...]`, in the order given; whole or not at all.

    captions   image id -> ONE caption (the server refuses two)
    Raises DataError on an id or text of another type, on no captions, and where the file cannot be written.
    """
    _write(path, captions, "image_id", "caption")


def write_vqa_results(path: Path, answers: Mapping[int, str]) -> None:
    """Writes `[{"question_id": 42000, "answer": "yes"}, ...]`, in the order given; whole or not at all.

    answers   question id -> answer; the server wants every question of the split
    Raises DataError on an id or text of another type, on no answers, and where the file cannot be written.
    """
    _write(path, answers, "question_id", "answer")


def caption_results_name(split: str, algorithm: str) -> str:
    """`captions_val2014_adalink_results.json`, as the COCO caption server wants it."""
    return f"captions_{_part('split', split)}_{_part('algorithm', algorithm)}_results.json"


def vqa_results_name(split: str, algorithm: str) -> str:
    """`v2_OpenEnded_mscoco_test-dev2015_adalink_results.json`, as the VQA server wants it."""
    return f"v2_OpenEnded_mscoco_{_part('split', split)}_{_part('algorithm', algorithm)}_results.json"


def _part(what: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]+", value):
        raise ConfigError(
            f"the {what} {value!r} cannot stand in a result file's name, whose parts '_' divides; use letters, digits, '.' and '-'"
        )
    return value


def _write(path: Path, results: Mapping[int, str], id_name: str, text_name: str) -> None:
    if not results:
        raise DataError(f"there are no results to write to {path}; expected at least one {id_name} with its {text_name}")
    rows: list[dict[str, int | str]] = []
    for key, value in results.items():
        if type(key) is not int or not isinstance(value, str):
            expected = f"a whole number ({id_name}) and a text ({text_name})"
            raise DataError(f"the result {key!r}: {value!r} cannot be written to {path}; expected {expected}")
        rows.append({id_name: key, text_name: value})
    write_whole(path, json.dumps(rows).encode("ascii"))
