from __future__ import annotations

import pytest

from adalink.errors import BudgetError, ConfigError
from multimodal.sample import BadSample, BadSamples


def test_a_budget_lets_exactly_its_number_pass() -> None:
    bad = BadSamples(budget=2)
    for key in ("a", "b"):
        bad.add(BadSample(key=key, reason="truncated"))
        bad.check()
    bad.add(BadSample(key="c", reason="missing file"))
    with pytest.raises(BudgetError, match=r"3 bad samples, and at most 2 are allowed: 2 truncated \(a, b\), 1 missing file \(c\); mend"):
        bad.check()


def test_no_budget_stops_at_the_first() -> None:
    BadSamples(budget=0).check()
    with pytest.raises(BudgetError, match="1 bad sample, and at most 0"):
        BadSamples(budget=0, found=[BadSample(key="a", reason="corrupt")]).check()


def test_reasons_are_counted_and_the_first_keys_of_each_are_kept() -> None:
    bad = BadSamples(budget=100, found=[BadSample(key=str(n), reason="even" if n % 2 == 0 else "odd") for n in range(13)])
    assert bad.counts == {"even": 7, "odd": 6}
    assert [one.key for one in bad.first["even"]] == ["0", "2", "4", "6", "8"]
    assert bad.summary() == "7 even (0, 2, 4, 6, 8, ...), 6 odd (1, 3, 5, 7, 9, ...)"


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget for bad samples is -1"):
        BadSamples(budget=-1)


def test_keys_with_control_characters_are_shown_escaped() -> None:
    assert BadSamples(budget=0, found=[BadSample(key="a\n\x1b[2J", reason="corrupt")]).summary() == r"1 corrupt ('a\n\x1b[2J')"


def test_a_file_is_named_beside_a_key_that_is_not_made_of_its_name() -> None:
    found = [BadSample(key=key, reason="truncated", file=file) for key, file in (("42", "val2014/COCO_42.jpg"), ("42", "42.jpg"), ("sub/a", "a.JPG"), ("7", ""))]
    assert BadSamples(budget=9, found=found).summary() == "4 truncated (42 val2014/COCO_42.jpg, 42, sub/a, 7)"
