"""The n-grams of a tokenised corpus as integer arrays, counted once for every caption metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_N", "Corpus", "Floats", "Ints", "NgramCounts", "count_ngrams", "cut_at_spaces"]

MAX_N = 4  # all official caption metrics stop at 4-grams

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenised captions: one hypothesis and at least one reference per image, both in the same order of images."""

    hypotheses: Sequence[Sequence[str]]
    references: Sequence[Sequence[Sequence[str]]]

    @property
    def captions(self) -> list[Sequence[str]]:
        """All hypotheses, one per image, then all references image by image."""
        return [*self.hypotheses, *chain.from_iterable(self.references)]

    @property
    def image(self) -> Ints:
        """int64[captions]: the image of each caption, in the order of `captions`."""
        images = np.arange(len(self.hypotheses))
        return np.concatenate([images, np.repeat(images, [len(texts) for texts in self.references])])


@dataclass(frozen=True, kw_only=True)
class NgramCounts:
    """How often each n-gram of one length stands in each caption: one entry per pair that occurs, sorted by caption, then n-gram.

    caption  int64[E]  index of the caption in `Corpus.captions`
    ngram    int64[E]  number of the n-gram, below n_ngrams
    count    int64[E]  at least 1
    n_ngrams           number of different n-grams in the corpus
    """

    caption: Ints
    ngram: Ints
    count: Ints
    n_ngrams: int


def cut_at_spaces(corpus: Corpus) -> Corpus:
    """The corpus as BLEU and CIDEr read it.

    They cut a tokenised caption at any white space, ROUGE-L at plain spaces only, so "2 1/2" with an unbreakable space is two words for
    the former and one for the latter.
    """
    # Nearly always nothing is to be cut, and the different words of a corpus are few.
    if all(word.split() == [word] for word in set().union(*corpus.captions)):
        return corpus
    return Corpus(
        hypotheses=[" ".join(tokens).split() for tokens in corpus.hypotheses],
        references=[[" ".join(tokens).split() for tokens in texts] for texts in corpus.references],
    )


def count_ngrams(corpus: Corpus) -> tuple[NgramCounts, ...]:
    """Counts for n = 1 .. 4.

    An n-gram is numbered by the pair (its first n - 1 words, its last word), so each length costs one sort of integers instead of
    hashing a tuple at every position.
    """
    captions = corpus.captions
    lengths = np.fromiter(map(len, captions), np.int64, len(captions))
    numbers = {token: number for number, token in enumerate(sorted(set().union(*captions)))}  # whatever the order of images
    word = np.fromiter(map(numbers.__getitem__, chain.from_iterable(captions)), np.int64, int(lengths.sum()))
    caption = np.repeat(np.arange(len(captions)), lengths)
    gram, n_grams = word, len(numbers)
    counts = [_count(caption, gram, n_grams)]
    for n in range(2, MAX_N + 1):
        starts = np.flatnonzero(caption[: max(0, len(word) - n + 1)] == caption[n - 1 :])
        different, inverse = np.unique(gram[starts] * len(numbers) + word[starts + n - 1], return_inverse=True)
        gram, n_grams = np.zeros_like(word), len(different)
        gram[starts] = inverse
        counts.append(_count(caption[starts], inverse, n_grams))
    return tuple(counts)


def _count(caption: Ints, gram: Ints, n_ngrams: int) -> NgramCounts:
    width = max(1, n_ngrams)
    pair, count = np.unique(caption * width + gram, return_counts=True)
    return NgramCounts(caption=pair // width, ngram=pair % width, count=count, n_ngrams=n_ngrams)
