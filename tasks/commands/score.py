"""`adalink score ...`: official metrics of a file of results, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from adalink.errors import ConfigError
from adalink.files import write_whole
from tasks.commands import Command
from tasks.metrics.bootstrap import Listing, Metrics, MetricValue, Resampling, answer_metrics, as_json, as_table, caption_metrics, intervals
from tasks.metrics.captions import JavaScores, meteor, score_captions, spice
from tasks.metrics.files import (
    check_questions,
    check_split,
    empty_captions,
    read_answer_results,
    read_caption_results,
    read_graded_questions,
    read_question_ids,
    read_references,
    scored_benchmark,
)
from tasks.metrics.vqa import GradedQuestion, QuestionId, VqaScorer, few_answers_note, fitting_scorer, named_accuracies, score_answers

__all__ = ["JSON_HELP", "SCORE_COCO", "SCORE_VQA", "given_arguments", "score_coco", "score_vqa"]

JSON_HELP = "print JSON in place of the table"

_FRACTION = 100.0  # the official caption metrics are fractions
_IN_ITEMS: Mapping[VqaScorer, str] = {"anls": "anls", "relaxed": "relaxed_accuracy"}
_JAVA = {"METEOR": meteor, "SPICE": spice}


def score_coco(
    *,
    references: Path,
    results: Path,
    split: str | None = None,
    java: list[Literal["METEOR", "SPICE"]] | None = None,
    resamples: int = 1000,
    items: Path | None = None,
) -> Listing:
    """Score captions as the official COCO evaluation does: CIDEr, BLEU and ROUGE-L, equal to pycocoevalcap's.

    Args:
        references: Human captions in COCO's format, such as captions_val2014.json; with a split, Karpathy's dataset_coco.json.
        results: Generated captions in the official result format, a list of image_id and caption, one for every image.
        split: The part of Karpathy's file that was captioned, such as test or train+restval.
        java: Also METEOR and SPICE, through pycocoevalcap and Java, such as '[METEOR]'.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        items: A file to write each image's metrics to, as JSON.
    """
    expected = read_references(references, split)
    given = read_caption_results(results)
    check_split(given, expected, results, references)
    scores = score_captions(given, expected)
    extra: dict[str, JavaScores] = {name: _JAVA[name](given, expected) for name in java or ()}
    resampling = Resampling(n_resamples=resamples)
    rows = _rows(scores.corpus, scores.scorer, caption_metrics(scores), resampling, _FRACTION)
    rows += [MetricValue(name=name, value=java_scores.corpus, scorer=java_scores.scorer, scale=_FRACTION) for name, java_scores in extra.items()]
    source = {"references": str(references), "results": str(results)} | ({"split": split} if split else {})
    listing = Listing(
        source=source, n_items=len(given), unit="images", metrics=rows, resampling=resampling, notes=empty_captions(given, results)
    )  # fmt: skip
    if items is not None:
        metrics = scores.per_image.items()
        _write_items(items, [{"image_id": image, "caption": given[image], **row, **_of_image(extra, image)} for image, row in metrics])
    return listing


def score_vqa(
    *,
    annotations: Path,
    results: Path,
    questions: Path | None = None,
    split: str | None = None,
    scorer: VqaScorer | None = None,
    resamples: int = 1000,
    items: Path | None = None,
) -> Listing:
    """Score answers with the VQA accuracy, or as their benchmark does: overall, by answer type and by question type, in percent.

    Args:
        annotations: People's answers, in the format of VQAv2, OK-VQA, A-OKVQA, TextVQA, VizWiz, GQA, DAQUAR, DocVQA, InfographicVQA, ST-VQA,
            ChartQA, ScienceQA or AI2D (its folder).
        results: Predicted answers in the official result format, a list of question_id and answer, one for every question.
        questions: The questions file of VQAv2's format; it must ask what the annotations answer.
        split: The part of ScienceQA's file or AI2D's folder that was answered, such as test.
        scorer: official normalises answers only where people disagree, as the official script does; normalized does so always; exact is the
            exact match with one of the answers, which is given beside the others where questions have too few answers for them; anls is that of
            DocVQA, InfographicVQA and ST-VQA; relaxed that of ChartQA (numbers within 5 %); choice compares the letter of a choice.
            By default the benchmark's own, else official.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        items: A file to write each question's accuracy to, as JSON.

    Raises ConfigError where a split is given for a file that holds one.
    """
    benchmark = scored_benchmark(annotations, scorer)
    if split is not None and benchmark is None:
        raise ConfigError(f"{annotations} holds one split: leave split {split!r} out")
    graded = read_graded_questions(annotations, benchmark, split)
    scorer = scorer or cast("VqaScorer", benchmark.scorer if benchmark else "official")
    ids = [question.question_id for question in graded]
    if questions is not None:
        check_questions(read_question_ids(questions), ids, questions, annotations)
    given = read_answer_results(results)
    check_questions(given, ids, results, annotations)
    scores = score_answers(given, graded, scorer)
    found = {_IN_ITEMS.get(scorer, "accuracy"): scores}
    rows = _rows(named_accuracies(scores), scores.scorer, answer_metrics(scores, graded), Resampling(n_resamples=resamples))
    if scorer != fitting_scorer(scorer, graded):
        found["exact_match"] = exact = score_answers(given, graded, "exact")
        names = {name: "exact match" if name == "overall" else f"exact match, {name}" for name in named_accuracies(exact)}
        values = {names[name]: value for name, value in named_accuracies(exact).items()}
        metrics = answer_metrics(exact, graded).chosen({new: old for old, new in names.items()})
        rows += _rows(values, exact.scorer, metrics, Resampling(n_resamples=resamples))
    source = {"annotations": str(annotations), "results": str(results)} | ({"questions": str(questions)} if questions else {})
    listing = Listing(
        source=source, n_items=len(graded), unit="questions", metrics=rows, resampling=Resampling(n_resamples=resamples), notes=few_answers_note(scorer, graded)
    )  # fmt: skip
    if items is not None:
        _write_items(items, _question_rows(graded, given, {name: one.per_question for name, one in found.items()}))
    return listing


def _rows(values: Mapping[str, float], scorer: str, metrics: Metrics, resampling: Resampling, scale: float = 1.0) -> list[MetricValue]:
    found = intervals(metrics, resampling)
    return [MetricValue(name=name, value=value, scorer=scorer, scale=scale, interval=found.get(name)) for name, value in values.items()]


def _of_image(extra: Mapping[str, JavaScores], image: int) -> dict[str, float]:
    return {name: scores.per_image[image] for name, scores in extra.items()}


def _question_rows(
    graded: Sequence[GradedQuestion], given: Mapping[QuestionId, str], metrics: Mapping[str, Mapping[QuestionId, float]]
) -> list[Mapping[str, object]]:
    return [
        {
            "question_id": question.question_id,
            "answer": given[question.question_id],
            **{name: by_question[question.question_id] for name, by_question in metrics.items()},
            "answer_type": question.answer_type,
            "question_type": question.question_type,
        }
        for question in graded
    ]


def _write_items(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    write_whole(path, (json.dumps(rows, indent=1) + "\n").encode("ascii"))


def given_arguments(values: Any) -> dict[str, Any]:
    """The parsed values by name, for a function that takes them."""
    # Not vars(): the parser keeps `items` under another name, because its own class has a method of that name.
    return {name: value for name, value in values.as_dict().items() if name not in ("json", "more")}


def _scored(function: Callable[..., Listing], *examples: str) -> Command:
    def add(parser: Any) -> None:
        parser.add_function_arguments(function)
        parser.add_argument("--json", action="store_true", help=JSON_HELP)

    def run(values: Any, plain: Any) -> None:
        listing = function(**given_arguments(values))
        print(as_json(listing) if values.json else as_table(listing))

    return Command(add, run, examples)


SCORE_COCO = _scored(
    score_coco,
    "adalink score coco --references captions_val2014.json --results results.json",
    "adalink score coco --references dataset_coco.json --split test --results results.json --json",
)
SCORE_VQA = _scored(
    score_vqa,
    "adalink score vqa --questions questions.json --annotations annotations.json --results results.json",
    "adalink score vqa --annotations val_v1.0_withQT.json --results results.json",
)
