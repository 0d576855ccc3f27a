"""What `adalink compare ...` does with two files of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tasks.compare import ANSWER_IS_RIGHT, CAPTION_IS_RIGHT, Comparison, compare_answers, compare_captions
from tasks.compare_listing import write_pairs
from tasks.metrics.answer_files import check_questions, read_answer_results, read_graded_questions
from tasks.metrics.bootstrap import Resampling
from tasks.metrics.caption_files import check_split, empty_captions, read_caption_results, read_references
from tasks.metrics.vqa import VqaScorer

__all__ = ["compare_coco", "compare_vqa"]


def compare_coco(
    *,
    before: Path,
    after: Path,
    references: Path,
    split: str | None = None,
    resamples: int = 1000,
    right_from: float = CAPTION_IS_RIGHT,
    items: Path | None = None,
) -> Comparison:
    """Compare the captions of two runs: every figure with a paired interval of its difference, and the images that changed sides.

    Args:
        before: Captions of the first run, in the official result format.
        after: Captions of the second run, for the same images.
        references: Human captions in COCO's format; with a split, Karpathy's dataset_coco.json.
        split: The part of Karpathy's file that was captioned, such as test.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The CIDEr in percent from which on an image counts as right.
        items: A file to write both figures of each image to, as JSON.
    """
    expected = read_references(references, split)
    runs = {path: read_caption_results(path) for path in (before, after)}
    for path, given in runs.items():
        check_split(given, expected, path, references)
    comparison = compare_captions(
        runs[before], runs[after], expected, resampling=Resampling(n_resamples=resamples), right_from=right_from
    )
    comparison = replace(comparison, notes=[note for path, given in runs.items() for note in empty_captions(given, path)])
    if items is not None:
        write_pairs(items, comparison)
    return comparison


def compare_vqa(
    *,
    before: Path,
    after: Path,
    annotations: Path,
    scorer: VqaScorer = "official",
    resamples: int = 1000,
    right_from: float = ANSWER_IS_RIGHT,
    items: Path | None = None,
) -> Comparison:
    """Compare the answers of two runs: every accuracy with a paired interval of its difference, and the questions that changed sides.

    Args:
        before: Answers of the first run, in the official result format.
        after: Answers of the second run, to the same questions.
        annotations: People's answers, in the format of VQAv2, OK-VQA, A-OKVQA, TextVQA, VizWiz, GQA or DAQUAR.
        scorer: official normalises answers only where people disagree, as the official script does; normalized does so always.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The accuracy in percent from which on a question counts as right.
        items: A file to write both figures of each question to, as JSON.
    """
    graded = read_graded_questions(annotations)
    runs = {path: read_answer_results(path) for path in (before, after)}
    for path, given in runs.items():
        check_questions(given, [question.question_id for question in graded], path, annotations)
    comparison = compare_answers(
        runs[before], runs[after], graded, scorer=scorer, resampling=Resampling(n_resamples=resamples), right_from=right_from
    )
    if items is not None:
        write_pairs(items, comparison)
    return comparison
