"""Two runs on the same items: what changed, how surely, and which items went from right to wrong and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import yaml

from adalink.errors import DataError
from adalink.files import write_whole
from multimodal.sample import Question, Sample, SampleSource
from tasks.evaluation.flip_rates import FlipRates, Pair, flip_rates
from tasks.metrics.bootstrap import Interval, Metrics, Resampling, aligned, answer_metrics, caption_metrics, paired_intervals, software
from tasks.metrics.captions import score_captions
from tasks.metrics.files import read_answer_results, read_caption_results
from tasks.metrics.vqa import (
    VQA_SCORERS,
    GradedQuestion,
    Predictions,
    QuestionId,
    VqaScorer,
    few_answers_note,
    fitting_scorer,
    named_accuracies,
    names_of_types,
    score_answers,
)

__all__ = [
    "ANSWER_IS_RIGHT", "CAPTION_IS_RIGHT", "Asked", "Comparison", "Difference", "Pair", "SavedRun", "asked_items",
    "compare_answers", "compare_captions", "comparison_json", "comparison_table", "difference_lines", "graded_questions", "read_run", "right_items",
    "write_pairs",
]  # fmt: skip


Item = TypeVar("Item", bound=QuestionId)

# From which metric on an item counts as right. An answer: at least two of ten people gave it. A caption: a CIDEr of 100 percent, about what one
# person's caption reaches against those of others (corpus CIDEr of human captions is near 90 percent).
ANSWER_IS_RIGHT = 50.0
CAPTION_IS_RIGHT = 100.0
_NOTHING = 1e-9  # percent; BLEU of no word in common is a little above 0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A corpus metric of both runs in percent, of n items; interval is that of after - before, paired, None without resamples or for one item."""

    name: str
    n: int
    before: float
    after: float
    interval: Interval | None

    @property
    def is_sure(self) -> bool:
        """True where the interval of the difference does not hold zero."""
        return self.interval is not None and (self.interval.low > _NOTHING or self.interval.high < -_NOTHING)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same items.

    unit         what an item is: "images" or "questions"
    pairs        every item, in the order of the data set
    differences  every corpus metric, those of types included
    rates        how many items changed sides, of all and by type, and how far their metrics moved
    right_from   the metric from which on an item counts as right
    scorer       what computed the metrics, with its version
    notes        sentences about what was scored
    """

    unit: str
    pairs: Sequence[Pair]
    differences: Sequence[Difference]
    rates: FlipRates
    right_from: float
    scorer: str
    notes: Sequence[str] = ()

    @property
    def right_to_wrong(self) -> list[Pair]:
        """Items that only the first run has right, the greatest loss first."""
        lost = [pair for pair in self.pairs if pair.after < self.right_from <= pair.before]
        return sorted(lost, key=lambda pair: pair.after - pair.before)

    @property
    def wrong_to_right(self) -> list[Pair]:
        """Items that only the second run has right, the greatest gain first."""
        gained = [pair for pair in self.pairs if pair.before < self.right_from <= pair.after]
        return sorted(gained, key=lambda pair: pair.before - pair.after)

    @property
    def negative_flip_rate(self) -> float:
        """Share of all items that were right before and are wrong now (MUSCLE: Echterhoff et al. 2024, arXiv 2407.09435)."""
        return self.rates.counts.negative

    @property
    def positive_flip_rate(self) -> float:
        """Share of all items that were wrong before and are right now."""
        return self.rates.counts.positive


def compare_captions(
    before: Mapping[int, str],
    after: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    *,
    resampling: Resampling | None = None,
    right_from: float = CAPTION_IS_RIGHT,
    margin: float = 0.0,
) -> Comparison:
    """The captions of two runs.

    right_from   an image is right from this CIDEr on, in percent
    margin       CIDEr in percent that an image must lose to be counted as losing

    Raises DataError where one of the runs is not for exactly the images of the references.
    """
    scores = score_captions(before, references), score_captions(after, references)
    items = [{image: 100 * row["CIDEr"] for image, row in run.per_image.items()} for run in scores]
    corpora = [{name: 100 * value for name, value in run.corpus.items()} for run in scores]
    metrics = [caption_metrics(run).chosen(tuple(run.corpus), scale=100) for run in scores]
    pairs, resampling = _pairs(before, after, items[0], items[1]), resampling or Resampling()
    return Comparison(
        unit="images",
        pairs=pairs,
        differences=_differences(corpora, metrics, resampling),
        rates=flip_rates(pairs, right_from, margin=margin, resampling=resampling),
        right_from=right_from,
        scorer=scores[0].scorer,
    )


def compare_answers(
    before: Predictions,
    after: Predictions,
    questions: Sequence[GradedQuestion],
    *,
    scorer: VqaScorer = "official",
    resampling: Resampling | None = None,
    right_from: float = ANSWER_IS_RIGHT,
    margin: float = 0.0,
) -> Comparison:
    """The answers of two runs.

    scorer       gives way to `exact` where most of the questions have too few answers for it
    right_from   a question is right from this accuracy on, in percent
    margin       accuracy in percent that a question must lose to be counted as losing

    Raises DataError where one of the runs does not answer exactly these questions.
    """
    fitting = fitting_scorer(scorer, questions)
    scores = score_answers(before, questions, fitting), score_answers(after, questions, fitting)
    stated = cast("Mapping[QuestionId, str]", before), cast("Mapping[QuestionId, str]", after)
    metrics = [answer_metrics(run, questions) for run in scores]
    pairs, resampling = _pairs(stated[0], stated[1], scores[0].per_question, scores[1].per_question), resampling or Resampling()
    corpora = [named_accuracies(run) for run in scores]
    types = {question.question_id: names_of_types(question) for question in questions}
    return Comparison(
        unit="questions",
        pairs=pairs,
        differences=_differences(corpora, metrics, resampling),
        rates=flip_rates(
            pairs, right_from, types=[[name for name in types[pair.item] if name in corpora[0]] for pair in pairs], margin=margin, resampling=resampling
        ),
        right_from=right_from,
        scorer=scores[0].scorer,
        notes=few_answers_note(scorer, questions),
    )


def right_items(run: SavedRun, asked: Mapping[int, Asked], scorer: VqaScorer, right_from: float) -> frozenset[QuestionId]:
    """The items that a run has right, from this metric on; scorer: of answers. asked: see `asked_items`."""
    if run.task == "captioning":
        per_image = score_captions(run.texts, {item: one.people for item, one in asked.items()}).per_image
        return frozenset(item for item, row in per_image.items() if 100 * row["CIDEr"] >= right_from)
    graded = graded_questions(asked)
    per_question = score_answers(run.texts, graded, fitting_scorer(scorer, graded)).per_question
    return frozenset(item for item, value in per_question.items() if value >= right_from)


def graded_questions(asked: Mapping[int, Asked]) -> list[GradedQuestion]:
    """The questions that a run answered, as the scorers take them."""
    from tasks.vqa import graded_question  # late: what only compares files needs no task

    return [graded_question(one.question) for one in asked.values() if one.question is not None]


def _differences(corpora: Sequence[Mapping[str, float]], metrics: Sequence[Metrics], resampling: Resampling) -> list[Difference]:
    before, after = corpora
    found = paired_intervals(metrics[0], metrics[1], resampling)
    return [Difference(name=name, n=metrics[0].n_of(name), before=value, after=after[name], interval=found.get(name)) for name, value in before.items()]


def _pairs(
    said_before: Mapping[Item, str], said_after: Mapping[Item, str], before: Mapping[Item, float], after: Mapping[Item, float]
) -> list[Pair]:
    return [
        Pair(item=item, said_before=said_before[item], said_after=said_after[item], before=metric, after=after[item])
        for item, metric in before.items()
    ]


# ----------------------------------------
# A comparison of two runs as a table for people, as JSON for machines, and item by item.


_MOST_TYPES = 10  # question types in a table, those with the greatest changes; VQAv2 has 65
_MOST_CHANGED = 5  # of each direction on the screen; the report shows more, with images


def comparison_table(comparison: Comparison) -> str:
    """Lines for the screen: every metric with its difference and paired interval, then the flips."""
    rows = [("metric, in percent", "n", "before", "after", "difference", "95 % paired interval", "")]
    displayed, hidden = difference_lines(comparison)
    for row in displayed:
        between = f"{row.interval.low:+.4f} .. {row.interval.high:+.4f}" if row.interval else ""
        rows.append((row.name, f"{row.n:,}", f"{row.before:.4f}", f"{row.after:.4f}", f"{row.after - row.before:+.4f}", between, "*" if row.is_sure else ""))
    lines = [
        f"scorer: {comparison.scorer}; computed by {software()}",
        f"{len(comparison.pairs)} {comparison.unit}; * where the interval does not hold zero",
        *comparison.notes,
        "",
        *aligned(rows),
    ]
    if hidden:
        lines.append(f"and {hidden} question types that changed less")
    lines += comparison.rates.lines()
    lines += _flip_lines(comparison, "right to wrong", comparison.right_to_wrong, comparison.negative_flip_rate, "negative")
    lines += _flip_lines(comparison, "wrong to right", comparison.wrong_to_right, comparison.positive_flip_rate, "positive")
    return "\n".join(lines)


def difference_lines(comparison: Comparison) -> tuple[list[Difference], int]:
    """The rows of a table, and how many question types with lesser changes are left out of it."""
    by_question = [row for row in comparison.differences if row.name.startswith("question type")]
    displayed = [row for row in comparison.differences if row not in by_question]
    by_question.sort(key=lambda row: -abs(row.after - row.before))
    return displayed + by_question[:_MOST_TYPES], max(0, len(by_question) - _MOST_TYPES)


def comparison_json(comparison: Comparison) -> str:
    """One object: software, scorer, n_items, metrics by name (before, after, difference, interval), and the flips with their rates."""
    metrics = {
        row.name: {
            "n": row.n,
            "before": row.before,
            "after": row.after,
            "difference": row.after - row.before,
            "interval": [row.interval.low, row.interval.high] if row.interval else None,
        }
        for row in comparison.differences
    }
    document = {
        "software": software(),
        "scorer": comparison.scorer,
        "n_items": len(comparison.pairs),
        "unit": comparison.unit,
        "notes": list(comparison.notes),
        "figures": metrics,
        "right_from": comparison.right_from,
        "negative_flip_rate": comparison.negative_flip_rate,
        "positive_flip_rate": comparison.positive_flip_rate,
        "flips": comparison.rates.document(),
        "right_to_wrong": [vars(pair) for pair in comparison.right_to_wrong],
        "wrong_to_right": [vars(pair) for pair in comparison.wrong_to_right],
    }
    return json.dumps(document, indent=2)


def write_pairs(path: Path, comparison: Comparison) -> None:
    """Every item with the texts of both runs and its two metrics, as JSON."""
    write_whole(path, (json.dumps([vars(pair) for pair in comparison.pairs], indent=1) + "\n").encode("ascii"))


def _flip_lines(comparison: Comparison, name: str, changed: Sequence[Pair], rate: float, sign: str) -> list[str]:
    right = f"right from {comparison.right_from:g} on"
    lines = ["", f"{name}: {len(changed)} of {len(comparison.pairs)} {comparison.unit}, {sign} flip rate {100 * rate:.2f} % ({right})"]
    return lines + [f"  {flip.item}: {flip.said_before!r} ({flip.before:.2f}) -> {flip.said_after!r} ({flip.after:.2f})" for flip in changed[:_MOST_CHANGED]]


# ----------------------------------------
# A run folder read back: its texts and the settings of its data, for comparing it with another.


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What `adalink train` or `adalink evaluate` left in a folder.

    task     captioning or vqa
    texts    generated, by image id or question id
    data     the settings of the data set, as config.yaml has them
    scorer   the VQA scorer that the run chose
    """

    folder: Path
    task: str
    texts: Mapping[int, str]
    data: Mapping[str, object]
    scorer: str

    def open(self) -> SampleSource:
        """The data set that the run was evaluated on. Raises DataError where its files are gone."""
        from tasks.data.sources import saved_data  # late: what only compares files reads no images

        try:
            return saved_data(self.data).open().source
        except DataError as error:
            raise DataError(f"the data of the run {self.folder} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One item of a run with its image, and the question where there was one."""

    sample: Sample
    question: Question | None = None

    @property
    def people(self) -> tuple[str, ...]:
        """The texts of people: captions or answers."""
        return self.sample.captions if self.question is None else self.question.answers


def read_run(folder: Path) -> SavedRun:
    """Read a run folder. Raises DataError, saying which file, where it is none or something in it is of another shape."""
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        task, data = metrics["task"], config["data"]["val"]
        computed_by = {description: name for name, description in VQA_SCORERS.items()}
        scorer = (config.get("vqa") or {}).get("scorer") or computed_by.get(metrics.get("scorer"), "official")
    except OSError as error:
        raise DataError(f"{folder} is no run folder of `adalink train` or `adalink evaluate`: {error.filename} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"the run folder {folder} is damaged: metrics.json or config.yaml has another shape ({error!r}); evaluate it again") from None
    if task not in ("captioning", "vqa") or not isinstance(data, dict):
        raise DataError(f"the run {folder} is of the task {task!r} on the data {data!r}; expected captioning or vqa, and the settings of a data set")
    results = folder / "results.json"
    texts = read_caption_results(results) if task == "captioning" else read_answer_results(results)
    return SavedRun(folder=folder, task=task, texts={int(item): text for item, text in texts.items()}, data=data, scorer=scorer)


def asked_items(run: SavedRun, source: SampleSource) -> dict[int, Asked]:
    """What the run answered, in the order of its data set. Raises DataError where the data set lacks some of it."""
    found: dict[int, Asked] = {}
    for index in range(len(source)):
        sample = source[index]
        if run.task == "captioning" and sample.image_id in run.texts:
            found[sample.image_id] = Asked(sample=sample)
        for question in sample.questions if run.task == "vqa" else ():
            if question.question_id in run.texts:
                found[question.question_id] = Asked(sample=sample, question=question)
    if lost := [item for item in run.texts if item not in found]:
        raise DataError(f"{len(lost)} of {len(run.texts)} results of {run.folder} are not in its data set (first: {lost[0]}); was the data changed?")
    return found
