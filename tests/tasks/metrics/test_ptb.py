from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared import fixtures

from tasks.metrics.ptb.tokenizer import tokenize_captions
from tasks.metrics.ptb.words import lower


def tokenize(caption: str) -> list[str]:
    """The words of a caption that another one follows."""
    return tokenize_captions([caption, "x"])[0]


def tokenize_last(caption: str) -> list[str]:
    """The words of the only caption of a file."""
    return tokenize_captions([caption])[0]


def files() -> list[Path]:
    return sorted(fixtures("tokenizer").glob("*.json"))


def cases(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["cases"])


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_every_recorded_caption_has_the_words_of_the_java_tokenizer(path: Path) -> None:
    wrong = [(case["raw"], " ".join(tokenize(case["raw"])), case["ptb"]) for case in cases(path) if " ".join(tokenize(case["raw"])) != case["ptb"]]
    assert wrong == []


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_the_last_caption_of_a_file_has_the_words_of_the_java_tokenizer(path: Path) -> None:
    expected = {case["raw"]: case.get("ptb_alone", case["ptb"]) for case in cases(path)}
    assert {raw: " ".join(tokenize_last(raw)) for raw in expected} == expected


# Each line was given to the Java tokenizer (stanford-corenlp-3.4.1, -preserveLines -lowerCase) with another line after it.
@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's bed.", "a dog 's bed"),
        ("I cannot, he's gonna; 'tis wanna lemme", "i can not he 's gon na 't is wan na lem me"),
        ("don't they've shouldn't've", "do n't they 've should n't 've"),
        ("co\u00adop \u00ad", "coop"),
        ("Plan A. The dog", "plan a the dog"),
        ("Plan A. Dogs", "plan a. dogs"),
        ("Acme Inc. sells U.S. cars, etc.", "acme inc. sells u.s. cars etc."),
        ("see fig. 3 and a fig. tree", "see fig. 3 and a fig tree"),
        ("2 1/2 \u00bd 1,000.50 10:30 5km/h", "2\u00a01/2 1/2 1,000.50 10:30 5km/h"),
        ("$5 \u20ac5 \u00a35 \u00a2", "$ 5 $ 5 # 5 cents"),
        ("call (555) 123-4567", "call -lrb-555-rrb-\u00a0123-4567"),
        ("http://a.com/b?c www.x.com foo@bar.com @me #tag", "http://a.com/b?c www.x.com foo@bar.com @me #tag"),
        ("<b class='x y'>bold</b> &lt;x&gt; &amp;", "<b\u00a0class='x\u00a0y'> bold </b> < x > &"),
        ("well-known 'n' O'Brien o'clock y'all", "well-known 'n' o'brien o'clock y' all"),
        ("-- --- ---- ----- . . . \u2026 \u2014", "-----"),
        ("[a] {b} (c) :) :-( ^_^", "-lsb- a -rsb- -lcb- b -rcb- -lrb- c -rrb- :-rrb- :--lrb- ^_^"),
        ("AT&T R&B S&P-500 C++ c# f#", "at&t r&b s&p-500 c++ c# f#"),
        ("\U0001f600 \u6771\u4eac na\u00efve \uff21\uff22 \u0130stanbul", "\u6771\u4eac na\u00efve \uff41\uff42 i\u0307stanbul"),
        ("\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03a3 A3\u03a3", "\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 a3\u03c2"),
        ("foo@\U0001f600", "foo@\U0001f600"),
        ("it. is  a.. dog ...", "it is a. dog"),
        ("one\rtwo", "one"),
        ("one\ntwo\tthree\u00a0four", "one two three four"),
    ],
)
def test_words_are_those_of_the_java_tokenizer(caption: str, words: str) -> None:
    assert " ".join(tokenize(caption)) == words


# Each file was given to the Java tokenizer as pycocoevalcap 1.2 does it: captions joined by newlines, none at the end.
@pytest.mark.parametrize(
    ("captions", "words"),
    [
        # An acronym ends its sentence where the next line, however far down, opens one.
        (["a street sign that reads K.", "A sign."], ["a street sign that reads k", "a sign"]),
        (["a street sign that reads K.", "a sign."], ["a street sign that reads k.", "a sign"]),
        (["a sign that reads K.", "A"], ["a sign that reads k.", "a"]),
        (["a sign that reads K."], ["a sign that reads k."]),
        (["near 12th Ave S.", "", "", "The corner"], ["near 12th ave s", "", "", "the corner"]),
        (["near 12th Ave S. ", "\tThe corner of it"], ["near 12th ave s", "the corner of it"]),
        (["on CTH D.", "Mr. Smith"], ["on cth d", "mr. smith"]),
        (["on CTH D.", "Mr."], ["on cth d.", "mr."]),
        (["plan B.", "<b> bold"], ["plan b", "<b> bold"]),
        (["plan B.", "You"], ["plan b.", "you"]),
        (["plan B.", "Your dog"], ["plan b.", "your dog"]),
        (["K.", "The\u00a0dog"], ["k", "the dog"]),
        (["A.B.", "The dog"], ["a.b.", "the dog"]),
        # An abbreviation before a number.
        (["see fig.", "7 dogs"], ["see fig.", "7 dogs"]),
        (["see fig.", "seven dogs"], ["see fig", "seven dogs"]),
        (["see no.", " 7"], ["see no", "7"]),
        # The end of the file, or a last line that is empty.
        (["a dog, etc.", ""], ["a dog etc.", ""]),
        (["a dog, etc.9"], ["a dog etc. .9"]),
        (["a dog, etc.9", ""], ["a dog etc. 9", ""]),
        (["a dog, etc.99"], ["a dog etc. 99"]),
        (["so you're"], ["so you re"]),
        (["so you're", ""], ["so you 're", ""]),
        (["they'll"], ["they ll"]),
        (["we've"], ["we ve"]),
        (["he's"], ["he 's"]),
        (["in '90"], ["in 90"]),
        (["in '90", ""], ["in '90", ""]),
        ([":-)"], ["-rrb-"]),
        (["smile :-)", ""], ["smile :--rrb-", ""]),
        ([""], [""]),
        (["", ""], ["", ""]),
        # A tag that reaches over lines.
        (["<a b='c d", "e f'> g", "h"], ["<a\u00a0b='c\u00a0d", "e\u00a0f'> g", "h"]),
        (["<a b='", "", "S.", "c'> d", "The x"], ["<a\u00a0b='", "", "s.", "c'> d", "the x"]),
        (['<a b="c', "d"], ["< a b = c", "d"]),
    ],
)
def test_a_file_of_captions_has_the_words_of_the_java_tokenizer(captions: list[str], words: list[str]) -> None:
    assert [" ".join(found) for found in tokenize_captions(captions)] == words


def test_a_line_break_inside_a_caption_ends_it_and_moves_no_other() -> None:
    assert tokenize_captions(["one\rtwo", "K.\rThe dog", "three"]) == [["one"], ["k"], ["three"]]


def test_no_captions_have_no_words() -> None:
    assert tokenize_captions([]) == []


@given(st.text())
@example("\ud800 \udfff a@\ud83d")
@example("<a b='" + "(" * 50)
@example("\0")
def test_tokenizing_never_fails_on_any_text(text: str) -> None:
    for words in (tokenize(text), tokenize_last(text)):
        assert all(word == word.lower() or "\u0130" in text for word in words)


PIECES = ["it.", "1", "1/2", "A.", "The", "fig.", "<b", "x='y'>", "don't", "...", "\u00a0", "2", "(555)", "123-4567", "co.", "ltd", "a", "dog", "inc.", "."]


@given(st.lists(st.sampled_from(PIECES), max_size=8))
@settings(max_examples=300)
def test_words_found_chunk_by_chunk_are_those_of_the_whole_caption(pieces: list[str]) -> None:
    # A mark that is left out separates the last word from the end, so both ways must agree; only the first way remembers chunks.
    caption = " ".join([*pieces, "dog", ","])
    assert tokenize(caption) == tokenize_last(caption)


def test_a_long_caption_without_a_space_takes_no_more_than_linear_time() -> None:
    assert tokenize("x" * 100_000) == ["x" * 100_000]


def test_a_tag_that_never_ends_takes_no_more_than_linear_time() -> None:
    assert tokenize("<a" + " b" * 20_000) == ["<", "a", *["b"] * 20_000]
    assert tokenize("<a " + "b " * 300 + "c='d e'>") == ["<a\u00a0" + "b\u00a0" * 300 + "c='d\u00a0e'>"]


@pytest.mark.parametrize(("capital", "small"), [("B\u00bd\u03a3", "b\u00bd\u03c2"), ("K\u03a3\u2081s", "k\u03c3\u2081s"), ("b\ufeff\u03a3@1", "b\ufeff\u03c2@1")])
def test_a_capital_sigma_is_final_or_not_as_java_has_it(capital: str, small: str) -> None:
    assert lower(capital) == small
