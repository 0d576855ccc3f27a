"""ROUGE-L as the official caption evaluation computes it: the best precision and the best recall over references, beta = 1.2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.metrics.ngrams import Corpus, Floats

__all__ = ["rouge_l"]

_BETA = 1.2  # pycocoevalcap 1.2, rouge.py


def rouge_l(corpus: Corpus) -> Floats:
    """float64[images]; the corpus metric is their mean.

    The best precision and the best recall may come from two different references: that is the official way.
    """
    scores = [_score(hypothesis, texts) for hypothesis, texts in zip(corpus.hypotheses, corpus.references, strict=True)]
    return np.array(scores, np.float64)


def _score(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # The official code splits at single spaces, so a caption without words is one empty word, which equals another empty one.
    words = hypothesis or [""]
    masks: dict[str, int] = {}
    for position, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << position
    precision = recall = 0.0
    for reference in references:
        others = reference or [""]
        common = _common(masks, len(words), others)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(others))
    if precision == 0 or recall == 0:
        return 0.0
    return ((1 + _BETA**2) * precision * recall) / (recall + _BETA**2 * precision)


def _common(masks: dict[str, int], n_words: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine word per row of the table.

    The bit-parallel recurrence of Hyyrö 2004 ("Bit-parallel LCS-length computation revisited"): a zero bit marks a column where the
    table grows.
    """
    full = (1 << n_words) - 1
    row = full
    for word in others:
        match = row & masks.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return n_words - row.bit_count()
