"""`adalink compare` and `adalink runs`: two files of results, or run folders on the same data with a page of the images that changed sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from adalink.errors import ConfigError, DataError, ScoreError
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
from tasks.evaluation.flip_rates import check_limit
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

_LIMIT_HELP = "exit code 3 where the negative flip rate is surely above this share, by the lower end of its interval: 0.02 for two items of a hundred"
_MOST_CARDS = 24  # images of each direction on the page, about half a megabyte together


def compare_runs(
    *,
    before: Path,
    after: Path,
    scorer: VqaScorer | None = None,
    resamples: int = 1000,
    right_from: float | None = None,
    margin: float = 0.0,
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
        margin: How much an item must lose to be counted as losing; in percent of its metric.
        items: A file to write both metrics of each item to, as JSON.
        report: The page; by default comparison.html in the second folder.
    """
    from tasks.evaluation.compare import read_run
    from tasks.report.compare_pages import write_flip_page

    runs = read_run(before), read_run(after)
    asked = _same_items(*runs)
    comparison = _comparison(*runs, asked, scorer, Resampling(n_resamples=resamples), right_from, margin)
    if items is not None:
        write_pairs(items, comparison)
    write_flip_page(_page(comparison, before, after, asked), report or after / "comparison.html")
    return comparison


def _comparison(
    first: SavedRun, second: SavedRun, asked: Mapping[int, Asked], scorer: VqaScorer | None, resampling: Resampling, right_from: float | None, margin: float
) -> Comparison:
    from tasks.evaluation.compare import graded_questions

    limit = _limit(first, right_from)
    if first.task == "captioning":
        references = {item: one.people for item, one in asked.items()}
        return compare_captions(first.texts, second.texts, references, resampling=resampling, right_from=limit, margin=margin)
    chosen, graded = _scorer((first, second), scorer), graded_questions(asked)
    return compare_answers(first.texts, second.texts, graded, scorer=chosen, resampling=resampling, right_from=limit, margin=margin)


def _limit(run: SavedRun, right_from: float | None) -> float:
    if right_from is not None:
        return right_from
    return CAPTION_IS_RIGHT if run.task == "captioning" else ANSWER_IS_RIGHT


def nfr_of_many(
    runs: Sequence[SavedRun], asked: Mapping[int, Asked], scorer: VqaScorer | None = None, right_from: float | None = None
) -> list[list[float]]:
    """Negative flip rates of several runs on the same items: row before, column after."""
    from tasks.evaluation.compare import right_items
    from tasks.evaluation.flip_rates import nfr_matrix

    chosen: VqaScorer = "official" if runs[0].task == "captioning" else _scorer(runs, scorer)
    limit = _limit(runs[0], right_from)
    return nfr_matrix([right_items(run, asked, chosen, limit) for run in runs], len(asked))


def _read_many(folders: Sequence[Path]) -> tuple[list[SavedRun], Mapping[int, Asked]]:
    """Several runs, and what all of them were asked. Raises DataError for runs on other items."""
    from tasks.evaluation.compare import read_run

    runs = [read_run(folder) for folder in folders]
    asked = _same_items(runs[0], runs[1])
    for run in runs[2:]:
        _same_items(runs[0], run)
    return runs, asked


def _checked(comparison: Comparison, most_negative: float | None, by_estimate: bool, where: str = "") -> None:
    """Raise ScoreError where more items flipped than a command was asked to allow."""
    if most_negative is None:
        return
    try:
        comparison.rates.check(most_negative, by_estimate=by_estimate)
    except ScoreError as error:
        raise ScoreError(f"{where}{error}") from None


def compare_coco(
    *,
    before: Path,
    after: Path,
    references: Path,
    split: str | None = None,
    resamples: int = 1000,
    right_from: float = CAPTION_IS_RIGHT,
    margin: float = 0.0,
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
        margin: How much CIDEr an image must lose to be counted as losing; in percent.
        items: A file to write both metrics of each image to, as JSON.
    """
    expected = read_references(references, split)
    runs = {path: read_caption_results(path) for path in (before, after)}
    for path, given in runs.items():
        check_split(given, expected, path, references)
    comparison = compare_captions(
        runs[before], runs[after], expected, resampling=Resampling(n_resamples=resamples), right_from=right_from, margin=margin
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
    margin: float = 0.0,
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
        margin: How much accuracy a question must lose to be counted as losing; in percent.
        items: A file to write both metrics of each question to, as JSON.
    """
    graded = read_graded_questions(annotations)
    runs = {path: read_answer_results(path) for path in (before, after)}
    for path, given in runs.items():
        check_questions(given, [question.question_id for question in graded], path, annotations)
    comparison = compare_answers(
        runs[before], runs[after], graded, scorer=scorer, resampling=Resampling(n_resamples=resamples), right_from=right_from, margin=margin
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
        tables=comparison.rates.tables(),
        notes=comparison.rates.sentences(),
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
    _add_limit(parser)


def _compare_runs(values: Any, plain: Any) -> None:
    """Print how run folders differ, and where the page is: of two with the images that changed sides, of more with their curves."""
    report = values.report or (values.more or [values.after])[-1] / "comparison.html"
    at_end = "" if values.json else f"report: {report}"
    if values.more:
        _print_many([values.before, values.after, *values.more], report, values, at_end)
    else:
        _print(compare_runs, values, at_end)


def _print_many(folders: Sequence[Path], report: Path, values: Any, at_end: str) -> None:
    from tasks.runs.table import compare_many, many_json, many_table

    saved: list[SavedRun] = []
    asked: Mapping[int, Asked] = {}
    matrix, why = None, ""
    try:
        saved, asked = _read_many(folders)
        matrix = nfr_of_many(saved, asked, values.scorer, values.right_from)
    except (ConfigError, DataError) as error:
        why = f"no flips between these runs: {error}"
        if values.most_negative_flips is not None:
            raise
    runs = compare_many(folders, report, matrix)
    print(many_json(runs, matrix) if values.json else "\n".join(filter(None, (many_table(runs, matrix), why, at_end))))
    for run in saved[1:] if values.most_negative_flips is not None else ():  # each later run beside the first
        found = _comparison(saved[0], run, asked, values.scorer, Resampling(n_resamples=values.resamples), values.right_from, 0.0)
        _checked(found, values.most_negative_flips, values.by_estimate, f"{run.folder}: ")


def _list_runs(values: Any, plain: Any) -> None:
    from tasks.runs.table import listed_runs

    listed_runs(folder=values.folder)


def _add_runs(parser: Any) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="the folder that holds the run folders")


def _add_limit(parser: Any) -> None:
    """What is done with the comparison: how it is printed, and the limit that it must not exceed."""
    parser.add_argument("--most_negative_flips", type=float, metavar="SHARE", help=_LIMIT_HELP)
    parser.add_argument("--by_estimate", action="store_true", help="judge the negative flip rate itself, not the lower end of its interval")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def _print(function: Callable[..., Comparison], values: Any, at_end: str = "") -> None:
    if values.most_negative_flips is not None:
        check_limit(values.most_negative_flips)  # before anything is read
    arguments = {name: value for name, value in given_arguments(values).items() if name not in ("most_negative_flips", "by_estimate")}
    comparison = function(**arguments)
    print(comparison_json(comparison) if values.json else "\n".join(filter(None, (comparison_table(comparison), at_end))))
    _checked(comparison, values.most_negative_flips, values.by_estimate)


def _compared(function: Callable[..., Comparison], *examples: str) -> Command:
    def add(parser: Any) -> None:
        parser.add_function_arguments(function)
        _add_limit(parser)

    return Command(add, lambda values, plain: _print(function, values), examples)


COMPARE_RUNS = Command(
    _add_compared_runs, _compare_runs, ("adalink compare runs/before runs/after", "adalink compare runs/a runs/b runs/c --report curves.html")
)
COMPARE_COCO = _compared(compare_coco, "adalink compare coco --before before.json --after after.json --references captions_val2014.json")
COMPARE_VQA = _compared(compare_vqa, "adalink compare vqa --before before.json --after after.json --annotations annotations.json")
RUNS = Command(_add_runs, _list_runs, ("adalink runs", "adalink runs runs/sweep"))
