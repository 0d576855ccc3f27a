"""One image or clip with all its texts: what a data set yields, before any model sees it; and the samples that could not be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adalink.errors import BudgetError, ConfigError, DataError, check_tuples
from adalink.moved import rename_field
from multimodal.progress import progress

__all__ = [
    "BadSample", "BadSamples", "counted", "DamagedSample", "Decode", "Lengths", "Measure", "MediaKind", "Question", "Sample", "SampleSource",
    "TextLengths", "lengths_digest", "lengths_of", "measured",
]  # fmt: skip


Decode = Literal["exact", "draft"]  # draft: JPEGs at a fraction of their size (multimodal.data.inputs.Drafted)
MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, or a text by itself, with what people answered (ten answers in VQAv2, none in a test split).

    pair    the second text, where two are compared; else empty
    marks   one per answer where the file gives answers no id of their own, else empty: the official score takes answers that are equal in
            this too as one (`tasks.metrics.vqa.GradedQuestion`)
    turns   the turns before it, for a model that reads conversations: (role, text)
    places  where the images stand in these turns and the question; both as in `multimodal.template.Text`
    """

    question_id: int
    text: str
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    marks: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[int, int], ...] | None = None
    pair: str = ""

    def __post_init__(self) -> None:
        """Refuse a text in place of a tuple."""
        check_tuples(self, f"question {self.question_id!r}'s")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """ONE image or clip with ALL its texts; where `media` is None texts alone, for a model without an encoder, or one that sees already.

    key        unique in its data set; what logs and reports name
    image_id   the id in the official result files
    media      encoded bytes (from a shard), a PIL image, or the path of a file, also as text; an image is decoded by
               `multimodal.data.images.decode.decode_image`
    kind       image, video or audio; a clip is bytes or a path
    decode     how, where an encoder is to see it
    further    other images that its texts are about too, after the first, for a model that sees already and reads several

    Raises DataError for media of another type.
    """

    key: str
    image_id: int
    media: bytes | str | Path | Image.Image | None
    kind: MediaKind = "image"
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    decode: Decode = "exact"
    further: tuple[bytes | str | Path | Image.Image, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse at once what no sample of a whole data set could be decoded from, and a text in place of a tuple."""
        check_tuples(self, f"sample {self.key!r}'s")
        if wrong := [type(image).__name__ for image in self.images if not isinstance(image, (bytes, str, Path, Image.Image))]:
            raise DataError(
                f"the image of sample {self.key!r} is a {wrong[0]}: give the path of a file, the bytes of one, or a PIL image "
                "(Image.fromarray makes one of an array)"
            )
        if self.kind not in get_args(MediaKind):
            raise DataError(f"the kind of sample {self.key!r} is {self.kind!r}: give image, video or audio")
        if self.kind != "image" and (self.further or isinstance(self.media, Image.Image)):
            raise DataError(f"sample {self.key!r} is of the kind {self.kind} and holds images: give one clip, as the path of a file or the bytes of one")

    @property
    def images(self) -> tuple[bytes | str | Path | Image.Image, ...]:
        """All of them, in their order; a clip is one."""
        return () if self.media is None else (self.media, *self.further)

    @property
    def file(self) -> str:
        """The name of the image's or clip's file; empty where it is none of its own."""
        return Path(self.media).name if isinstance(self.media, (str, Path)) else ""


rename_field(Sample, "image", "media")


class SampleSource(Protocol):
    """A data set with random access: order and resume are the reader's affair, not the source's.

    Pickles cheaply, because worker processes get a copy.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


# ----------------------------------------
# How long the rows of samples will be, measured before any image is read.


Measure = Callable[[Sample], int]
"""The tokens of the longest row that is made of a sample's texts; its image is not looked at."""


class Lengths(Protocol):
    """int64 [samples]: an array, or what reads them where they are asked for; `np.asarray` gives all."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: NDArray[np.int64], /) -> NDArray[np.int64]: ...


def lengths_digest(lengths: Lengths) -> str:
    """The sha256 of all of them; where they are not in memory, the one that was noted when they were written."""
    noted: str | None = getattr(lengths, "sha256", None)
    return noted or hashlib.sha256(np.asarray(lengths).tobytes()).hexdigest()


@runtime_checkable
class TextLengths(Protocol):
    """A data set that can say how long its texts are without reading its images."""

    def text_lengths(self, measure: Measure) -> Lengths:
        """int64 [samples]: what `measure` says where the texts are in memory; else their bytes, which follow the tokens roughly.

        A function of the data (and of `measure`) alone, because the order of a training stream depends on it. Raises ConfigError where a
        data set that this one is made of cannot say it.
        """
        ...


def lengths_of(source: SampleSource, measure: Measure) -> Lengths:
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


# ----------------------------------------
# What was skipped, and why: counted by reason, named up to a few keys, and stopped at a budget.


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: (1, "image") -> "1 image"; (2400, "image") -> "2,400 images". plural: where it is more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


MOST_KEYS = 5  # per reason; enough to look at, and a message still fits on a line or two


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One sample that cannot be used.

    key      the key that the sample has, or would have had
    reason   short and stable, such as "truncated": reports count by it
    detail   one sentence for a person
    file     the name of the image's file, where it has one of its own
    """

    key: str
    reason: str
    detail: str = ""
    file: str = ""

    def to_row(self) -> list[str]:
        """For a JSON file: key, reason, detail, and the file's name where there is one."""
        return [self.key, self.reason, self.detail, *([self.file] if self.file else [])]

    @classmethod
    def from_row(cls, row: Iterable[str]) -> BadSample:
        """The reverse. Raises ValueError where the row has another length."""
        key, reason, detail, *file = row
        if len(file) > 1:
            raise ValueError(f"a skipped sample has {3 + len(file)} entries, expected 3 or 4")
        return cls(key=key, reason=reason, detail=detail, file="".join(file))

    def __str__(self) -> str:
        """The key, and the file's name where the key is not made of it. A key from a tar file may hold line feeds and terminal codes."""
        named = f"{self.key} {self.file}" if self.file and Path(self.key).name not in (Path(self.file).stem, self.file) else self.key
        return named if named.isprintable() else repr(named)


class DamagedSample(DataError):
    """A sample that its data set cannot give; `bad` can be counted, and the next sample may be whole."""

    def __init__(self, bad: BadSample) -> None:
        super().__init__(bad)
        self.bad = bad

    def __str__(self) -> str:
        return self.bad.detail


class BadSamples:
    """Counts bad samples by reason and keeps the first keys of each; `check` raises once there are more than the budget.

    budget   how many bad samples a run may skip; 0 stops at the first.
    """

    def __init__(self, *, budget: int, found: Iterable[BadSample] = ()) -> None:
        if budget < 0:
            raise ConfigError(f"the budget for bad samples is {budget}; give 0 (stop at the first one) or more")
        self._budget = budget
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[BadSample]] = {}
        for bad in found:
            self.add(bad)

    def add(self, bad: BadSample) -> None:
        """Counts one; raises nothing, so that a whole batch can be counted before the run is stopped."""
        self._counts[bad.reason] = self._counts.get(bad.reason, 0) + 1
        first = self._first.setdefault(bad.reason, [])
        if len(first) < MOST_KEYS:
            first.append(bad)

    def check(self) -> None:
        """Raises BudgetError, which names each reason, its count and its first keys, when more than the budget were added."""
        total = sum(self._counts.values())
        if total > self._budget:
            advice = "mend or remove them, or allow more bad samples"
            allowed = f"at most {self._budget} {'is' if self._budget == 1 else 'are'} allowed"
            raise BudgetError(f"{counted(total, 'bad sample')}, and {allowed}: {self.summary()}; {advice}")

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each reason, in the order in which the reasons first came."""
        return dict(self._counts)

    @property
    def first(self) -> Mapping[str, tuple[BadSample, ...]]:
        """The first few of each reason."""
        return {reason: tuple(bad) for reason, bad in self._first.items()}

    def __repr__(self) -> str:
        return f"BadSamples({self})"

    def __str__(self) -> str:
        return self.summary() or "none"

    def summary(self) -> str:
        """For a log line: `2 truncated (12 a.jpg, 40 b.jpg), 1 missing file (7)`; empty where nothing was added."""
        parts = []
        for reason, count in self._counts.items():
            keys = [str(bad) for bad in self._first[reason]] + (["..."] if count > MOST_KEYS else [])
            parts.append(f"{count} {reason} ({', '.join(keys)})")
        return ", ".join(parts)
