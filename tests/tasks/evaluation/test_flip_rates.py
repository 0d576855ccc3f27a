"""Flips: counts, rates and intervals against reference computations and by hand, by type, of several runs, and the limit that a script gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Write, adalink, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from shared import fixtures_root

from adalink.errors import ConfigError, ScoreError
from tasks.evaluation.compare import compare_answers
from tasks.evaluation.flip_rates import FlipRates, Pair, counts_of, flip_rates, nfr_matrix
from tasks.metrics.bootstrap import Resampling
from tasks.metrics.vqa import GradedQuestion

FILES = sorted((fixtures_root() / "muscle").glob("*.json"))
FEW = Resampling(n_resamples=200)


def pairs_of(before: Any, after: Any, same: Any = None) -> list[Pair]:
    same = np.ones(len(before)) if same is None else same
    return [Pair(item=i, said_before="a", said_after="a" if same[i] else "b", before=float(before[i]), after=float(after[i])) for i in range(len(before))]


@pytest.mark.skipif(not FILES, reason="development data does not travel with the repository")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_rate_of_the_reference_computation(path: Path) -> None:
    described, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    wanted = described["flips"]
    found = flip_rates(pairs_of(tensors["flips.before"], tensors["flips.after"], tensors["flips.same_text"]), described["right_from"], resampling=FEW)
    own = found.counts
    ours = {
        "right_right": own.right_right, "right_wrong": own.right_wrong, "wrong_right": own.wrong_right, "wrong_wrong": own.wrong_wrong,
        "negative_flip_rate": own.negative, "positive_flip_rate": own.positive, "inconsistency": own.inconsistent, "wrong_both_other_text": own.other_words,
        "relative_negative_flips": own.relative_negative, "observed_over_independent": own.observed_over_independent, "graded_loss": found.loss,
        "graded_gain": found.gain, "share_with_graded_loss": found.lost_share,
    }  # fmt: skip
    assert ours == pytest.approx(wanted, abs=1e-14)
    assert set(ours) == set(wanted)


@given(st.lists(st.tuples(st.sampled_from([0.0, 30.0, 60.0, 100.0]), st.sampled_from([0.0, 30.0, 60.0, 100.0]), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rates_and_losses_differ_by_what_accuracies_and_means_differ(rows: list[tuple[float, float, bool]]) -> None:
    before, after, same = (np.array(column, float) for column in zip(*rows, strict=True))
    found = flip_rates(pairs_of(before, after, same), 50, resampling=Resampling(n_resamples=0))
    assert found.counts.positive - found.counts.negative == pytest.approx((after >= 50).mean() - (before >= 50).mean(), abs=1e-15)
    assert found.gain - found.loss == pytest.approx(after.mean() - before.mean(), abs=1e-13)
    assert found.counts.n == len(rows)
    assert found.intervals == {}


def test_a_table_made_by_hand_and_runs_that_are_the_same() -> None:
    before, after = [100] * 6 + [0] * 4, [100] * 4 + [0, 30] + [60, 0, 0, 0]
    own = counts_of(pairs_of(before, after, [1] * 8 + [0, 1]), 50)
    assert (own.right_right, own.right_wrong, own.wrong_right, own.wrong_wrong, own.other_words) == (4, 2, 1, 3, 1)
    assert (own.negative, own.positive, own.inconsistent, own.by_chance) == (0.2, 0.1, 0.3, 0.3)
    assert own.observed_over_independent == pytest.approx(0.2 / 0.3)
    found = flip_rates(pairs_of(before, after), 50, margin=50.0, resampling=FEW)
    assert (found.loss, found.gain, found.lost_share) == (17.0, 6.0, 0.2)
    assert flip_rates(pairs_of(before, after), 50, margin=70.0, resampling=FEW).lost_share == 0.1  # the one that fell to 30 lost 70, no more
    low, high = found.intervals["negative flip rate"].low, found.intervals["negative flip rate"].high
    assert low < 0.2 < high
    same = flip_rates(pairs_of(before, before), 50, resampling=FEW)
    assert (same.counts.negative, same.counts.positive, same.counts.inconsistent, same.loss, same.gain, same.lost_share) == (0,) * 6
    assert {(interval.low, interval.high) for interval in same.intervals.values()} == {(0.0, 0.0)}
    perfect = counts_of(pairs_of([100, 100], [100, 100]), 50)
    assert (perfect.observed_over_independent, perfect.relative_negative) == (None, None)


def test_case_and_spaces_are_no_other_words() -> None:
    assert not Pair(item=1, said_before="A red  ball", said_after="a red ball ", before=0, after=0).has_other_words
    assert Pair(item=1, said_before="a red ball", said_after="a red cube", before=0, after=0).has_other_words


def planted(n_lost: int = 20) -> tuple[dict[int, str], dict[int, str], list[GradedQuestion]]:
    """Answers of two runs to 120 questions of three types, of which the second lost some of one type and won as many of another."""
    asked = [
        GradedQuestion(question_id=i, answers=("yes",) * 10, question_type=("how many", "what is", "is it")[i % 3], answer_type="other") for i in range(120)
    ]
    before = {i: "no" if i % 3 == 2 else "yes" for i in range(120)}
    lost = [i for i in range(120) if i % 3 == 1][:n_lost]
    won = [i for i in range(120) if i % 3 == 2][:n_lost]
    return before, before | dict.fromkeys(lost, "no") | dict.fromkeys(won, "yes"), asked


def test_a_type_that_lost_answers_comes_first_though_the_accuracy_is_equal() -> None:
    before, after, asked = planted()
    found = compare_answers(before, after, asked, resampling=FEW)
    assert found.differences[0].before == found.differences[0].after
    assert list(found.rates.by_type)[:2] == ["question type: what is", "answer type: other"]  # as many: the greater share first
    assert found.rates.by_type["question type: what is"].right_wrong == 20
    assert found.rates.by_type["question type: how many"].right_wrong == 0
    assert sum(counts.right_wrong for name, counts in found.rates.by_type.items() if name.startswith("question")) == 20
    untyped = compare_answers(before, after, [GradedQuestion(question_id=q.question_id, answers=q.answers) for q in asked], resampling=FEW)
    assert untyped.rates.by_type == {}


def test_the_limit_goes_by_the_lower_end_unless_the_rate_itself_is_asked_for() -> None:
    before, after, asked = planted()
    rates: FlipRates = compare_answers(before, after, asked, resampling=FEW).rates
    low = rates.intervals["negative flip rate"].low
    assert 0.05 < low < 20 / 120
    with pytest.raises(ScoreError, match=r"20 of 120 items went from right to wrong, most of them question type: what is \(20\): a negative flip rate of 16.67 %"):
        rates.check(low - 1e-9)
    rates.check(low)  # the rate is above it, and not surely so
    with pytest.raises(ScoreError):
        rates.check(low, by_estimate=True)
    rates.check(20 / 120, by_estimate=True)
    for wrong in (-0.1, 2, float("nan")):
        with pytest.raises(ConfigError, match="give a share from 0 to 1"):
            rates.check(wrong)
    with pytest.raises(ConfigError, match="has no interval to judge"):
        compare_answers(before, after, asked, resampling=Resampling(n_resamples=0)).rates.check(0.1)


def test_a_script_gets_exit_code_3_after_the_whole_table(write: Write) -> None:
    before, after, asked = planted()
    annotations = [
        {"question_id": q.question_id, "question_type": q.question_type, "answer_type": "other", "answers": [{"answer": "yes", "answer_id": k} for k in range(10)]} for q in asked
    ]
    one, two = (write(name, [{"question_id": i, "answer": text} for i, text in run.items()]) for name, run in (("a.json", before), ("b.json", after)))
    files = ("--annotations", write("ann.json", {"annotations": annotations}), "--resamples", "100")
    done = adalink("compare", "vqa", "--before", one, "--after", two, *files, "--most-negative-flips", "0.02")
    assert done.code == 3
    assert re.fullmatch(r"adalink: 20 of 120 items went from right to wrong, .* at most 2 % was allowed: [^\n]*\n", done.err)
    assert re.search(r"^right to wrong +20 +16.67 +\d+\.\d\d \.\. \d+\.\d\d$", done.out, re.MULTILINE)
    assert "wrong in both, the same words     20       16.67\n" in done.out
    assert re.search(r"^question type: what is +40 +20 +0 +0$", done.out, re.MULTILINE)
    assert adalink("compare", "vqa", "--before", one, "--after", one, *files, "--most-negative-flips", "0").code == 0
    document = json.loads(adalink("compare", "vqa", "--before", one, "--after", two, *files, "--json", "--margin", "99").out)["flips"]
    assert document["counts"] == {"right_right": 60, "right_wrong": 20, "wrong_right": 20, "wrong_wrong": 20, "other_words": 0}
    assert document["graded"] == {"loss": pytest.approx(100 / 6), "gain": pytest.approx(100 / 6), "margin": 99, "lost_share": pytest.approx(1 / 6)}
    assert next(iter(document["by_type"])) == "question type: what is"
    assert "give a share from 0 to 1" in refused(adalink("compare", "vqa", "--before", one, "--after", two, *files, "--most-negative-flips", "2"))


def test_several_runs_differ_in_what_they_break() -> None:
    right = [frozenset[int | str]({1, 2, 3}), frozenset[int | str]({1, 2, 4}), frozenset[int | str]({4})]
    assert nfr_matrix(right, 4) == [[0, 0.25, 0.75], [0.25, 0, 0.5], [0.25, 0, 0]]
