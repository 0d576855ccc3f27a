"""Conversations in the layouts of LLaVA, ShareGPT, OpenAI and the usual trainers: what samples they give, and what is counted or refused."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from adalink.errors import AdalinkError, BudgetError, ConfigError, DataError
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import BadSamples, Sample
from tasks.data.arrow.write import write_parquet
from tasks.data.sources import DataConfig, Opened

SYSTEM, FIRST, SECOND = "be brief", ("What is it?", "ein rotes Quadrat – 緑"), ("And its colour?", "red")
IMAGE = "sub/a.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three small images, one in a folder of its own."""
    (tmp_path / "sub").mkdir()
    for name in (IMAGE, "b.png", "c.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    return tmp_path


def said(first: object = f"<image>\n{FIRST[0]}", *, role: str = "from", text: str = "value", names: Sequence[str] = ("system", "human", "gpt")) -> list[Any]:
    """The conversation, in the words of a layout."""
    turns = (SYSTEM, first, FIRST[1], *SECOND)
    return [{role: name, text: value} for name, value in zip((names[0], *names[1:] * 2), turns, strict=True)]


def messages(first: object = f"<image>{FIRST[0]}") -> list[Any]:
    return said(first, role="role", text="content", names=("system", "user", "assistant"))


def data_uri(folder: Path) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / IMAGE).read_bytes()).decode()


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# Name -> a row, made of the folder of images.
ROWS: Mapping[str, Callable[[Path], Mapping[str, Any]]] = {
    "llava": lambda folder: {"id": "000", "image": IMAGE, "conversations": said()},
    "llava, image last": lambda folder: {"id": 7, "image": [IMAGE], "conversations": said(f"{FIRST[0]}\n<image>")},
    "sharegpt": lambda folder: {"conversations": said()[1:], "images": [IMAGE], "system": SYSTEM},
    "messages": lambda folder: {"messages": messages(), "images": [IMAGE]},
    "unmarked": lambda folder: {"messages": messages(FIRST[0]), "images": [{"bytes": None, "path": IMAGE}]},
    "parts": lambda folder: {"messages": messages([{"type": "image"}, text(FIRST[0])]), "images": json.dumps([IMAGE])},
    "parts with paths": lambda folder: {"messages": messages([{"type": "image", "image": f"file://{folder / IMAGE}"}, text("What "), text("is it?")])},
    "openai": lambda folder: {"messages": messages([{"type": "image_url", "image_url": {"url": data_uri(folder)}}, text(FIRST[0])])},
    "halves": lambda folder: {"prompt": messages()[:-1], "completion": messages()[-1:], "image": IMAGE},
    "alpaca": lambda folder: {
        "instruction": "And its", "input": "colour?", "output": "red", "history": [[f"<image>{FIRST[0]}", FIRST[1]]], "system": SYSTEM, "images": [IMAGE],
    },
    "swift": lambda folder: {"query": SECOND[0], "response": "red", "history": [[f"<image>{FIRST[0]}", FIRST[1]]], "system": SYSTEM, "images": IMAGE},
}  # fmt: skip


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSONL; JSON or a packed file by the name."""
    whole = json.dumps(rows, ensure_ascii=False) if ".json" in path.suffixes else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(whole.encode()) if path.suffix == ".gz" else whole.encode("utf-8-sig" if path.name.startswith("bom") else "utf-8"))
    return path


def opened(folder: Path, *rows: Mapping[str, Any], **fields: Any) -> Opened:
    return DataConfig(path=lines(folder / "c.jsonl", rows), **fields).open()


def asked(sample: Sample) -> list[tuple[object, ...]]:
    """What a layout must not change."""
    return [(one.text, one.answers, one.turns, one.places) for one in sample.questions]


FILES = ("c.json", "bom.jsonl", "c.jsonl.gz", "c.json.gz")


@pytest.mark.parametrize("name, file", [*((name, "c.jsonl") for name in ROWS), *(("llava", file) for file in FILES)])
def test_every_layout_is_recognised_and_gives_the_same_questions(name: str, file: str, images: Path) -> None:
    data = DataConfig(path=lines(images / file, [ROWS[name](images)])).open()
    (sample,) = [pickle.loads(pickle.dumps(data.source))[i] for i in range(len(data.source))]  # as a worker process gets it
    assert sample.images == ((images / IMAGE).read_bytes() if name == "openai" else images / IMAGE,)
    place = (1, len(FIRST[0]) if name == "llava, image last" else 0)
    before = (("system", SYSTEM), ("user", FIRST[0]), ("assistant", FIRST[1]))
    question = "And its\ncolour?" if name == "alpaca" else SECOND[0]
    assert asked(sample) == [(FIRST[0], FIRST[1:], before[:1], (place,)), (question, SECOND[1:], before, (place,))]
    assert (sample.captions, data.problems, data.beyond) == ((), (), {"earlier turns": 1})
    assert "conversations, as LLaVA, ShareGPT and OpenAI write them (conversations: " in data.sentence


@pytest.mark.parametrize("text_of", [json.dumps, str])
def test_a_table_may_hold_conversations_as_json_or_as_python_prints_them(text_of: Callable[[object], str], images: Path) -> None:
    with (images / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "images"], [text_of(messages()), text_of([IMAGE])]])
    assert len(asked(DataConfig(path=images / "c.csv").open().source[0])) == 2


def test_columns_with_other_names_are_given(images: Path) -> None:
    row = {"dialog": messages(), "photo": IMAGE, "rules": "be long"}
    columns = {"conversations": "dialog", "image": "photo", "system": "rules"}
    assert opened(images, row, format="conversations", columns=columns).source[0].images == (images / IMAGE,)
    with pytest.raises(DataError, match=r"no column of conversations; it has 'dialog', 'photo', 'rules'; name it, as in columns: \{conversations: dialog\}"):
        opened(images, row, format="conversations")
    with pytest.raises(ConfigError, match="the role 'caption': expected some of conversations, image, system"):
        opened(images, row, format="conversations", columns={"caption": "rules"})


def test_images_stand_where_the_row_has_them_and_a_question_reads_those_before_it(images: Path) -> None:
    turns = [("user", "<image>\n\n<image> left or <image>right?"), ("assistant", "left"), ("user", "and <image>here? \n<image>\n"), ("assistant", "no")]
    row = {"images": [IMAGE, "b.png", "c.png", IMAGE, "b.png"], "messages": [{"role": role, "content": words} for role, words in turns]}
    data = opened(images, row)
    first, second = data.source[0].questions
    assert [path.relative_to(images).as_posix() for path in data.source[0].images] == row["images"]  # type: ignore[union-attr]
    assert (first.text, first.places) == ("left or right?", ((0, 0), (0, 0), (0, 8)))
    assert (second.text, second.places) == ("and here?", (*first.places, (2, 4), (2, 9)))  # type: ignore[misc]
    assert data.beyond == {"several images": 1, "earlier turns": 1}


def exchange(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_rows_about_one_image_are_one_sample_and_rows_without_one_stand_among_them(images: Path) -> None:
    rows = [
        exchange("<image>\nWhat?", " a red square ", image=IMAGE), exchange("Hello?", "hi"), exchange("<image>\nHow many?", "one", image=IMAGE), exchange("Hello?", "hi"),
        exchange("<image>", "text", image="b.png"),
    ]  # fmt: skip
    data = opened(images, *rows)
    samples = [data.source[i] for i in range(len(data.source))]
    assert [(one.key, one.image_id, len(one.images)) for one in samples] == [(IMAGE, 0, 1), ("1", 1, 0), ("2", 2, 0), ("b.png", 3, 1)]
    assert [one.captions for one in samples] == [("a red square", "one"), (), (), ("text",)]
    assert [[q.question_id for q in one.questions] for one in samples] == [[0, 2], [1], [3], [4]]
    assert (samples[1].questions[0].places, samples[3].questions[0].text) == ((), "")
    assert data.beyond == {"no image": 2}
    assert data.sentence.endswith("(conversations: conversations; 2 images in 5 rows, 2 of them with no image)")


def test_conversations_in_parquet_and_what_is_written_of_them(images: Path) -> None:
    two = [text("left "), {"type": "image"}, text("or"), {"type": "image"}]
    messages_of = [
        [{"role": "user", "content": [{"type": "image"}, text("What?")]}, {"role": "assistant", "content": [text("a square")]}],
        [{"role": "user", "content": [text("Hello?")]}, {"role": "assistant", "content": [text("hi")]}],
        [{"role": "user", "content": two}, {"role": "assistant", "content": [text("left")]}, {"role": "user", "content": [text("Why?")]}],
    ]
    held = [{"bytes": (images / name).read_bytes(), "path": name} for name in (IMAGE, "b.png")]
    pq.write_table(pa.Table.from_pylist([{"images": some, "messages": said} for some, said in zip((held[:1], [], held), messages_of, strict=True)]), images / "c.parquet")
    source = DataConfig(path=images / "c.parquet").open().source
    samples = [source[i] for i in range(3)]
    assert [len(sample.images) for sample in samples] == [1, 0, 2]
    assert asked(samples[2]) == [("left or", ("left",), (), ((0, 5), (0, 7))), ("Why?", (), (("user", "left or"), ("assistant", "left")), ((0, 5), (0, 7)))]
    write_parquet(source, images / "again.parquet")
    again = DataConfig(path=images / "again.parquet").open().source
    assert [again[i] for i in range(3)] == samples
    write_shards([samples[0], samples[2]], images / "shards")
    assert [ShardSource(images / "shards")[i] for i in range(2)] == [samples[0], samples[2]]
    with pytest.raises(BudgetError, match="1 no image"):
        write_shards(source, images / "not")


def test_turns_at_the_ends_that_nothing_is_learnt_from(images: Path) -> None:
    """An assistant's first is left out, a user's last is a question without an answer."""
    turns = [("gpt", "Hello!"), ("human", "<image>What?"), ("gpt", "a square"), ("human", "Why?")]
    data = opened(images, {"image": IMAGE, "conversations": [{"from": role, "value": words} for role, words in turns]})
    assert [(q.text, q.answers, len(q.turns)) for q in data.source[0].questions] == [("What?", ("a square",), 0), ("Why?", (), 2)]
    assert (data.problems, data.source[0].captions) == ((), ())


TWO = "<image><image>which?"


@pytest.mark.parametrize(
    "turns, reason, message",
    [([("user", TWO), ("assistant", "x")], "image count", r"has 2 places for images \(<image> in the user's texts, or parts\) and 1 image; expected one for each"),
     ([("king", "<image>x"), ("assistant", "x")], "unknown role", "turn 0 has the role 'king'; expected one of user, human, assistant"),
     ([("user", "<image>x"), ("user", "y"), ("assistant", "x")], "order of turns", "turn 1 comes after another of the user's; expected one of the assistant's"),
     ([("user", "x"), ("assistant", "x"), ("system", "y")], "order of turns", "turn 2 is the system's; expected one of the user's"),
     ([("assistant", "x")], "order of turns", "has no turn of the user's"),
     ([("user", "x"), ("assistant", " ")], "empty answer", "an answer of the assistant is empty"),
     ([("user", "x"), ("assistant", "x"), ("user", " "), ("assistant", "x")], "empty turn", "a turn of the user's is empty"),
     ([("user", [{"type": "video"}]), ("assistant", "x")], "damaged conversation", "turn 0 has the part {'type': 'video'}; expected type text with a text, image"),
     ([("user", [text("x")]), ("assistant", [{"type": "image"}])], "image count", "a turn of the assistant's holds an image; expected images in the user's turns"),
     ([("user", [{"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}])], "damaged conversation", "by an address, https://a.org/b.png; download it"),
     ([("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}])], "damaged conversation", "a data: URI whose base64 is damaged"),
     ([("user", 3)], "damaged conversation", "turn 0 holds 3; expected a text or a list of parts")],
)  # fmt: skip
def test_conversations_that_cannot_be_used_are_counted_with_file_and_line(turns: Sequence[tuple[str, Any]], reason: str, message: str, images: Path) -> None:
    wrong = {"image": IMAGE, "messages": [{"role": role, "content": content} for role, content in turns]}
    data = opened(images, exchange("<image>What?", "a square", image="b.png"), {"image": IMAGE, "messages": wrong["messages"], "conversations": wrong["messages"]})
    (bad,) = data.problems
    assert bad.reason == reason
    assert bad.detail.startswith("c.jsonl, line 2")
    assert re.search(message, bad.detail), bad.detail


def test_a_data_set_of_such_conversations_alone_is_refused_and_others_name_their_lines(images: Path) -> None:
    wrong = {"messages": [{"role": role, "content": "x"} for role in ("user", "user")]}
    with pytest.raises(DataError, match=r"gives no sample; 1 sample cannot be used, the first because c.jsonl, line 1: turn 1 comes after another of the user's"):
        opened(images, wrong)
    problems = opened(images, exchange("Hello?", "hi", messages=None), {"conversations": wrong["messages"]}).problems
    with pytest.raises(BudgetError, match=r"1 bad sample, and at most 0 are allowed: 1 order of turns \(c.jsonl, line 2\)"):
        BadSamples(budget=0, found=problems).check()


@pytest.mark.parametrize(
    "name, whole, message",
    [("c.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n{"mess', r"c.jsonl, line 2: .* is not JSON"),
     ("c.json", '[{"messages": [{"role": "user", "content": "x"}]},\n{"mess', "is not JSON at row 1, line 2"),
     ("c.jsonl", '{"image": "../a.png", "messages": [{"role": "user", "content": "x"}]}', "names the image '../a.png'; expected a file name inside")],
)  # fmt: skip
def test_damaged_files_are_refused_with_the_line(name: str, whole: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(whole)
    with pytest.raises(AdalinkError, match=message):
        DataConfig(path=tmp_path / name).open()
