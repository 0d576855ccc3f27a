"""A sample's texts as the `json` member of a shard, and back; foreign shards' JSON and text too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

from adalink.errors import DataError
from multimodal.sample import Question, Sample

__all__ = ["Record", "decode_caption", "decode_record", "encode_record", "shard_key"]

_DECODER = json.JSONDecoder()
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


class Record(NamedTuple):
    """What a `json` member says; None where it does not."""

    key: str | None = None
    image_id: int | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()


def shard_key(key: str) -> str:
    """The key as a member's name, which must hold no dot (webdataset ends a key there) and nothing that unpacks elsewhere.

    `42` stays `42`; `val/a.b` becomes `val_a_b-` and sixteen digits of its sha256, so that two keys do not become one.
    """
    if _KEY.fullmatch(key):
        return key
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", key).lstrip("_-")[:60] or "key"
    return f"{clean}-{hashlib.sha256(key.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"


def encode_record(sample: Sample) -> bytes:
    """JSON with the sample's own key, its image id and all its texts."""
    record = {
        "key": sample.key,
        "image_id": sample.image_id,
        "captions": sample.captions,
        "questions": [{name: value for name, value in asdict(question).items() if name != "marks" or value} for question in sample.questions],
    }
    return json.dumps(record).encode("ascii")


def decode_record(data: bytes) -> Record:
    """Reads what `encode_record` wrote, and img2dataset's JSON, whose only text is `caption`.

    Raises DataError where it is no JSON object, or a field that is used is of another type.
    """
    try:
        found = _loaded(data)
        if b"\\u" in data and (b"\\ud" in data or b"\\uD" in data):
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair would stop a tokenizer later
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json member is not JSON of Unicode texts: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"its json member holds a {type(found).__name__}; expected an object")
    image_id, key = found.get("image_id"), found.get("key")
    return Record(
        key=key if isinstance(key, str) else None,
        image_id=image_id if type(image_id) is int else None,
        captions=_captions(found),
        questions=tuple([_question(row) for row in _list(found, "questions")]) if found.get("questions") else (),
    )


def decode_caption(data: bytes) -> tuple[str, ...]:
    """The caption of a `txt` member, UTF-8; none where it holds only white space. Raises DataError where it is not UTF-8."""
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"its txt member is not UTF-8: {error}") from error
    return (caption,) if caption else ()


def _loaded(data: bytes) -> object:
    try:
        text = data.decode("utf-8")
        found, end = _DECODER.raw_decode(text)  # half the time of json.loads, which looks for the encoding and for spaces first
        if end == len(text):
            return found
    except ValueError:
        pass
    return json.loads(data)


def _captions(found: Mapping[str, object]) -> tuple[str, ...]:
    captions = []
    for caption in _list(found, "captions") or [found.get("caption") or ""]:
        if not isinstance(caption, str):
            raise DataError(f"a caption of its json member is a {type(caption).__name__}; expected a text")
        if stripped := caption.strip():
            captions.append(stripped)
    return tuple(captions)


def _list(found: Mapping[str, object], key: str) -> list[object]:
    value = found.get(key) or []
    if not isinstance(value, list):
        raise DataError(f"{key!r} of its json member is a {type(value).__name__}; expected a list")
    return value


def _question(row: object) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"a question of its json member is a {type(row).__name__}; expected an object")
    question_id, text, answers, marks = row.get("question_id"), row.get("text"), row.get("answers", []), row.get("marks", [])
    if type(question_id) is not int or not isinstance(text, str) or not isinstance(answers, list) or not isinstance(marks, list):
        raise DataError(f"a question of its json member has the fields {sorted(map(str, row))}; expected question_id, text and answers")
    types = row.get("question_type", ""), row.get("answer_type", "")
    if not all(isinstance(each, str) for each in (*answers, *types, *marks)):
        raise DataError(f"question {question_id} of its json member has answers or types that are no text")
    return Question(
        question_id=question_id, text=text, answers=tuple(answers), question_type=types[0], answer_type=types[1], marks=tuple(marks)
    )
