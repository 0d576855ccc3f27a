"""metrics.json and the metrics in the model card: every metric with its interval and with what computed it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from adalink.errors import DataError
from adalink.files import write_whole
from multimodal.data.images.decode import read_image_bytes
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.sample import BadSample, Sample, SampleSource, counted
from multimodal.training.records import BAD_FILE, METRICS_FILE, VAL_LOSS
from tasks.evaluation.evaluate import Predictions
from tasks.evaluation.representation import read_representation, representation_rows
from tasks.metrics.bootstrap import Interval, Resampling, software
from tasks.report.page import AnswerCard, CaptionCard, Curve, MetricRow, Report, Trained, write_report
from tasks.task import TRAINED, Score, Task

__all__ = ["UNSCORED", "add_metrics", "write_card_metrics", "write_metrics", "write_run_report"]


# ----------------------------------------
# The metrics of an evaluation in an adapter's model card, each with its scorer.


_HEADING = "## Evaluation"


def add_metrics(
    folder: Path, metrics: Mapping[str, float | None], intervals: Mapping[str, Interval], *, scorer: str, software: str, data: str
) -> None:
    """Put a table of metrics at the end of an adapter folder's README.md, in place of one that is there from before.

    scorer, software   what computed the metrics, each with its version
    data               one line that says what was evaluated on, and on how many items
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").split(f"\n{_HEADING}\n")[0].rstrip("\n") if card.exists() else ""
    rows = []
    for name, value in metrics.items():
        between = f"{intervals[name].low:.2f} .. {intervals[name].high:.2f}" if name in intervals else ""
        rows.append(f"| {name} | {'undefined' if value is None else f'{value:.2f}'} | {between} | {scorer} |")
    table = "\n".join(["| metric | value | 95 % interval | scorer |", "|---|---|---|---|", *rows])
    write_whole(card, f"{text}\n\n{_HEADING}\n\nOn {data}; computed by {software}.\n\n{table}\n".encode())


UNSCORED = "the data set has no references or answers (a test split), so nothing was scored: hand in the official result file"


def write_metrics(
    path: Path,
    task: Task,
    scores: Mapping[str, Score],
    *,
    items: int,
    trained: Mapping[str, int],
    seconds: float,
    bad: tuple[BadSample, ...],
    step_seconds: float | None = None,
) -> None:
    """Write metrics.json.

    rows        by what was done to the model, the metrics by name
    intervals   the same, each metric's bootstrap interval (low, high)
    scorers     by metric, what it equals, with the version; `software` computed it
    note        about what was scored; in place of metrics, where there is nothing to score against
    """
    resampling = Resampling()
    intervals = {row: score.intervals(resampling) for row, score in scores.items()}
    metrics = {
        "task": task.name,
        "headline": scores[TRAINED].headline if scores else task.headline,
        "software": software(),
        "scorer": scores[TRAINED].scorer if scores else None,
        "scorers": {name: score.other_scorers.get(name, score.scorer) for score in scores.values() for name in score.metrics},
        "items": items,
        "rows": {row: dict(score.metrics) for row, score in scores.items()},
        "intervals": {row: {name: [found.low, found.high] for name, found in of_row.items()} for row, of_row in intervals.items()},
        "resampling": vars(resampling),
        "trained_parameters": dict(trained),
        "seconds_to_generate": round(seconds, 2),
        **({} if step_seconds is None else {"step_ms": round(1000 * step_seconds, 3)}),
        "bad_samples": [vars(sample) for sample in bad],
    }
    if note := scores[TRAINED].note if scores else UNSCORED:
        metrics["note"] = note
    write_whole(path, (json.dumps(metrics, indent=2) + "\n").encode())


def write_card_metrics(folder: Path, score: Score, *, split: str, items: int, best: str = "") -> None:
    """Put the trained adapter's metrics into its model card. best: which step its weights are of, where that is not the last one."""
    data = f"the validation data of the run ({split}, {counted(items, 'item')}{best and ', '}{best})"
    metrics = {name: value for name, value in score.metrics.items() if name not in score.other_scorers}
    add_metrics(folder, metrics, score.intervals(Resampling()), scorer=score.scorer, software=software(), data=data)


# ----------------------------------------
# The report of a run: its curves, table, and images with their texts.


_UNSCORED = Score(metrics={}, headline="", items={}, scorer="nothing")  # a test split
N_CARDS = 24  # images on the page: enough to judge by, about half a megabyte


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
    value = trained.metrics.get(trained.headline)
    headline = "not scored, for want of references:" if not trained.metrics else f"{trained.headline} {'undefined' if value is None else f'{value:.1f}'} on"
    parts = f"{model.tower.name} and {model.language.name}, both frozen" if model.tower.name else f"{model.language.name}, frozen"
    kinds = [*(type(method).__name__ for method in adapter.methods.values()), *(["trained connector"] if adapter.copies else [])]
    report = Report(
        title=f"{task.name}: {' + '.join(kinds)}",
        summary=f"{parts}; {sum(counts.values()):,} trained parameters; "
        f"{headline} {counted(len(predictions.texts), 'item')}{'; ' * bool(warning)}{warning}",
        scorer=trained.scorer,
        rows=[MetricRow(name=name, values=score.metrics) for name, score in scores.items()],
        representation=[MetricRow(name=name, values=values) for name, values in representation_rows(read_representation(folder)).items()],
        trained=[Trained(name=name, parameters=count) for name, count in counts.items()],
        frozen_parameters=frozen,
        curves=_curves(folder / METRICS_FILE, "nats per token" if model.head is None else ", ".join(model.head.loss_name[::-1])),
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
    names = {"loss": "loss", "rate": "learning rate", VAL_LOSS: "validation loss"}  # and the task's headline metric, where it was measured
    keys = dict.fromkeys(key for line in lines for key in line if key != "step")
    points = {key: [(line["step"], line[key]) for line in lines if key in line] for key in keys}
    return [Curve(name=names.get(key, key), points=points[key], unit=unit if key in ("loss", VAL_LOSS) else "") for key in keys]


def _cards(source: SampleSource, task: Task, predictions: Predictions, score: Score) -> Iterator[CaptionCard | AnswerCard]:
    """Images spread evenly over the data set, each with one of the things that the task asked about it."""
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
        if task.name in ("vqa", "text"):
            question = answers[item]
            share = None if points is None else points / 100
            both = " | ".join(filter(None, (question.text, question.pair)))
            yield AnswerCard(
                key=sample.key, image=_image(sample), question=both, generated=generated, answers=question.answers, score=share
            )  # fmt: skip
        else:
            yield CaptionCard(key=sample.key, image=_image(sample), generated=generated, references=sample.captions, score=points)


def _image(sample: Sample) -> bytes | None:
    try:
        return read_image_bytes(sample.images[0]) if sample.images else None
    except DataError:
        return None


def _bad(file: Path, predictions: Predictions) -> dict[str, list[str]]:
    bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    reasons: dict[str, list[str]] = {}
    for reason, key in [*((row["reason"], row["key"]) for row in bad), *((sample.reason, sample.key) for sample in predictions.bad)]:
        reasons.setdefault(reason, []).append(key)
    return reasons
