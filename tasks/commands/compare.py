"""`adalink compare` and `adalink runs`: two files of results, or run folders on the same data with a page of the images that changed sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from adalink.errors import ConfigError, DataError
from tasks.commands import Command
from tasks.commands.score import JSON_HELP, given_arguments
from tasks.evaluation.compare import (
    ANSWER_IS_RIGHT,
    CAPTION_IS_RIGHT,
    Comparison,
    Pair,
    compare_answers,
    compare_captions,
    comparison_json,
    comparison_table,
    difference_lines,
    write_pairs,
)
from tasks.metrics.bootstrap import Resampling, software
from tasks.metrics.files import (
    check_questions,
    check_split,
    empty_captions,
    read_answer_results,
    read_caption_results,
    read_graded_questions,
    read_references,
)
from tasks.metrics.vqa import VQA_SCORERS, VqaScorer, refuse

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from tasks.evaluation.compare import Asked, SavedRun
    from tasks.report.compare_pages import FlipCard, FlipPage

__all__ = ["COMPARE_COCO", "COMPARE_RUNS", "COMPARE_VQA", "RUNS", "compare_coco", "compare_runs", "compare_vqa"]

_MOST_CARDS = 24  # images of each direction on the page, about half a megabyte together


def compare_runs(
    *,
    before: Path,
    after: Path,
    scorer: VqaScorer | None = None,
    resamples: int = 1000,
    right_from: float | None = None,
    items: Path | None = None,
    report: Path | None = None,
) -> Comparison:
    """Compare two run folders of `adalink train` or `adalink evaluate`: metrics with paired intervals, flips, and a page with images.

    Args:
        before: The run folder of the first run.
        after: The run folder of the second run, on the same data.
        scorer: The VQA accuracy of both; by default the one that both runs chose.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The metric from which on an item counts as right; in percent; by default a CIDEr of 100, an accuracy of 50.
        items: A file to write both metrics of each item to, as JSON.
        report: The page; by default comparison.html in the second folder.
    """
    from tasks.evaluation.compare import read_run
    from tasks.report.compare_pages import write_flip_page
    from tasks.vqa import graded_question

    runs = read_run(before), read_run(after)
    asked = _same_items(*runs)
    resampling = Resampling(n_resamples=resamples)
    if runs[0].task == "captioning":
        references = {item: one.people for item, one in asked.items()}
        limit = CAPTION_IS_RIGHT if right_from is None else right_from
        comparison = compare_captions(runs[0].texts, runs[1].texts, references, resampling=resampling, right_from=limit)
    else:
        graded = [graded_question(one.question) for one in asked.values() if one.question is not None]
        limit = ANSWER_IS_RIGHT if right_from is None else right_from
        chosen = _scorer(runs, scorer)
        comparison = compare_answers(runs[0].texts, runs[1].texts, graded, scorer=chosen, resampling=resampling, right_from=limit)
    if items is not None:
        write_pairs(items, comparison)
    write_flip_page(_page(comparison, before, after, asked), report or after / "comparison.html")
    return comparison


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
    """Compare the captions of two runs: every metric with a paired interval of its difference, and the images that changed sides.

    Args:
        before: Captions of the first run, in the official result format.
        after: Captions of the second run, for the same images.
        references: Human captions in COCO's format; with a split, Karpathy's dataset_coco.json.
        split: The part of Karpathy's file that was captioned, such as test.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The CIDEr in percent from which on an image counts as right.
        items: A file to write both metrics of each image to, as JSON.
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
        scorer: official normalises answers only where people disagree, as the official script does; normalized does so always; others: see score vqa.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The accuracy in percent from which on a question counts as right.
        items: A file to write both metrics of each question to, as JSON.
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


def _same_items(first: SavedRun, second: SavedRun) -> dict[int, Asked]:
    """What both runs answered. Raises DataError where they are of other tasks, items or references."""
    from tasks.evaluation.compare import asked_items

    if first.task != second.task:
        raise DataError(f"{first.folder} is a run of {first.task}, {second.folder} one of {second.task}; expected two of one task")
    advice = f"{len(first.texts)} and {len(second.texts)} items; expected two runs evaluated on the same data"
    refuse([item for item in first.texts if item not in second.texts], f"items of {first.folder} are not in {second.folder}", advice)
    refuse([item for item in second.texts if item not in first.texts], f"items of {second.folder} are not in {first.folder}", advice)
    asked = asked_items(first, first.open())
    bare = [item for item, one in asked.items() if not one.people]
    refuse(bare, f"items of {first.folder} have no references or answers", "expected a data set that can be scored; is it a test split?")
    if second.data != first.data:
        others = asked_items(second, second.open())
        different = [item for item, one in asked.items() if (others[item].people, others[item].question) != (one.people, one.question)]
        refuse(different, "items have other references in the second run", f"expected {first.folder} and {second.folder} on the same data")
    return asked


def _scorer(runs: Sequence[SavedRun], given: VqaScorer | None) -> VqaScorer:
    chosen = {given} if given is not None else {run.scorer for run in runs}
    if len(chosen) > 1:
        found = " and ".join(f"{run.folder} was scored as {run.scorer}" for run in runs)
        raise ConfigError(f"{found}; give --scorer, one of {', '.join(VQA_SCORERS)}")
    name = chosen.pop()
    if name not in get_args(VqaScorer):
        raise DataError(f"the runs chose the scorer {name!r}, which there is not; give --scorer, one of {', '.join(VQA_SCORERS)}")
    return cast("VqaScorer", name)


def _page(comparison: Comparison, before: Path, after: Path, asked: Mapping[int, Asked]) -> FlipPage:
    from tasks.report.compare_pages import DifferenceRow, FlipPage, FlipSection

    displayed, hidden = difference_lines(comparison)
    n_items, right = len(comparison.pairs), f"right from {comparison.right_from:g} on"
    lost, gained = comparison.right_to_wrong, comparison.wrong_to_right
    return FlipPage(
        title=f"{after} compared with {before}",
        summary=f"{n_items:,} {comparison.unit}, {right}; negative flip rate {100 * comparison.negative_flip_rate:.2f} %, "
        f"positive flip rate {100 * comparison.positive_flip_rate:.2f} %",
        scorer=f"{comparison.scorer}; computed by {software()}",
        rows=[
            DifferenceRow(
                name=row.name,
                n=row.n,
                before=row.before,
                after=row.after,
                interval=(row.interval.low, row.interval.high) if row.interval else None,
                is_sure=row.is_sure,
            )
            for row in displayed
        ],
        n_hidden_rows=hidden,
        sections=[
            FlipSection(name="Right to wrong", tone="bad", n_changed=len(lost), cards=list(_cards(lost[:_MOST_CARDS], asked))),
            FlipSection(name="Wrong to right", tone="good", n_changed=len(gained), cards=list(_cards(gained[:_MOST_CARDS], asked))),
        ],
    )


def _cards(changed: Sequence[Pair], asked: Mapping[int, Asked]) -> Iterator[FlipCard]:
    from multimodal.data.images.decode import read_image_bytes
    from tasks.report.compare_pages import FlipCard

    for flip in changed:
        one = asked[int(flip.item)]
        try:
            image = read_image_bytes(one.sample.images[0]) if one.sample.images else None
        except DataError:
            image = None
        yield FlipCard(
            key=f"{flip.item}",
            image=image,
            question=one.question.text if one.question else "",
            said_before=flip.said_before,
            said_after=flip.said_after,
            before=flip.before,
            after=flip.after,
            people=one.people,
        )


def _add_compared_runs(parser: Any) -> None:
    parser.add_argument("before", type=Path, metavar="RUN_A", help="the run folder of the first run, of `adalink train` or `adalink evaluate`")
    parser.add_argument("after", type=Path, metavar="RUN_B", help="the run folder of the second run, on the same data")
    parser.add_argument("more", type=Path, nargs="*", default=[], metavar="RUN_C", help="more runs: a table of all, and their curves over each other")
    parser.add_function_arguments(compare_runs, skip={"before", "after"})
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def _compare_runs(values: Any, plain: Any) -> None:
    """Print how run folders differ, and where the page is: of two with the images that changed sides, of more with their curves."""
    from tasks.runs.table import compare_many, many_json, many_table

    report = values.report or (values.more or [values.after])[-1] / "comparison.html"
    if values.more:
        runs = compare_many([values.before, values.after, *values.more], report)
        print(many_json(runs) if values.json else many_table(runs))
    else:
        _print(compare_runs, values)
    if not values.json:
        print(f"report: {report}")


def _list_runs(values: Any, plain: Any) -> None:
    from tasks.runs.table import listed_runs

    listed_runs(folder=values.folder)


def _add_runs(parser: Any) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="the folder that holds the run folders")


def _print(function: Callable[..., Comparison], values: Any) -> None:
    comparison = function(**given_arguments(values))
    print(comparison_json(comparison) if values.json else comparison_table(comparison))


def _compared(function: Callable[..., Comparison], *examples: str) -> Command:
    def add(parser: Any) -> None:
        parser.add_function_arguments(function)
        parser.add_argument("--json", action="store_true", help=JSON_HELP)

    return Command(add, lambda values, plain: _print(function, values), examples)


COMPARE_RUNS = Command(
    _add_compared_runs, _compare_runs, ("adalink compare runs/before runs/after", "adalink compare runs/a runs/b runs/c --report curves.html")
)
COMPARE_COCO = _compared(compare_coco, "adalink compare coco --before before.json --after after.json --references captions_val2014.json")
COMPARE_VQA = _compared(compare_vqa, "adalink compare vqa --before before.json --after after.json --annotations annotations.json")
RUNS = Command(_add_runs, _list_runs, ("adalink runs", "adalink runs runs/sweep"))
