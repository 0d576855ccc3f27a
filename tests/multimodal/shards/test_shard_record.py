from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_shards import made_sample

from adalink.errors import DataError
from multimodal.data.shards.reader import Record, decode_caption, decode_record, encode_record, shard_key
from multimodal.sample import Question, Sample


@pytest.mark.parametrize("number", range(6))
def test_every_text_of_a_sample_comes_back(number: int) -> None:
    sample = made_sample(number)
    assert decode_record(encode_record(sample)) == Record(
        key=sample.key, image_id=sample.image_id, captions=sample.captions, questions=sample.questions
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"])), answer=st.text(st.characters(exclude_categories=["Cs"])))
def test_questions_and_answers_come_back_letter_by_letter(text: str, answer: str) -> None:
    sample = Sample(key="k", image_id=1, image=b"", questions=(Question(question_id=5, text=text, answers=(answer, "")),))
    assert decode_record(encode_record(sample)).questions == sample.questions


def test_marks_of_answers_come_back_and_cost_nothing_where_there_are_none() -> None:
    questions = (Question(question_id=5, text="?", answers=("a",), marks=("no",)), Question(question_id=6, text="?", answers=("a",)))
    encoded = encode_record(Sample(key="k", image_id=1, image=b"", questions=questions))
    assert decode_record(encoded).questions == questions
    assert encoded.count(b"marks") == 1


@given(key=st.text())
def test_a_shard_key_is_a_plain_name_that_webdataset_keeps_whole(key: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", shard_key(key))


def test_a_shard_key_stays_where_it_can_and_differs_where_keys_differ() -> None:
    assert shard_key("COCO_val2014_000000000042") == "COCO_val2014_000000000042"
    assert shard_key("val/a.b") == "val_a_b-4819224a72a9ee0d"  # sha256sum of val/a.b
    others = ["a.b", "a_b", "a/b", "../a", "/a", "a\0", "a", "__a__", "", ".", "é", "a" * 81, "a" * 82, "-", "_", "\udc80", "\\udc80x"]
    assert len({shard_key(key) for key in others}) == len(others)


def test_img2datasets_json_gives_its_caption() -> None:
    found = {"caption": " A dog. ", "url": "http://a/b.jpg", "key": "000000012", "status": "success", "error_message": None, "width": 3}
    assert decode_record(json.dumps(found).encode()) == Record(key="000000012", captions=("A dog.",))
    assert decode_record(b'{"caption": null}') == Record()
    assert decode_record(b"{}") == Record()


def test_captions_that_hold_only_white_space_are_no_captions() -> None:
    assert decode_record(b'{"captions": ["a", " ", "b\\n"]}').captions == ("a", "b")


def test_a_text_member_is_one_caption_or_none() -> None:
    assert decode_caption("\ufeffUn café\nnoir \n".encode()) == ("Un café\nnoir",)
    assert decode_caption(b" \n") == ()
    with pytest.raises(DataError, match="txt member is not UTF-8"):
        decode_caption(b"caf\xe9")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "json member is not JSON of Unicode texts"),
        (b"\xff\xfe", "json member is not JSON of Unicode texts"),
        (b"[" * 100_000, "json member is not JSON of Unicode texts"),
        (b'{"caption": "\\ud83d"}', "json member is not JSON of Unicode texts: .*surrogates not allowed"),
        (b"[]", "json member holds a list; expected an object"),
        (b'{"captions": "a"}', "'captions' of its json member is a str; expected a list"),
        (b'{"captions": [1]}', "a caption of its json member is a int; expected a text"),
        (b'{"caption": {"en": "a"}}', "a caption of its json member is a dict; expected a text"),
        (b'{"questions": {"a": 1}}', "'questions' of its json member is a dict; expected a list"),
        (b'{"questions": ["a"]}', "a question of its json member is a str; expected an object"),
        (
            b'{"questions": [{"question_id": "5", "text": "a"}]}',
            r"has the fields \['question_id', 'text'\]; expected question_id, text and answers",
        ),
        (
            b'{"questions": [{"question_id": 5, "text": "a", "answers": [1]}]}',
            "question 5 of its json member has answers or types that are no text",
        ),
        (b'{"questions": [{"question_id": 5, "text": "a", "answer_type": null}]}', "question 5 of its json member has answers or types"),
    ],
)
def test_a_record_of_another_shape_says_what_was_found(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_record(data)


def test_a_whole_surrogate_pair_is_a_letter() -> None:
    """The control of the half pair above."""
    assert decode_record(b'{"caption": "\\ud83d\\ude00"}').captions == ("\U0001f600",)
