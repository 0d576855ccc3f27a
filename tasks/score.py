"""What `adalink score ...` does: official figures of a file of results, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from adalink.atomic import write_whole
from tasks.metrics.answer_files import check_questions, read_answer_results, read_graded_questions, read_question_ids
from tasks.metrics.bootstrap import Figures, Resampling, answer_figures, caption_figures, intervals
from tasks.metrics.caption_files import check_split, empty_captions, read_caption_results, read_references
from tasks.metrics.captions import score_captions
from tasks.metrics.java_captions import JavaScores, meteor, spice
from tasks.metrics.listing import Figure, Listing
from tasks.metrics.vqa import GradedQuestion, QuestionId, VqaScorer, named_accuracies, score_answers

__all__ = ["score_coco", "score_vqa"]

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
        items: A file to write each image's figures to, as JSON.
    """
    expected = read_references(references, split)
    given = read_caption_results(results)
    check_split(given, expected, results, references)
    scores = score_captions(given, expected)
    extra: dict[str, JavaScores] = {name: _JAVA[name](given, expected) for name in java or ()}
    values = {name: (value, scores.scorer) for name, value in scores.corpus.items()}
    values |= {name: (java_scores.corpus, java_scores.scorer) for name, java_scores in extra.items()}
    source = {"references": str(references), "results": str(results)} | ({"split": split} if split else {})
    notes = empty_captions(given, results)
    listing = _listing(source, values, caption_figures(scores), "images", Resampling(n_resamples=resamples), notes)
    if items is not None:
        rows = [{"image_id": image, "caption": given[image], **row, **_of_image(extra, image)} for image, row in scores.per_image.items()]
        _write_items(items, rows)
    return listing


def score_vqa(
    *,
    annotations: Path,
    results: Path,
    questions: Path | None = None,
    scorer: VqaScorer = "official",
    resamples: int = 1000,
    items: Path | None = None,
) -> Listing:
    """Score answers with the VQA accuracy: overall, by answer type and by question type, in percent.

    Args:
        annotations: People's answers, in the format of VQAv2, OK-VQA, A-OKVQA, TextVQA, VizWiz, GQA or DAQUAR.
        results: Predicted answers in the official result format, a list of question_id and answer, one for every question.
        questions: The questions file of VQAv2's format; it must ask what the annotations answer.
        scorer: official normalises answers only where people disagree, as the official script does; normalized does so always.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        items: A file to write each question's accuracy to, as JSON.
    """
    graded = read_graded_questions(annotations)
    ids = [question.question_id for question in graded]
    if questions is not None:
        check_questions(read_question_ids(questions), ids, questions, annotations)
    given = read_answer_results(results)
    check_questions(given, ids, results, annotations)
    scores = score_answers(given, graded, scorer)
    values = {name: (value, scores.scorer) for name, value in named_accuracies(scores).items()}
    source = {"annotations": str(annotations), "results": str(results)} | ({"questions": str(questions)} if questions else {})
    listing = _listing(source, values, answer_figures(scores, graded), "questions", Resampling(n_resamples=resamples))
    if items is not None:
        _write_items(items, _question_rows(graded, given, scores.per_question))
    return listing


def _listing(
    source: Mapping[str, str], values: Mapping[str, tuple[float, str]], figures: Figures, unit: str, resampling: Resampling, notes: Sequence[str] = ()
) -> Listing:
    found = intervals(figures, resampling)
    rows = [Figure(name=name, value=value, scorer=scorer, interval=found.get(name)) for name, (value, scorer) in values.items()]
    return Listing(source=source, n_items=figures.items, unit=unit, figures=rows, resampling=resampling, notes=notes)


def _of_image(extra: Mapping[str, JavaScores], image: int) -> dict[str, float]:
    return {name: scores.per_image[image] for name, scores in extra.items()}


def _question_rows(
    graded: Sequence[GradedQuestion], given: Mapping[QuestionId, str], accuracy: Mapping[QuestionId, float]
) -> list[Mapping[str, object]]:
    return [
        {
            "question_id": question.question_id,
            "answer": given[question.question_id],
            "accuracy": accuracy[question.question_id],
            "answer_type": question.answer_type,
            "question_type": question.question_type,
        }
        for question in graded
    ]


def _write_items(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    write_whole(path, (json.dumps(rows, indent=1) + "\n").encode("ascii"))
