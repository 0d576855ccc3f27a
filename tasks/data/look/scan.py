"""Samples read before training: what their image files say of themselves, their texts, and which of them training would skip."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adalink.errors import DataError
from multimodal.data.images.decode import BadImage, ImageOrFile, check_header, decode_image, read_image_bytes
from multimodal.data.images.format import ENDINGS
from multimodal.data.images.processes import n_cores
from multimodal.data.workers import made_in_order
from multimodal.progress import progress
from multimodal.sample import BadSample, DamagedSample, Question, Sample, SampleSource
from tasks.data.sources import place_of
from tasks.report.page import Thumbnail, thumbnail
from tasks.task import Task

__all__ = ["ImageFile", "Seen", "look_at", "skipped", "spread_over", "thumbnails", "usual_workers"]

Found = TypeVar("Found")
_PIECE = 16  # samples that a process reads at once
_MANY_RUNS = 100
MOST_OF_SAMPLE = 4  # thumbnails


def usual_workers() -> int:
    """Processes that read beside this one: one for each core, at most four."""
    return min(4, n_cores())


def spread_over(total: int, most: int) -> Sequence[int]:
    """All numbers below `total`, or `most` of them, evenly spread; 0 is all. Many come in runs of sixteen: parquet is read by groups of rows."""
    if not most or total <= most:
        return range(total)
    run = _PIECE if most >= _MANY_RUNS * _PIECE else 1
    n_runs = most // run
    return [start * total // n_runs + k for start in range(n_runs) for k in range(run)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """What an image's first bytes say of it, before its EXIF orientation; width and height in pixels, size in bytes.

    digest   equal where all bytes are equal
    ending   the ending of its file's name, where that is of another kind than its content
    """

    kind: str
    width: int
    height: int
    size: int
    digest: str
    ending: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A sample without its images.

    number   its place in the data set, from 0
    place    file and line, where the data set knows them
    bad      why it cannot be used; its texts are then empty where it could not be read at all
    """

    number: int
    key: str
    file: str = ""
    place: str = ""
    images: tuple[ImageFile, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    bad: BadSample | None = None


def _in_processes(source: SampleSource, numbers: Sequence[int], read: Callable[[SampleSource, int], Found], label: str, workers: int) -> Iterator[Found]:
    """What `read` finds in each sample, in their order. Raises DataError where a process dies."""
    pieces = [numbers[start : start + _PIECE] for start in range(0, len(numbers), _PIECE)]
    made = made_in_order(partial(_read_piece, source, read), pieces, workers=workers)
    return progress((found for piece in made for found in piece), label, len(numbers), unit="samples")


def _read_piece(source: SampleSource, read: Callable[[SampleSource, int], Found], numbers: Sequence[int]) -> list[Found]:
    return [read(source, number) for number in numbers]


# ----------------------------------------
# A look: headers, bytes and texts. Nothing is decoded.


def look_at(source: SampleSource, numbers: Sequence[int], *, workers: int, label: str = "reading") -> list[Seen]:
    """What is found about the samples of these numbers, in their order; every byte of their images is read, and none decoded."""
    return list(_in_processes(source, numbers, _seen, label, workers))


def _seen(source: SampleSource, number: int) -> Seen:
    place = place_of(source, number)
    try:
        sample = source[number]
    except DamagedSample as error:
        return Seen(number=number, key=error.bad.key, file=error.bad.file, place=place, bad=error.bad)
    images, bad = [], None
    for image in sample.images:
        try:
            images.append(_image_file(image))
        except BadImage as error:
            bad = bad or _bad(sample, error.reason, str(error), place)
    if not sample.captions and not sample.questions:
        bad = bad or _bad(sample, "no text", f"{sample.key} has no text", place)
    return Seen(
        number=number, key=sample.key, file=sample.file, place=place, images=tuple(images), captions=sample.captions, questions=sample.questions, bad=bad
    )  # fmt: skip


def _image_file(image: ImageOrFile) -> ImageFile:
    data = read_image_bytes(image)
    named = Path(image) if isinstance(image, (str, Path)) else None
    header = check_header(data, name=str(named or "an image"))
    ending = named.suffix.lower() if named is not None else ""
    is_other = ending and ENDINGS.get(ending[1:], ending[1:]) != header.kind
    digest = hashlib.sha256(data).hexdigest()[:32]
    return ImageFile(
        kind=header.kind, width=header.width, height=header.height, size=len(data), digest=digest, ending=ending if is_other else ""
    )


def _bad(sample: Sample, reason: str, detail: str, place: str) -> BadSample:
    """With file and line before the detail."""
    return BadSample(key=sample.key, reason=reason, detail=f"{place}: {detail}" if place else detail, file=sample.file)


# ----------------------------------------
# Small images for a page.


def thumbnails(source: SampleSource, numbers: Sequence[int], *, side: int, workers: int) -> list[tuple[Thumbnail, ...]]:
    """The images of each sample, the first four of them, at most `side` pixels wide and high."""
    return list(_in_processes(source, numbers, partial(_thumbnails, side=side), "thumbnails", workers))


def _thumbnails(source: SampleSource, number: int, side: int) -> tuple[Thumbnail, ...]:
    try:
        sample = source[number]
    except DamagedSample as error:
        return (Thumbnail(reason=error.bad.reason),)
    return tuple(_thumbnail(image, side) for image in sample.images[:MOST_OF_SAMPLE])


def _thumbnail(image: ImageOrFile, side: int) -> Thumbnail:
    try:
        return thumbnail(decode_image(image, at_least=2 * side), side=side, quality=70)
    except BadImage as error:
        return Thumbnail(reason=error.reason)


# ----------------------------------------
# A check: every image decoded as training does.


def skipped(source: SampleSource, *, task: Task | None, workers: int) -> Iterator[BadSample]:
    """What training on all samples would skip, with file and line in the detail where the data set knows them.

    task   skips a sample that gives it no text; None takes any caption or question
    """
    found: Any = _in_processes(source, range(len(source)), partial(_unusable, task=task), "checking", workers)
    return (bad for bad in found if bad is not None)


def _unusable(source: SampleSource, number: int, task: Task | None) -> BadSample | None:
    place = place_of(source, number)
    try:
        sample = source[number]
    except DamagedSample as error:
        return error.bad
    try:
        for image in sample.images:
            decode_image(image)
    except BadImage as error:
        return _bad(sample, error.reason, str(error), place)
    except DataError as error:
        return _bad(sample, "unreadable", str(error), place)
    if task is None:
        has_text = bool(sample.captions or sample.questions)
    else:
        has_text = any(text.scores is not None or (text.target or "").strip() for text in task.texts(sample, random.Random(0)))
    return None if has_text else _bad(sample, "no text", f"{sample.key} has no text to learn from", place)
