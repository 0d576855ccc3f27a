"""`adalink data look`: what it counts and names, on a small data set with one of each thing that is wrong."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, adalink, refused
from PIL import Image

from multimodal.sample import Question
from tasks.data.look.facts import Facts, Oddity, listed, oddities, the_oddest
from tasks.data.look.page import chosen_samples
from tasks.data.look.scan import ImageFile, Seen, spread_over

ROWS = [
    ("a.png", "a red square"), ("a.png", "a square"), ("b.png", "a square"), ("same.png", "a square"), ("wide.png", "a <b>line</b> of light"),
    ("named.jpg", "a green square"), ("broken.png", "a square"), ("none.png", "a square"), ("b.png", " "),
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """captions.csv with its images, and val.csv, which has an image of the other."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size, colour in (("a.png", (8, 8), "red"), ("b.png", (8, 8), "blue"), ("wide.png", (96, 4), "white"), ("v.png", (8, 8), "black")):
        Image.new("RGB", size, colour).save(folder / name)
    Image.new("RGB", (8, 8), "green").save(folder / "named.jpg", "PNG")
    (folder / "same.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "val.png").write_bytes((folder / "b.png").read_bytes())
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:20])
    for name, rows in (("captions.csv", ROWS), ("val.csv", [("v.png", "night"), ("val.png", "a square")])):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("file", "caption"), *rows])
    return tmp_path


def look(*options: object) -> Done:
    """The command, in this process alone."""
    return adalink("data", "look", "captions.csv", "--images", "images", "--workers", "0", *options)


def row(done: Done, name: str) -> list[str]:
    """The cells of a table's first row of this name."""
    line = next(line for line in done.out.splitlines() if line.startswith(f"  {name}  "))
    return re.split(r" {2,}", line.strip())[1:]


def entries(path: Path) -> list[dict[str, Any]]:
    """What a page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="entries">(.*?)</script>', path.read_text(), flags=re.DOTALL)
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_every_part_is_counted_and_named(data: Path) -> None:
    done = look("--val", "{path: val.csv, images: images}", "--language_model", "scenes:language")
    assert (done.code, done.err) == (0, "")
    assert "captions.csv is read as a" in done.out
    assert "image: file, caption: caption" in done.out
    assert row(done, "images") == ["6"]
    assert row(done, "captions")[:2] == ["7", "1 to 2 for each image, 1.2 in the mean"]
    assert row(done, "missing file") == ["1", "captions.csv, line 9: images/none.png is missing"]
    assert row(done, "truncated")[0] == "1"
    assert "captions.csv, line 8: images/broken.png" in row(done, "truncated")[1]
    assert row(done, "empty caption")[1].startswith("captions.csv, line 10: ")
    assert row(done, "width, pixels") == ["8", "8", "25.6", "78.4", "96"]
    assert "Kinds: 5 png." in done.out
    assert "1 image of another kind than the file's ending, such as a png that ends in .jpg" in done.out
    assert row(done, "captions, characters")[0] == "8"
    assert row(done, "captions, tokens")[-1].isdigit()
    assert "Equal bytes: a.png, same.png." in done.out
    assert "'a square' at 4 (66.7 % of the images)" in done.out
    assert "1 sample of this set with an image that is in val too (this = val): b.png = val.png." in done.out
    assert "wide image: 96 x 4 pixels" in done.out
    assert "markup in a text: '<b>'" in done.out
    marks = {entry["k"]: entry["m"] for entry in entries(data / "look.html")}
    assert marks == {
        "a.png": ["duplicate"], "b.png": ["val"], "same.png": ["duplicate"], "wide.png": ["odd"], "named.jpg": [], "broken.png": ["problem"], "none.png": ["problem"],
    }  # fmt: skip


def test_a_part_of_a_large_set_is_looked_at_and_the_sentence_says_so(data: Path) -> None:
    done = look("--samples", 3, "--page_samples", 2)
    assert "3 of 6 samples were looked at, evenly spread" in done.out
    assert len([entry for entry in entries(data / "look.html") if entry["n"] >= 0]) == 2
    assert "2 of 6 samples are on this page" in (data / "look.html").read_text()
    assert list(spread_over(10, 4)) == [0, 2, 5, 7]
    assert list(spread_over(3, 0)) == [0, 1, 2]
    many = list(spread_over(10_000, 1700))
    assert (many[:3], many[16], many == sorted(set(many)), many[-1] < 10_000) == ([0, 1, 2], 10_000 // 106, True, True)


def test_no_page_is_written_where_none_is_wanted_and_none_over_another_file(data: Path) -> None:
    assert look("--page_samples", 0).code == 0
    assert not (data / "look.html").exists()
    (data / "look.html").write_text("<p>mine</p>")
    assert refused(look()) == "look.html is there already, and no page of `adalink data look`: give another path to --out"
    assert (data / "look.html").read_text() == "<p>mine</p>"
    assert look("--out", "other.html").code == look("--out", "other.html").code == 0


def test_what_is_wrong_with_the_arguments_is_one_sentence(data: Path) -> None:
    assert "language_model and model were given" in refused(look("--language_model", "scenes:language", "--model", "x"))
    assert "samples is -1" in refused(look("--samples", -1))
    assert "there is no setting tokens" in refused(look("--tokens", "x"))
    assert "nothing.csv does not exist" in refused(adalink("data", "look", "nothing.csv"))
    assert "needs one of path" in refused(adalink("data", "look"))


def test_answers_are_counted_and_the_embedded_set_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = adalink("data", "look", "--scenes", "val/6", "--workers", "0")
    assert done.code == 0
    assert "scenes val/6 (6 images)" in done.out
    assert "different answers to" in done.out
    assert "share" in done.out
    assert all(entry["q"] and entry["i"] for entry in entries(tmp_path / "look.html"))


# ----------------------------------------
# The score.


def made(number: int, *, size: tuple[int, int] = (640, 480), text: str = "", answer: str = "") -> Seen:
    """A sample as a look finds it."""
    image = ImageFile(kind="jpg", width=size[0], height=size[1], size=1000, digest=str(number))
    questions = (Question(question_id=number, text="what is it?", answers=(answer,)),) if answer else ()
    return Seen(number=number, key=str(number), images=(image,), captions=(text or "a dog runs over the green grass",), questions=questions)


def reasons(*odd: Seen, answers: dict[str, int] | None = None) -> dict[int, Oddity]:
    """Number -> what is odd, among fifty that are usual."""
    usual = [made(number, answer="green" if number % 2 else "") for number in range(100, 150)]
    return {one.number: one for one in oddities([*usual, *odd], {"green": 25, **(answers or {})}) if one.score >= 3}


def test_each_oddity_has_its_reason_and_usual_samples_have_none() -> None:
    found = reasons(
        made(0, size=(1, 1)), made(1, size=(6400, 48)), made(2, text="dog"), made(3, text="a dog runs over the grass " * 30), made(4, size=(9000, 7000)),
        made(5, text="zymurgy quaffs xebecs wryly"), made(6, text="a dog &amp; grass, over the green grass"), made(7, size=(700, 480)), made(8, answer="7"),
        answers={"7": 1},
    )  # fmt: skip
    assert {number: one.reasons[0] for number, one in found.items()} == {
        0: "small image: 1 x 1 pixels (usual: about 554 x 554)",
        1: "wide image: 6400 x 48 pixels",
        2: "short text: 'dog', 3 characters (usual shortest: 31)",
        3: "long text: 780 characters (usual longest: 31)",
        4: "large image: 9000 x 7000 pixels (usual: about 554 x 554)",
        5: "4 words that no other sample has: zymurgy, quaffs, xebecs, wryly",
        6: "markup in a text: '&amp;'",
        8: "an answer seen once: '7'",
    }
    assert found[0].score > found[1].score > found[2].score


def test_answers_seen_once_are_usual_where_many_are() -> None:
    many = [made(number, answer=str(number)) for number in range(20)]
    assert reasons(*many, answers={str(number): 1 for number in range(20)}) == {}


def test_the_ten_oddest_have_several_reasons_where_there_are_others() -> None:
    odd = [Oddity(number=k, score=20 - k, reasons=("x",), kind="a" if k < 11 else "b") for k in range(14)]
    assert [one.number for one in the_oddest(odd)] == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13]
    rest = [Oddity(number=k, score=1.5, reasons=("x",), kind="c") for k in range(14, 30)]
    assert [one.number for one in the_oddest([*odd[:6], *rest], most=7)] == [0, 1, 2, 3, 4, 5, 14]


def test_the_page_of_a_large_set_has_what_is_worth_a_look(data: Path) -> None:
    seen = [made(number) for number in range(100)] + [made(100, size=(1, 1))]
    seen += [Seen(number=number, key=str(number), images=seen[7].images, captions=("a dog",)) for number in (101, 102)]
    facts = Facts(sentence="", total=103, seen=seen, val={seen[9].images[0].digest: "v"})
    chosen = [one.number for one in chosen_samples(facts, 20)]
    assert len(chosen) == 20
    assert chosen == sorted(chosen)
    assert {7, 9, 100, 101, 102} <= set(chosen)


def test_a_set_of_one_image_is_named_by_its_first_keys() -> None:
    seen = [Seen(number=number, key=str(number), images=made(0).images, captions=("a dog",)) for number in range(3000)]
    duplicates = next(part for part in Facts(sentence="", total=3000, seen=seen).parts if part.name == "Duplicates")
    assert duplicates.notes == (
        "2,999 of 3,000 samples have an image whose bytes an earlier one has too.", "Equal bytes: 0, 1, 2, 3, 4, 5 and 2,994 more.",
    )  # fmt: skip
    assert "'a dog' at 3,000 (100.0 % of the images)" in duplicates.rows[1]
    assert (listed(["a", "b"]), listed(["a"], 5)) == ("a, b", "a and 4 more")


def test_conversations_about_several_images_and_none(data: Path) -> None:
    talks = [
        (["a.png", "b.png"], "<image><image>Which is red?", "The first."), (["wide.png"], "<image>What is it?", "A line &amp; nothing else."), ([], "How are you?", "Well."),
    ]  # fmt: skip
    with (data / "talks.jsonl").open("w") as file:
        for images, asked, answer in talks:
            messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    done = adalink("data", "look", "talks.jsonl", "--images", "images", "--workers", "0")
    assert done.code == 0, done
    assert row(done, "samples") == ["3"]
    assert row(done, "images") == ["3", "0 to 2 for each sample, 1.0 in the mean"]
    assert "markup in a text: '&amp;'" in done.out
    found = entries(data / "look.html")
    assert [len(entry["i"]) for entry in found] == [2, 1, 0]
    assert found[0]["q"][0][2] == [["system", "Be short."]]
    assert adalink("data", "check", "talks.jsonl", "--images", "images", "--workers", "0").code == 0
