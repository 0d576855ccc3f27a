"""The official result file of an evaluation: named as the server wants it, and complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.sample import SampleSource
from tasks.data.sources import Opened
from tasks.metrics.vqa import refuse
from tasks.task import Task

__all__ = ["Submission", "refuse_gaps", "what_is_missing", "write_submission"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """How the official result file is named, and whether it may have gaps."""

    algorithm: str = "adalink"  # the part of the file's name that stands for the method
    split: str | None = None  # the part that stands for the split, such as val2014; by default what the data's files are called
    incomplete: Literal["refuse", "allow"] = "refuse"  # a file without every picture or question of the split; servers take none such


def what_is_missing(opened: Opened, texts: Mapping[int, str], bad: Sequence[BadSample]) -> list[int | str]:
    """The ids of the split without a prediction; keys of samples, where the data set names ids only in the samples themselves."""
    if opened.item_ids:
        return [item for item in opened.item_ids if item not in texts]
    return list(dict.fromkeys(sample.key for sample in bad))


def refuse_gaps(task: Task, opened: Opened, usable: SampleSource, bad: Sequence[BadSample], submission: Submission) -> None:
    """Raises DataError where samples that cannot be shown to the model will leave gaps: before anything is generated.

    usable   the samples that can be shown
    bad      those that cannot
    """
    if submission.incomplete == "allow" or opened.left_out or not bad:
        return
    asked = {one.item: "" for i in range(len(usable)) for one in task.asked(usable[i])} if opened.item_ids else {}
    refuse(
        what_is_missing(opened, asked, bad),
        f"of the {len(opened.item_ids) or len(usable) + len(bad)} items of this split would be missing from its official result file",
        f"the first sample that cannot be used: {bad[0].detail or bad[0].key} ({bad[0].reason}); mend them, or give --submission.incomplete allow",
    )


def write_submission(
    folder: Path, task: Task, opened: Opened, split: str, texts: Mapping[int, str], bad: Sequence[BadSample], submission: Submission
) -> str:
    """Write the official result file and give the line that says so, or that says what is missing.

    Nothing is written where `limit` leaves out a part of the split and gaps are not allowed.
    Raises DataError where other items are missing and gaps are not allowed.
    """
    path = folder / task.results_name(submission.split or split, submission.algorithm)
    missing = what_is_missing(opened, texts, bad)
    if opened.left_out:
        gap = f"limit leaves out {opened.left_out} pictures of the split"
    elif missing:
        listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        gap = f"{len(missing)} of {len(texts) + len(missing)} predictions are missing (first: {listed})"
    else:
        task.write_results(path, texts)
        return f"official result file: {path}"
    if submission.incomplete == "allow":
        task.write_results(path, texts)
        return f"incomplete official result file: {path}; {gap}"
    if opened.left_out:
        return f"no official result file is written: {gap}; leave it out, or give --submission.incomplete allow"
    raise DataError(f"no official result file is written to {path}: {gap}; results.json holds the others; mend them, or give --submission.incomplete allow")
