"""BLEU-1 .. 4 as the official caption evaluation computes it: closest reference length, clipped counts, its two small constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.metrics.ngrams import MAX_N, Corpus, Floats, Ints, NgramCounts

__all__ = ["BleuSums", "bleu", "bleu_sums"]

# pycocoevalcap 1.2, bleu_scorer.py: added to numerators and denominators, so that no n-gram in common gives nearly 0, not 0.
_TINY = 1e-15
_SMALL = 1e-9


@dataclass(frozen=True, kw_only=True)
class BleuSums:
    """What BLEU adds up over images, one row per image: a corpus (or any resample of it) is scored from the sums of rows.

    correct  int64[images, 4]  n-grams of the hypothesis that stand in a reference, each at most as often as in the one with most
    guess    int64[images, 4]  n-grams of the hypothesis
    length   int64[images]     words of the hypothesis
    reference_length int64[images]  words of the reference closest in length (the shorter of two equally close)
    """

    correct: Ints
    guess: Ints
    length: Ints
    reference_length: Ints


def bleu_sums(corpus: Corpus, counts: Sequence[NgramCounts]) -> BleuSums:
    """The rows of a corpus; counts as `count_ngrams` gives them."""
    n_images = len(corpus.hypotheses)
    length = np.fromiter(map(len, corpus.hypotheses), np.int64, n_images)
    pairs = zip(corpus.references, length.tolist(), strict=True)
    closest = [min((abs(len(text) - n_words), len(text)) for text in texts)[1] for texts, n_words in pairs]
    image = corpus.image
    correct = np.stack([_clipped(table, image, n_images) for table in counts], axis=1)
    guess = np.maximum(0, length[:, None] - np.arange(MAX_N))
    return BleuSums(correct=correct, guess=guess, length=length, reference_length=np.array(closest, np.int64))


def _clipped(table: NgramCounts, image: Ints, n_images: int) -> Ints:
    """int64[images]: n-grams of each hypothesis found in its references."""
    width = max(1, table.n_ngrams)
    key = image[table.caption] * width + table.ngram
    is_hypothesis = table.caption < n_images
    keys, counts = key[is_hypothesis], table.count[is_hypothesis]
    at = np.searchsorted(keys, key[~is_hypothesis])
    at[at == len(keys)] = 0
    found = keys[at] == key[~is_hypothesis] if len(keys) else np.zeros(len(at), np.bool_)
    most = np.zeros_like(counts)
    np.maximum.at(most, at[found], table.count[~is_hypothesis][found])
    return np.bincount(keys // width, np.minimum(counts, most), n_images).astype(np.int64)


def bleu(correct: Ints | Floats, guess: Ints | Floats, length: Ints | Floats, reference_length: Ints | Floats) -> Floats:
    """float64[..., 4]: BLEU-1 .. 4 from sums of any shape: [..., 4] for the first two, [...] for the lengths."""
    precision = (correct + _TINY) / (guess + _SMALL)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return np.asarray(score * penalty[..., None])
