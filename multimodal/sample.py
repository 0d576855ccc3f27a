"""One image with all its texts: what a data set yields, before any model sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adalink.errors import ConfigError, DataError, check_tuples
from multimodal.data.progress import progress

__all__ = ["Decode", "Measure", "Question", "Sample", "SampleSource", "TextLengths", "lengths_of", "measured"]


Decode = Literal["exact", "draft"]  # draft: JPEGs at a fraction of their size (multimodal.data.inputs.Drafted)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, with what people answered (ten answers in VQAv2, none in a test split).

    marks   one per answer where the file gives answers no id of their own, else empty: the official score takes answers that are equal in
            this too as one (`tasks.metrics.vqa.GradedQuestion`)
    """

    question_id: int
    text: str
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a text in place of a tuple."""
        check_tuples(self, f"question {self.question_id!r}'s")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """ONE image with ALL its texts.

    key        unique in its data set; what logs and reports name
    image_id   the id in the official result files
    image      encoded bytes (from a shard), a PIL image, or the path of a file, also as text; decoded by `multimodal.data.images.decode.decode_image`
    decode     how, where an encoder is to see it

    Raises DataError for an image of another type.
    """

    key: str
    image_id: int
    image: bytes | str | Path | Image.Image
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        """Refuse at once what no sample of a whole data set could be decoded from, and a text in place of a tuple."""
        check_tuples(self, f"sample {self.key!r}'s")
        if not isinstance(self.image, (bytes, str, Path, Image.Image)):
            raise DataError(
                f"the image of sample {self.key!r} is a {type(self.image).__name__}: give the path of a file, the bytes of one, or a PIL image "
                "(Image.fromarray makes one of an array)"
            )

    @property
    def file(self) -> str:
        """The name of the image's file; empty where the image is none of its own."""
        return Path(self.image).name if isinstance(self.image, (str, Path)) else ""


class SampleSource(Protocol):
    """A data set with random access: order and resume are the reader's affair, not the source's.

    Pickles cheaply, because worker processes get a copy.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


# ----------------------------------------
# How long the rows of samples will be, told before any image is read.


Measure = Callable[[Sample], int]
"""The tokens of the longest row that is made of a sample's texts; its image is not looked at."""


@runtime_checkable
class TextLengths(Protocol):
    """A data set that can say how long its texts are without reading its images."""

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
        "text_lengths (multimodal.sample.TextLengths), or set train.bucket_pool to 0"
    )


def measured(samples: Iterable[Sample], count: int, measure: Measure) -> NDArray[np.int64]:
    """int64 [count]: each sample measured, with a progress bar."""
    return np.fromiter(map(measure, progress(samples, "measuring the texts", count)), dtype=np.int64, count=count)
