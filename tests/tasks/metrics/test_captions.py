from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import fixtures

from adalink.errors import DataError
from tasks.metrics.bleu import bleu, bleu_sums
from tasks.metrics.captions import CaptionScores, score_captions, tokenized
from tasks.metrics.cider import cider
from tasks.metrics.ngrams import count_ngrams, cut_at_spaces
from tasks.metrics.rouge import rouge_l

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
NAMES = (*BLEU, "ROUGE_L", "CIDEr")


def documents() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(fixtures("captions").glob("*.json"))}


DOCUMENTS = documents()
CORPORA = [(name, which) for name, document in DOCUMENTS.items() if isinstance(document["sets"], dict) for which in document["sets"]]
EDGES = [(name, index) for name, document in DOCUMENTS.items() if isinstance(document["sets"], list) for index in range(len(document["sets"]))]


def corpus(images: Sequence[Mapping[str, Any]], recipe: str) -> Iterator[tuple[int, str, list[str]]]:
    """(image, hypothesis, references) as a set's recipe in the file says; a recipe that is not known here fails."""
    shifted = re.fullmatch(r"hyp of image k = (\w+) of image \(k\+(\d+)\) mod n, in the order of images", recipe)
    only = re.fullmatch(r"only images with (\w+)", recipe)
    plain = re.fullmatch(r"hyp=(\w+), refs=refs", recipe)
    for k, image in enumerate(images):
        refs = list(image["refs"])
        if recipe == "hyp=refs[0], refs=refs[1:]":
            yield image["image_id"], refs[0], refs[1:]
        elif shifted:
            yield image["image_id"], images[(k + int(shifted[2])) % len(images)][shifted[1]], refs
        elif (found := only or plain) is None:
            pytest.fail(f"unknown recipe: {recipe}")
        elif not only or image[found[1]] is not None:
            yield image["image_id"], image[found[1]], refs


def close(found: float, expected: float | None) -> bool:
    """To 1e-9; null in the files is NaN."""
    return math.isnan(found) if expected is None else abs(found - expected) <= 1e-9


@pytest.mark.parametrize(("name", "which"), CORPORA)
def test_every_figure_of_a_real_corpus_equals_the_official_one(name: str, which: str) -> None:
    document = DOCUMENTS[name]
    official = document["sets"][which]
    rows = list(corpus(document["images"], document["how_sets_are_made"][which]))
    assert len(rows) == official["n_images"]
    scores = score_captions({image: text for image, text, _ in rows}, {image: refs for image, _, refs in rows})
    assert [metric for metric in NAMES if not close(scores.corpus[metric], official["corpus"][metric])] == []
    wrong = [
        (image, metric, metrics[metric], official["per_image"][str(image)][metric])
        for image, metrics in scores.per_image.items()
        for metric in NAMES
        if not close(metrics[metric], official["per_image"][str(image)][metric])
    ]
    assert wrong == []


@pytest.mark.parametrize(("name", "index"), EDGES, ids=[f"{name}-{DOCUMENTS[name]['sets'][index]['name']}" for name, index in EDGES])
def test_every_figure_of_an_edge_corpus_equals_the_official_one(name: str, index: int) -> None:
    """Metric by metric, because the official code may fail in one and not in another; where it fails, so must we, with a sentence."""
    made = DOCUMENTS[name]["sets"][index]
    official = made["official"]
    hypotheses, references = dict(enumerate(made["hyps"])), dict(enumerate(made["refs"]))
    tokens = tokenized(hypotheses, references)
    assert [" ".join(words) for words in tokens.hypotheses] == official["ptb_hyps"]
    assert [[" ".join(words) for words in refs] for refs in tokens.references] == official["ptb_refs"]
    for metric, error in [(key.removeprefix("error_"), text) for key, text in official.items() if key.startswith("error_")]:
        assert metric == "CIDEr", f"the official {metric} failed with {error}, and here it does not"
        with pytest.raises(DataError):
            score_captions(hypotheses, references)
    words = cut_at_spaces(tokens)
    counts = count_ngrams(words)
    if "corpus_BLEU" in official:
        sums = bleu_sums(words, counts)
        whole = bleu(sums.correct.sum(0), sums.guess.sum(0), sums.length.sum(), sums.reference_length.sum())
        assert all(map(close, whole, official["corpus_BLEU"]))
        each = bleu(sums.correct, sums.guess, sums.length, sums.reference_length)
        assert all(close(each[i, n], value) for n, values in enumerate(official["per_image_BLEU"]) for i, value in enumerate(values))
    for metric, values in (("ROUGE_L", lambda: rouge_l(tokens)), ("CIDEr", lambda: cider(words, counts))):
        if f"corpus_{metric}" in official:
            assert close(float(np.mean(values())), official[f"corpus_{metric}"])
            assert all(map(close, values(), official[f"per_image_{metric}"]))


def test_an_unbreakable_space_is_one_word_for_rouge_and_two_for_the_others() -> None:
    # pycocoevalcap 1.2 gives these metrics.
    scores = score_captions({1: "2 1/2 dogs", 2: "a cat"}, {1: ["2 1/2 cats"], 2: ["a cat"]})
    assert scores.per_image[1]["ROUGE_L"] == pytest.approx(0.5, abs=1e-9)
    assert scores.per_image[1]["Bleu_1"] == pytest.approx(2 / 3, abs=1e-8)


# pycocoevalcap 1.2 gives these metrics.
@pytest.mark.parametrize(
    ("hypotheses", "references", "metrics"),
    [
        (
            ["a street sign that reads k", "two men play ball"],
            [["A street sign that reads K.", "A sign."], ["Two men play ball."]],
            {"Bleu_1": 0.9999999998, "Bleu_4": 0.9999999997, "ROUGE_L": 1.0, "CIDEr": 7.788941222},
        ),
        (
            ["a street sign that reads k", "two men play ball"],
            [["A sign.", "A street sign that reads K."], ["Two men play ball."]],
            {"Bleu_1": 0.8999999998, "Bleu_4": 0.8375922395, "ROUGE_L": 0.9621212121, "CIDEr": 7.195191222},
        ),
        (
            ["", "two men play", "a bus"],
            [["A dog."], ["Two men play ball."], ["A bus."]],
            {"Bleu_1": 0.5488116359, "Bleu_4": 0.0173549478, "ROUGE_L": 0.6118721461, "CIDEr": 3.6305574128},
        ),
        (["", ""], [["A dog."], ["Two men play ball."]], {"Bleu_1": 0.0, "ROUGE_L": 0.0, "CIDEr": 0.0}),
        (
            ["a dog", "I see you're"],
            [["A dog."], ["I see you're", "so we've"]],
            {"Bleu_1": 0.8333333331, "Bleu_4": 0.0001329574, "ROUGE_L": 0.875, "CIDEr": 3.6979166667},
        ),
    ],
)
def test_a_side_is_one_text_and_an_empty_caption_counts(hypotheses: list[str], references: list[list[str]], metrics: dict[str, float]) -> None:
    found = score_captions(dict(enumerate(hypotheses)), dict(enumerate(references))).corpus
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, abs=1e-9)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({}, {}, "there are no references"),
        ({1: "a"}, {1: ["a"], 2: ["b"], 3: ["c"]}, r"2 images have no generated caption \(first: 2, 3\)"),
        ({1: "a", 7: "b"}, {1: ["a"]}, r"1 images have no references \(first: 7\)"),
        ({1: "a"}, {1: []}, "1 images have an empty list of references"),
        ({1: "a", 2: "b"}, {1: [""], 2: ["."]}, "CIDEr needs words in the references, and none of the references of 2 images"),
    ],
)
def test_captions_that_do_not_fit_are_named(hypotheses: dict[int, str], references: dict[int, list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_captions(hypotheses, references)


def test_figures_name_their_scorer() -> None:
    assert "pycocoevalcap 1.2" in score_captions({1: "a"}, {1: ["a"]}).scorer


# None of these depends on the line after it.
PLAIN = st.lists(st.sampled_from("a dog cat 's runs . , 1/2 2 it's on".split()), max_size=7).map(" ".join)
CAPTIONS = st.lists(st.sampled_from("a dog cat 's runs . , 1/2 2 A The U.S. fig. it's on".split()), max_size=7).map(" ".join) | st.text(max_size=12)
ROWS = st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=4)), min_size=1, max_size=6)


def scored(rows: Sequence[tuple[int, tuple[str, list[str]]]]) -> CaptionScores:
    return score_captions({image: text for image, (text, _) in rows}, {image: [*refs, "a dog"] for image, (_, refs) in rows})


@given(st.lists(st.tuples(PLAIN, st.lists(PLAIN, min_size=1, max_size=4)), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_images_and_references_changes_no_figure_of_captions_that_look_at_none_after_them(rows: list[tuple[str, list[str]]], shuffle: random.Random) -> None:
    numbered = list(enumerate(rows))
    mixed = [(image, (text, shuffle.sample(refs, len(refs)))) for image, (text, refs) in shuffle.sample(numbered, len(numbered))]
    first, second = scored(numbered), scored(mixed)
    assert first.corpus == pytest.approx(second.corpus, abs=1e-9, nan_ok=True)
    for image in first.per_image:
        assert first.per_image[image] == pytest.approx(second.per_image[image], abs=1e-9)


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_a_caption_equal_to_its_only_reference_is_perfect(rows: list[tuple[str, list[str]]]) -> None:
    texts = {image: f"dogs run in snow {text}" for image, (text, _) in enumerate(rows)}
    scores = score_captions(texts, {image: [text] for image, text in texts.items()})
    for metrics in [scores.corpus, *scores.per_image.values()]:
        assert metrics["ROUGE_L"] == pytest.approx(1)
        assert metrics["Bleu_4"] == pytest.approx(1, abs=1e-6)
