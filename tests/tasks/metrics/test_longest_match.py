from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics.ptb.patterns import Scanner

# In lower case and without case, so that `re` reads them alike.
PATTERNS = ["ab", "(a|ab)(c|bcd)?", "a*b+", "[ab]{2,3}c?", "c(ab)*", "[^ab]{2}", "(a|b|c){4,}", "a?b{0}c", "(ab|)c{2}", "[]"]


@given(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=5), st.text("abcd", max_size=9))
@settings(max_examples=500)
def test_the_longest_match_wins_and_the_first_of_equal_ones(patterns: list[str], text: str) -> None:
    lengths = {}
    for index, pattern in enumerate(patterns):
        fitting = [n for n in range(1, len(text) + 1) if pattern != "[]" and re.fullmatch(pattern, text[:n])]
        if fitting:
            lengths[index] = max(fitting)
    best = max(lengths.values(), default=0)
    expected = min((index for index, n in lengths.items() if n == best), default=-1)
    assert Scanner(patterns).scan(text, 0)[:2] == (expected, best)


def test_letters_match_in_either_case_and_classes_as_written() -> None:
    scanner = Scanner(["us", "[u][k]"])
    assert [scanner.scan(text, 0)[0] for text in ("us", "US", "\u017fx", "u\u017f", "uk", "UK", "u\u212a")] == [0, 0, -1, 0, 1, -1, -1]


@pytest.mark.parametrize(
    ("text", "begin", "found"),
    [
        ("abx", 0, (0, 2, 3)),  # the x had to be read: "abc" would have been longer
        ("ab", 0, (0, 2, 3)),  # more text could make it longer
        ("abc", 0, (0, 3, 3)),  # nothing could
        ("xab ", 1, (0, 3, 4)),
        ("b", 0, (-1, 0, 1)),
    ],
)
def test_a_match_says_how_far_it_had_to_read(text: str, begin: int, found: tuple[int, int, int]) -> None:
    assert Scanner(["abc?"]).scan(text, begin) == found


def test_all_ends_of_a_pattern_are_found() -> None:
    assert Scanner(["a(ba)*b?"]).ends("xababab", 1, 6) == [2, 3, 4, 5, 6]
