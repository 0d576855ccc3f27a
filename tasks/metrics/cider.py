"""CIDEr-D as the official caption evaluation computes it (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adalink.errors import DataError
from tasks.metrics.ngrams import Corpus, Floats, Ints, NgramCounts

__all__ = ["cider"]

_SIGMA = 6.0  # width of the penalty on different lengths; pycocoevalcap 1.2, cider_scorer.py


def cider(corpus: Corpus, counts: Sequence[NgramCounts]) -> Floats:
    """float64[images]; the corpus metric is their mean. Document frequencies come from the references of this corpus.

    counts  as `count_ngrams` gives them

    Raises DataError where no reference holds a word: there are no document frequencies then (the official code fails as well).
    """
    image, n_images = corpus.image, len(corpus.hypotheses)
    if not any(map(any, corpus.references)):
        raise DataError(f"CIDEr needs words in the references, and none of the references of {n_images} images holds any; check the file")
    # Two quirks: a caption's length is its number of bigrams, and it is compared by the difference, squared.
    bigrams = np.bincount(counts[1].caption, counts[1].count, len(image))
    difference = bigrams[:n_images][image] - bigrams
    penalty = np.exp(-(difference**2) / (2 * _SIGMA**2))
    similarity = np.mean([_similarity(table, image, n_images) for table in counts], axis=0) * penalty
    n_references = np.bincount(image[n_images:], minlength=n_images)
    return np.asarray(10.0 * np.bincount(image[n_images:], similarity[n_images:], n_images) / n_references)


def _similarity(table: NgramCounts, image: Ints, n_images: int) -> Floats:
    """float64[captions]: clipped cosine of each reference with the hypothesis of its image; what it gives for hypotheses is not used."""
    width = max(1, table.n_ngrams)
    key = image[table.caption] * width + table.ngram
    is_hypothesis = table.caption < n_images
    in_images = np.bincount(_different(key[~is_hypothesis]) % width, minlength=width)
    idf = np.log(float(n_images)) - np.log(np.maximum(1.0, in_images))
    weight = table.count * idf[table.ngram]
    norm = np.sqrt(np.bincount(table.caption, weight**2, len(image)))
    keys, weights = key[is_hypothesis], weight[is_hypothesis]
    at = np.searchsorted(keys, key)
    at[at == len(keys)] = 0
    matching = np.where(keys[at] == key, weights[at], 0.0) if len(keys) else np.zeros(len(key))
    product = np.bincount(table.caption, np.minimum(matching, weight) * weight, len(image))
    scale = norm * norm[:n_images][image]
    return np.asarray(np.divide(product, scale, out=np.array(product, np.float64), where=scale != 0))


def _different(numbers: Ints) -> Ints:
    """The different numbers, ascending; sorting them costs a fifth of what np.unique's hashing does."""
    ordered = np.sort(numbers)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered
