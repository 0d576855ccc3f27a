"""Ask a model about every image of a data set: with its own image, and with another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from adalink.errors import DataError
from multimodal.batches.collate import collate, stacked
from multimodal.batches.tokenize import Row, TextTooLong
from multimodal.data.feature_cache.encode import encode_all, pixel_table
from multimodal.data.inputs import CachedFeatures
from multimodal.encoders.tower import NoTower
from multimodal.generation.decoding import check_room
from multimodal.generation.settings import GenerationSettings, saved_generation
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import BadSample, SampleSource, counted
from tasks.data.sources import Chosen, Opened
from tasks.metrics.vqa import refuse
from tasks.task import Score, Submission, Task

__all__ = [
    "ReadImages", "Predictions", "Submission", "evaluate", "is_graded", "predict", "read_images", "refuse_gaps", "degenerate_note",
    "what_is_missing", "write_submission",
]  # fmt: skip


@dataclass(frozen=True)
class ReadImages:
    """The samples of a data set with a usable image, with their features; the others are in `bad`."""

    source: SampleSource
    patches: CachedFeatures
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class Predictions:
    """What was generated for each item, and the samples that could not be asked about."""

    texts: Mapping[int, str]
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class _Question:
    item: int
    row: Row
    image: int


def read_images(opened: Opened, table: CachedFeatures) -> ReadImages:
    """Every image of a data set with its features. Raises DataError where none has any."""
    indices = table.usable()
    bad = (*opened.problems, *table.bad.values())
    if not indices:
        raise DataError(f"none of the {counted(len(opened.source), 'image')} can be used: {bad[0].detail}")
    if len(indices) == len(opened.source):
        return ReadImages(opened.source, table, bad)
    return ReadImages(Chosen(opened.source, indices), table.only(indices), bad)


def evaluate(model: VisionLanguageModel, source: SampleSource, task: Task, *, settings: GenerationSettings | None = None) -> tuple[Score, Predictions]:
    """What the active adapter says about every sample of a data set, and what a task scores it: `adalink evaluate` without its files.

    settings: those that the adapter was saved with, where none are given. Raises DataError where nothing can be used or scored.
    """
    encoded = pixel_table(source, model.tower.preprocess, label="reading") if model.changes_features else encode_all(model, source)
    images = read_images(Opened(source, ()), encoded)
    settings = settings or saved_generation(model.adapted.tasks.get(model.adapted.active or "", {}))
    predicted = predict(model, images.source, task, images.patches, settings=settings)
    return task.score(predicted.texts, images.source), Predictions(predicted.texts, (*images.bad, *predicted.bad))


def is_graded(task: Task, source: SampleSource) -> bool:
    """Whether any sample has something to score against; a test split has none in all of it."""
    return any(task.is_graded(source[i]) for i in range(len(source)))


def predict(
    model: VisionLanguageModel,
    source: SampleSource,
    task: Task,
    patches: CachedFeatures,
    *,
    settings: GenerationSettings,
    batch_size: int = 64,
    shift: int = 0,
    label: str = "generating",
) -> Predictions:
    """One text for everything that the task asks about the source: each of several processes generates its share, and all get the whole.

    patches   of the source's images
    shift     sample i gets the image of sample i + shift, or where there are none its text: the blind control, where a model that looks must do worse
    """
    questions: list[_Question] = []
    bad: list[BadSample] = []
    for question in _questions(model, source, task, patches, shift, settings):
        (bad if isinstance(question, BadSample) else questions).append(question)  # type: ignore[arg-type]
    own = _own(questions, process_state())
    answered: dict[int, str] = {}
    for start in progress(range(0, len(own), batch_size), label):
        answered.update(_answer(model, own[start : start + batch_size], patches, settings))
    # Every process gets all texts, so that a corpus metric is computed on the whole corpus and never averaged over processes.
    texts = {item: text for part in gather_object([answered]) for item, text in part.items()}
    order = {asked.item: None for i in range(len(source)) for asked in task.asked(source[i])}
    return Predictions({item: texts[item] for item in order if item in texts}, tuple(bad))


def _own(questions: Sequence[_Question], state: PartialState) -> list[_Question]:
    """This process's questions: those about one image side by side, so that they read it once, and rows of like length near each other."""
    longest: dict[int, int] = {}
    for question in questions:
        longest[question.image] = max(longest.get(question.image, 0), len(question.row.ids))
    images = sorted(longest, key=lambda image: (longest[image], image))
    turn = {image: i % state.num_processes for i, image in enumerate(images)}
    own = [question for question in questions if turn[question.image] == state.process_index]
    return sorted(own, key=lambda question: (longest[question.image], question.image))


def _questions(
    model: VisionLanguageModel, source: SampleSource, task: Task, patches: CachedFeatures, shift: int, settings: GenerationSettings
) -> Iterator[_Question | BadSample]:
    encoder = model.row_encoder()
    read = [(task.asked(sample), len(sample.images)) for sample in (source[index] for index in range(len(source)))]
    for index, displayed in enumerate(_displayed([n_images for _, n_images in read], shift)):
        if displayed in patches.bad:
            yield patches.bad[displayed]
            continue
        seen = patches[displayed] if encoder.reads_images else None  # a row of a model that sees already has its image's own tokens
        swaps = isinstance(model.tower, NoTower)
        for asked, other in zip(read[index][0], read[displayed][0] if swaps else read[index][0], strict=True):
            try:
                row = encoder.row(other.text, seen)
                if model.head is None and not model.label_words:  # nothing is written after the prompt of one that chooses
                    check_room(model.language, len(row.ids), settings)
                yield _Question(asked.item, row, displayed)
            except TextTooLong as error:
                yield BadSample(key=source[index].key, reason="text too long", detail=str(error))


def _displayed(n_images: Sequence[int], shift: int) -> list[int]:
    """For each sample the one whose images it is given: itself, or the one `shift` further among those with as many images, and never itself."""
    alike: dict[int, list[int]] = {}
    for index, n in enumerate(n_images):
        alike.setdefault(n, []).append(index)
    displayed = list(range(len(n_images)))
    for members in alike.values():
        step = shift % len(members) or min(shift, 1)
        for place, index in enumerate(members):
            displayed[index] = members[(place + step) % len(members)]
    return displayed


def _answer(model: VisionLanguageModel, questions: Sequence[_Question], patches: CachedFeatures, settings: GenerationSettings) -> dict[int, str]:
    place = {index: i for i, index in enumerate(dict.fromkeys(question.image for question in questions))}
    features = [found for index in place if not isinstance(found := patches[index], BadSample)]
    image = [place[question.image] for question in questions]
    pad_id = model.language.tokenizer.pad_token_id
    batch = collate([q.row for q in questions], image, stacked(features), kind=patches.kind, side="left", pad_id=pad_id)
    texts = model.generate_batch(batch.to(model.device), settings)
    return {question.item: text for question, text in zip(questions, texts, strict=True)}


# ----------------------------------------
# A sentence about degenerate texts: many empty, or one text for many images.


MOST_EMPTY, MOST_ALIKE = 0.1, 1 / 3  # shares of all texts; more than that is reported
ANSWER_WORDS = 3  # a text of so few words may be the right answer to many questions
FEWEST = 20  # texts; among fewer, a third alike means nothing


def degenerate_note(texts: Collection[str], settings: GenerationSettings) -> str:
    """What is wrong with the texts of an evaluation as a whole, and what to try; empty where nothing is."""
    if len(texts) < FEWEST:
        return ""
    counts = Counter(texts)
    n_empty = counts.pop("", 0)
    if n_empty > MOST_EMPTY * len(texts):
        return f"{n_empty} of {len(texts)} texts are empty: {_advice(settings)}"
    text, n_alike = max(((text, n) for text, n in counts.items() if len(text.split()) > ANSWER_WORDS), key=lambda pair: pair[1], default=("", 0))
    if n_alike > MOST_ALIKE * len(texts):
        return f"{n_alike} of {len(texts)} texts are the same, {text!r}: {_advice(settings)}"
    return ""


def _advice(settings: GenerationSettings) -> str:
    if settings.num_beams == 1:
        return "the adapter hardly distinguishes the images, so train it longer or give it more weights"
    return (
        f"{settings.num_beams} beams find what the frozen model thinks most probable, and a weak adapter does not outweigh that, "
        "so compare with generation.num_beams 1"
    )


# ----------------------------------------
# The official result file of an evaluation: named as the server wants it, and complete.


def what_is_missing(opened: Opened, texts: Mapping[int, str], bad: Sequence[BadSample]) -> list[int | str]:
    """The ids of the split without a prediction; keys of samples, where the data set names ids only in the samples themselves."""
    if opened.item_ids:
        return [item for item in opened.item_ids if item not in texts]
    return list(dict.fromkeys(sample.key for sample in bad))


def refuse_gaps(task: Task, opened: Opened, usable: SampleSource, bad: Sequence[BadSample], submission: Submission) -> None:
    """Raises DataError where samples without a usable image would leave gaps: before anything is generated.

    usable   the samples with a usable image
    bad      those that cannot
    """
    if submission.incomplete == "allow" or opened.left_out or not bad:
        return
    asked = {one.item: "" for i in range(len(usable)) for one in task.asked(usable[i])} if opened.item_ids else {}
    refuse(
        what_is_missing(opened, asked, bad),
        f"of the {len(opened.item_ids) or len(usable) + len(bad)} items of this split would be missing from its official result file",
        f"the first sample that cannot be used: {bad[0].detail or bad[0].key} ({bad[0].reason}); mend them, or give --submission.incomplete allow",
    )


def write_submission(
    folder: Path, task: Task, opened: Opened, split: str, texts: Mapping[int, str], bad: Sequence[BadSample], submission: Submission
) -> str:
    """Write the official result file and give the line that says so, or that says what is missing.

    Nothing is written where `limit` leaves out a part of the split and gaps are not allowed.
    Raises DataError where other items are missing and gaps are not allowed.
    """
    path = folder / task.results_name(submission.split or split, submission.algorithm)
    missing = what_is_missing(opened, texts, bad)
    if opened.left_out:
        gap = f"limit leaves out {opened.left_out} images of the split"
    elif missing:
        listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        gap = f"{len(missing)} of {len(texts) + len(missing)} predictions are missing (first: {listed})"
    else:
        task.write_results(path, texts, opened.official)
        return f"official result file: {path}"
    if submission.incomplete == "allow":
        task.write_results(path, texts, opened.official)
        return f"incomplete official result file: {path}; {gap}"
    if opened.left_out:
        return f"no official result file is written: {gap}; leave it out, or give --submission.incomplete allow"
    raise DataError(f"no official result file is written to {path}: {gap}; results.json holds the others; mend them, or give --submission.incomplete allow")
