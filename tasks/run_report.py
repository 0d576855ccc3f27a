"""The report of a run: its curves, table, and pictures with what was said about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from adalink.errors import DataError
from multimodal.counted import counted
from multimodal.images import read_image_bytes
from multimodal.model import VisionLanguageModel
from multimodal.run_log import BAD_FILE, METRICS_FILE, VAL_LOSS
from multimodal.sample import Sample, SampleSource
from multimodal.trained import TrainedParts
from tasks.evaluate import Predictions
from tasks.report import AnswerCard, CaptionCard, Curve, MetricRow, Report, Trained, write_report
from tasks.task import TRAINED, Score, Task

__all__ = ["write_run_report"]

_UNSCORED = Score(figures={}, headline="", items={}, scorer="nothing")  # a test split
N_CARDS = 24  # pictures on the page: enough to judge by, about half a megabyte


def write_run_report(
    folder: Path,
    model: VisionLanguageModel,
    task: Task,
    config_text: str,
    scores: Mapping[str, Score],
    predictions: Predictions,
    source: SampleSource,
    *,
    warning: str,
) -> None:
    """Write report.html into a run folder that holds metrics.jsonl (or not, where nothing was trained). warning: about the texts, or empty."""
    adapter = model.adapted.active_adapter()
    counts = TrainedParts.of(model).counts()
    frozen = sum(parameter.numel() for part in (model.tower.encoder, model.adapted.base) for parameter in part.parameters())
    trained = scores.get(TRAINED, _UNSCORED)
    headline = f"{trained.headline} {trained.figures[trained.headline]:.1f} on" if trained.figures else "not scored, for want of references:"
    report = Report(
        title=f"{task.name}: {' + '.join(type(method).__name__ for method in adapter.methods.values())}",
        summary=f"{model.tower.name} and {model.language.name}, both frozen; {sum(counts.values()):,} trained parameters; "
        f"{headline} {counted(len(predictions.texts), 'item')}{'; ' * bool(warning)}{warning}",
        scorer=trained.scorer,
        rows=[MetricRow(name=name, values=score.figures) for name, score in scores.items()],
        trained=[Trained(name=name, parameters=count) for name, count in counts.items()],
        frozen_parameters=frozen,
        curves=_curves(folder / METRICS_FILE, "nats per token" if model.head is None else "nats per question, binary cross entropy"),
        cards=list(_cards(source, task, predictions, trained)),
        bad_samples=_bad(folder / BAD_FILE, predictions),
        config=config_text,
    )
    write_report(report, folder / "report.html")


def _curves(file: Path, unit: str) -> list[Curve]:
    """unit: of the loss."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = {"loss": "loss", "rate": "learning rate", VAL_LOSS: "validation loss"}  # and the task's headline figure, where it was measured
    keys = dict.fromkeys(key for line in lines for key in line if key != "step")
    points = {key: [(line["step"], line[key]) for line in lines if key in line] for key in keys}
    return [Curve(name=names.get(key, key), points=points[key], unit=unit if key in ("loss", VAL_LOSS) else "") for key in keys]


def _cards(source: SampleSource, task: Task, predictions: Predictions, score: Score) -> Iterator[CaptionCard | AnswerCard]:
    """Pictures spread evenly over the data set, each with one of the things that the task asked about it."""
    step = max(len(source) // N_CARDS, 1)
    for number, index in enumerate(range(0, min(len(source), step * N_CARDS), step)):
        sample = source[index]
        asked = task.asked(sample)
        items = [one.item for one in asked if one.item in predictions.texts]
        if not items:
            continue
        item = items[number % len(items)]
        generated, points = predictions.texts[item], score.items.get(item)
        answers = {question.question_id: question for question in sample.questions}
        if task.name == "vqa":
            question = answers[item]
            share = None if points is None else points / 100
            yield AnswerCard(
                key=sample.key, image=_picture(sample), question=question.text, generated=generated, answers=question.answers, score=share
            )  # fmt: skip
        else:
            yield CaptionCard(key=sample.key, image=_picture(sample), generated=generated, references=sample.captions, score=points)


def _picture(sample: Sample) -> bytes | None:
    try:
        return read_image_bytes(sample.image)
    except DataError:
        return None


def _bad(file: Path, predictions: Predictions) -> dict[str, list[str]]:
    bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    reasons: dict[str, list[str]] = {}
    for reason, key in [*((row["reason"], row["key"]) for row in bad), *((sample.reason, sample.key) for sample in predictions.bad)]:
        reasons.setdefault(reason, []).append(key)
    return reasons
