"""Ask a model about every picture of a data set: with its own picture, and with another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from adalink.errors import DataError
from multimodal.bad_samples import BadSample, counted
from multimodal.batches.collate import collate
from multimodal.batches.tokenize import Row, TextTooLong
from multimodal.data.feature_cache.memory import encode_all, pixel_table
from multimodal.data.inputs import Kept
from multimodal.generation.generate import GenerationSettings, check_room, saved_generation
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.progress import progress
from multimodal.sample import SampleSource
from tasks.data.sources import Chosen, Opened
from tasks.task import Score, Task

__all__ = ["Pictures", "Predictions", "evaluate", "is_graded", "predict", "read_pictures", "told_sameness"]


@dataclass(frozen=True)
class Pictures:
    """The samples of a data set that can be shown to a model, with their features; the others are in `bad`."""

    source: SampleSource
    patches: Kept
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
    picture: int


def read_pictures(opened: Opened, table: Kept) -> Pictures:
    """Every picture of a data set with its features. Raises DataError where none has any."""
    indices = table.usable()
    bad = (*opened.problems, *table.bad.values())
    if not indices:
        raise DataError(f"none of the {counted(len(opened.source), 'picture')} can be used: {bad[0].detail}")
    if len(indices) == len(opened.source):
        return Pictures(opened.source, table, bad)
    return Pictures(Chosen(opened.source, indices), table.only(indices), bad)


def evaluate(model: VisionLanguageModel, source: SampleSource, task: Task, *, settings: GenerationSettings | None = None) -> tuple[Score, Predictions]:
    """What the active adapter says about every sample of a data set, and what a task scores it: `adalink evaluate` without its files.

    settings: those that the adapter was saved with, where none are given. Raises DataError where nothing can be used or scored.
    """
    encoded = encode_all(model, source) if model.tower.adapter is None else pixel_table(source, model.tower.preprocess, label="reading")
    pictures = read_pictures(Opened(source, ()), encoded)
    settings = settings or saved_generation(model.adapted.tasks.get(model.adapted.active or "", {}))
    said = predict(model, pictures.source, task, pictures.patches, settings=settings)
    return task.score(said.texts, pictures.source), Predictions(said.texts, (*pictures.bad, *said.bad))


def is_graded(task: Task, source: SampleSource) -> bool:
    """Whether any sample has something to score against; a test split has none in all of it."""
    return any(task.is_graded(source[i]) for i in range(len(source)))


def predict(
    model: VisionLanguageModel,
    source: SampleSource,
    task: Task,
    patches: Kept,
    *,
    settings: GenerationSettings,
    batch_size: int = 64,
    shift: int = 0,
    label: str = "generating",
) -> Predictions:
    """One text for everything that the task asks about the source: each of several processes generates its share, and all get the whole.

    patches   of the source's pictures
    shift     sample i is shown the picture of sample i + shift: the blind control, where a model that looks must do worse
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
    """This process's questions: those about one picture side by side, so that they read it once, and rows of like length near each other."""
    longest: dict[int, int] = {}
    for question in questions:
        longest[question.picture] = max(longest.get(question.picture, 0), len(question.row.ids))
    pictures = sorted(longest, key=lambda picture: (longest[picture], picture))
    turn = {picture: i % state.num_processes for i, picture in enumerate(pictures)}
    own = [question for question in questions if turn[question.picture] == state.process_index]
    return sorted(own, key=lambda question: (longest[question.picture], question.picture))


def _questions(
    model: VisionLanguageModel, source: SampleSource, task: Task, patches: Kept, shift: int, settings: GenerationSettings
) -> Iterator[_Question | BadSample]:
    encoder = model.row_encoder()
    for index in range(len(source)):
        sample = source[index]
        shown = (index + shift) % len(source)
        if shown in patches.bad:
            yield patches.bad[shown]
            continue
        for asked in task.asked(sample):
            try:
                row = encoder.prompt(asked.question)
                if model.head is None:  # nothing is written after the prompt of one that chooses
                    check_room(model.language, len(row.ids), settings)
                yield _Question(asked.item, row, shown)
            except TextTooLong as error:
                yield BadSample(key=sample.key, reason="text too long", detail=str(error))


def _answer(model: VisionLanguageModel, questions: Sequence[_Question], patches: Kept, settings: GenerationSettings) -> dict[int, str]:
    place = {picture: i for i, picture in enumerate(dict.fromkeys(question.picture for question in questions))}
    shown = [found for picture in place if isinstance(found := patches[picture], Tensor)]
    image = [place[question.picture] for question in questions]
    pad_id = model.language.tokenizer.pad_token_id
    batch = collate([q.row for q in questions], image, torch.stack(shown), kind=patches.kind, side="left", pad_id=pad_id)
    texts = model.generate_batch(batch.to(model.device), settings)
    return {question.item: text for question, text in zip(questions, texts, strict=True)}


# ----------------------------------------
# A sentence about texts that say too little: many empty, or one text said of many pictures.


MOST_EMPTY, MOST_ALIKE = 0.1, 1 / 3  # shares of all texts; what is more is told
ANSWER_WORDS = 3  # a text of so few words may be the right answer to many questions
FEWEST = 20  # texts; among fewer, a third alike means nothing


def told_sameness(texts: Collection[str], settings: GenerationSettings) -> str:
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
        return "the adapter tells the pictures hardly apart, so train it longer or give it more weights"
    return (
        f"{settings.num_beams} beams find what the frozen model thinks most probable, and a weak adapter does not outweigh that, "
        "so compare with generation.num_beams 1"
    )
