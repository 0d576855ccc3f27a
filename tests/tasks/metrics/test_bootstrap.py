from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from adalink.errors import ConfigError, DataError
from tasks.metrics.bootstrap import Metrics, Resampling, answer_metrics, caption_metrics, intervals, paired_intervals
from tasks.metrics.captions import score_captions
from tasks.metrics.vqa import GradedQuestion, score_answers

WORDS = "a dog runs over green grass with red ball while two men look".split()


def captions(n: int, seed: int) -> dict[int, str]:
    generator = np.random.default_rng(seed)
    return {image: " ".join(generator.choice(WORDS, 8)) for image in range(n)}


def references(n: int) -> dict[int, list[str]]:
    return {image: [text, captions(n, 8)[image]] for image, text in captions(n, 7).items()}


def questions(n: int) -> list[GradedQuestion]:
    kinds = ("yes/no", "number", "other")
    return [
        GradedQuestion(question_id=i, answers=("yes",) * (i % 5) + ("no",) * (10 - i % 5), question_type=f"q{i % 4}", answer_type=kinds[i % 3])
        for i in range(n)
    ]


def answers(n: int, seed: int) -> dict[int, str]:
    generator = np.random.default_rng(seed)
    return dict(enumerate(generator.choice(["yes", "no", "maybe"], n).tolist()))


def test_with_every_item_once_the_figures_are_those_of_the_corpus() -> None:
    scores = score_captions(captions(40, 1), references(40))
    metrics = caption_metrics(scores)
    assert dict(zip(metrics.names, metrics.of(np.ones((1, 40)))[0], strict=True)) == pytest.approx(scores.corpus, abs=1e-12)
    asked = questions(60)
    graded = score_answers(answers(60, 1), asked)
    found = answer_metrics(graded, asked)
    expected = {"overall": graded.overall}
    expected |= {f"answer type: {name}": value for name, value in graded.per_answer_type.items()}
    expected |= {f"question type: {name}": value for name, value in graded.per_question_type.items()}
    assert dict(zip(found.names, found.of(np.ones((1, 60)))[0], strict=True)) == pytest.approx(expected, abs=1e-10)


def test_weights_are_the_same_as_repeated_images() -> None:
    hypotheses, refs = captions(12, 1), references(12)
    weights = np.array([2.0, 0.0, 1.0] * 4)
    metrics = caption_metrics(score_captions(hypotheses, refs))
    repeated = [image for image in range(12) for _ in range(int(weights[image]))]
    again = score_captions({k: hypotheses[i] for k, i in enumerate(repeated)}, {k: refs[i] for k, i in enumerate(repeated)})
    weighted = dict(zip(metrics.names, metrics.of(weights[None])[0], strict=True))
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L"):  # CIDEr's document frequencies are those of the whole corpus on purpose
        assert weighted[name] == pytest.approx(again.corpus[name], abs=1e-9)


def mean_of(values: Any) -> Metrics:
    return Metrics(names=("mean",), items=len(values), of=lambda weights: (weights @ values / weights.sum(1))[:, None])


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = intervals(mean_of(values), Resampling(n_resamples=4000))["mean"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_narrower_level_gives_a_narrower_interval_inside_the_wider() -> None:
    values = np.random.default_rng(3).normal(5, 2, 100)
    wide, narrow = (intervals(mean_of(values), Resampling(level=level))["mean"] for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_finds_a_small_steady_difference_that_separate_intervals_hide() -> None:
    before = np.random.default_rng(3).normal(5, 2, 200)
    after = before + np.random.default_rng(4).normal(0.1, 0.1, 200)
    paired = paired_intervals(mean_of(before), mean_of(after), Resampling())["mean"]
    assert 0 < paired.low < 0.1 < paired.high + 0.05
    apart = [intervals(mean_of(values), Resampling())["mean"] for values in (before, after)]
    assert apart[1].low < apart[0].high


def test_a_run_does_not_differ_from_itself() -> None:
    metrics = caption_metrics(score_captions(captions(20, 1), references(20)))
    assert {(found.low, found.high) for found in paired_intervals(metrics, metrics, Resampling(n_resamples=50)).values()} == {(0.0, 0.0)}


def test_equal_seeds_give_equal_intervals_and_no_resamples_give_none() -> None:
    metrics = caption_metrics(score_captions(captions(20, 1), references(20)))
    first: Mapping[str, Any] = intervals(metrics, Resampling(n_resamples=50, seed=1))
    assert first == intervals(metrics, Resampling(n_resamples=50, seed=1)) != intervals(metrics, Resampling(n_resamples=50, seed=2))
    assert intervals(metrics, Resampling(n_resamples=0)) == {}


def test_a_type_that_a_resample_does_not_draw_is_left_out_of_that_resample() -> None:
    asked = [*questions(6), GradedQuestion(question_id=99, answers=("a",) * 10, answer_type="rare")]
    metrics = answer_metrics(score_answers({**answers(6, 1), 99: "a"}, asked), asked)
    found = intervals(metrics, Resampling(n_resamples=200))
    assert (found["answer type: rare"].low, found["answer type: rare"].high) == (100, 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n_resamples": -1}, "number of resamples is -1; give 0"), ({"level": 95.0}, "level of the intervals is 95.0; give a share")],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Resampling(**settings)


def test_runs_of_other_items_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="cannot be paired: 1 metrics of 3 items, and 1 of 4"):
        paired_intervals(mean_of(np.ones(3)), mean_of(np.ones(4)), Resampling())
