"""The metrics of texts equal scikit-learn's and scipy's, and the metrics of resampled items equal those of items that are there as often."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from shared import fixtures, shared

from adalink.errors import ConfigError
from multimodal.batches.collate import collate
from multimodal.batches.tokenize import TextRowEncoder
from multimodal.language import load_language
from multimodal.template import TextTemplate
from tasks.data.text import open_glue
from tasks.metrics.bootstrap import Resampling, intervals
from tasks.metrics.text import CLASS_METRICS, NUMBER_METRICS, classes_of, resampled_metrics, text_metrics

KINDS = {"mcc": ("matthews_correlation", "accuracy"), "f1": ("f1", "accuracy"), "acc": ("accuracy", "macro_f1"), "corr": ("pearson", "spearmanr")}


def reference() -> Any:
    return json.loads((fixtures("text_tasks") / "metrics_dev.json").read_text())


def test_every_case_equals_the_reference_and_what_is_undefined_stays_so() -> None:
    cases = reference()["cases"]
    assert len(cases) > 30
    for case in cases:
        found = text_metrics(KINDS[case["kind"]], case["predictions"], case["references"])
        assert set(found) == set(case["expected"])
        for name, wanted in case["expected"].items():
            assert (found[name] is None) == (wanted is None), case["name"]
            assert wanted is None or found[name] == pytest.approx(wanted, abs=1e-12), (case["name"], name)


def test_an_answer_that_names_no_label_counts_as_the_other_one() -> None:
    case = reference()["unlisted"]
    given = classes_of(case["predictions"], case["references"], 2)
    assert case["predictions"].count(None) == case["n_unlisted"]
    assert text_metrics(list(case["expected"]), given, case["references"]) == pytest.approx(case["expected"], abs=1e-12)
    assert classes_of([None, 2], [0, 2], 3).tolist() == [-1, 2]
    assert text_metrics(["accuracy", "macro_f1"], classes_of([None, 1, 2], [0, 1, 2], 3), [0, 1, 2]) == {"accuracy": 2 / 3, "macro_f1": 2 / 3}


def test_resampled_metrics_are_those_of_items_that_are_there_as_often() -> None:
    rng = np.random.default_rng(0)
    often = rng.integers(0, 3, (4, 40))
    for names, draw in ((list(CLASS_METRICS), lambda: rng.integers(0, 3, 40)), (list(NUMBER_METRICS), lambda: rng.integers(0, 6, 40) / 5)):
        given, wanted = draw(), draw()
        found = resampled_metrics(names, given, wanted).of(often.astype(np.float64))
        for row, counts in zip(found, often, strict=True):
            plain = text_metrics(names, np.repeat(given, counts), np.repeat(wanted, counts))
            assert row == pytest.approx([100 * float(plain[name] or np.nan) for name in names], abs=1e-9)


def test_an_interval_leaves_out_draws_in_which_a_correlation_is_undefined() -> None:
    metrics = resampled_metrics(["pearson"], [0.0, 1.0, 0.5], [0.0, 2.0, 1.5])
    interval = intervals(metrics, Resampling(n_resamples=200))["pearson"]
    assert np.isfinite([interval.low, interval.high]).all()
    assert np.isnan(metrics.of(np.array([[3.0, 0.0, 0.0]]))).all()


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no metric 'bleu' for texts: give some of accuracy, f1"):
        text_metrics(["bleu"], [0], [0])


@pytest.mark.slow
def test_a_real_models_mean_pooled_cosine_gives_its_published_spearman_on_sts_b() -> None:
    """MiniLM on the test set of STS-B: 82.03, through this project's rows, model and metric."""
    language = load_language(shared("parts/minilm_l6"), dtype=torch.float32, use="read")
    source = open_glue(shared("data/stsb"), "test")
    questions = [source[i].questions[0] for i in range(len(source))]
    encoder = TextRowEncoder(TextTemplate(), language, [], 1)
    texts = sorted({text for one in questions for text in (one.text, one.pair)}, key=len)
    vectors: dict[str, torch.Tensor] = {}
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        rows = [encoder.prompt(text) for text in part]
        batch = collate(rows, [0] * len(rows), torch.zeros(1, 0, 0), kind="patches", side="right", pad_id=encoder.placeholder)
        with torch.no_grad():
            state = language.model(input_ids=batch.ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask[..., None]
        vectors |= dict(zip(part, torch.nn.functional.normalize((state * mask).sum(1) / mask.sum(1), dim=1), strict=True))
    cosines = [float(vectors[one.text] @ vectors[one.pair]) for one in questions]
    found = text_metrics(["spearmanr"], cosines, [float(one.answers[0]) for one in questions])["spearmanr"]
    assert found == pytest.approx(0.8203, abs=5e-5)
    shuffled = text_metrics(["spearmanr"], cosines[1:] + cosines[:1], [float(one.answers[0]) for one in questions])["spearmanr"]
    assert shuffled is not None
    assert shuffled < 0.5  # the control
