"""What `adalink compare RUN_A RUN_B` does: two run folders on the same data, and a page with the pictures that changed sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from adalink.errors import ConfigError, DataError
from multimodal.images import read_image_bytes
from tasks.compare import ANSWER_IS_RIGHT, CAPTION_IS_RIGHT, Comparison, Pair, compare_answers, compare_captions
from tasks.compare_listing import shown_differences, write_pairs
from tasks.metrics.bootstrap import Resampling
from tasks.metrics.listing import software
from tasks.metrics.offenders import refuse
from tasks.metrics.vqa import VqaScorer
from tasks.report.flips import DifferenceRow, FlipCard, FlipPage, FlipSection, write_flip_page
from tasks.saved_run import Asked, SavedRun, asked_items, read_run
from tasks.vqa import graded_question

__all__ = ["compare_runs"]

_MOST_CARDS = 24  # pictures of each direction on the page, about half a megabyte together


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
    """Compare two run folders of `adalink train` or `adalink evaluate`: figures with paired intervals, flips, and a page with pictures.

    Args:
        before: The run folder of the first run.
        after: The run folder of the second run, on the same data.
        scorer: The VQA accuracy of both; by default the one that both runs chose.
        resamples: Draws for the bootstrap intervals; 0 leaves them out.
        right_from: The figure from which on an item counts as right; in percent; by default a CIDEr of 100, an accuracy of 50.
        items: A file to write both figures of each item to, as JSON.
        report: The page; by default comparison.html in the second folder.
    """
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


def _same_items(first: SavedRun, second: SavedRun) -> dict[int, Asked]:
    """What both runs answered. Raises DataError where they are of other tasks, items or references."""
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
        raise ConfigError(f"{found}; give --scorer official, normalized or exact")
    name = chosen.pop()
    if name not in get_args(VqaScorer):
        raise DataError(f"the runs chose the scorer {name!r}, which there is not; give --scorer official, normalized or exact")
    return cast("VqaScorer", name)


def _page(comparison: Comparison, before: Path, after: Path, asked: Mapping[int, Asked]) -> FlipPage:
    shown, hidden = shown_differences(comparison)
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
            for row in shown
        ],
        n_hidden_rows=hidden,
        sections=[
            FlipSection(name="Right to wrong", tone="bad", n_flips=len(lost), cards=list(_cards(lost[:_MOST_CARDS], asked))),
            FlipSection(name="Wrong to right", tone="good", n_flips=len(gained), cards=list(_cards(gained[:_MOST_CARDS], asked))),
        ],
    )


def _cards(flips: Sequence[Pair], asked: Mapping[int, Asked]) -> Iterator[FlipCard]:
    for flip in flips:
        one = asked[int(flip.item)]
        try:
            picture: bytes | None = read_image_bytes(one.sample.image)
        except DataError:
            picture = None
        yield FlipCard(
            key=f"{flip.item}",
            image=picture,
            question=one.question.text if one.question else "",
            said_before=flip.said_before,
            said_after=flip.said_after,
            before=flip.before,
            after=flip.after,
            people=one.people,
        )
