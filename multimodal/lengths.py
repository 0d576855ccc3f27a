"""How long the rows of samples will be, told before any picture is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.progress import progress
from multimodal.sample import Sample, SampleSource

__all__ = ["Measure", "TextLengths", "lengths_of", "measured"]

Measure = Callable[[Sample], int]
"""The tokens of the longest row that is made of a sample's texts; its picture is not looked at."""


@runtime_checkable
class TextLengths(Protocol):
    """A data set that can say how long its texts are without reading its pictures."""

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """int64 [samples]: what `measure` says where the texts are in memory; else their bytes, which follow the tokens roughly.

        A function of the data (and of `measure`) alone, because the order of a training stream depends on it. Raises ConfigError where a
        data set that this one is made of cannot say it.
        """
        ...


def lengths_of(source: SampleSource, measure: Measure) -> NDArray[np.int64]:
    """int64 [samples]: how long each sample's texts are. Raises ConfigError where the data set cannot say it."""
    if isinstance(source, TextLengths):
        return source.text_lengths(measure)
    raise ConfigError(
        f"train.bucket_pool sorts samples by the lengths of their texts, and a {type(source).__name__} does not say them: give it a method "
        "text_lengths (multimodal.lengths.TextLengths), or set train.bucket_pool to 0"
    )


def measured(samples: Iterable[Sample], count: int, measure: Measure) -> NDArray[np.int64]:
    """int64 [count]: each sample measured, with a progress bar."""
    return np.fromiter(map(measure, progress(samples, "measuring the texts", count)), dtype=np.int64, count=count)
