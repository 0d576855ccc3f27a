"""A run folder read back: what was said about which data, for comparing it with another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from adalink.errors import DataError
from multimodal.sample import Question, Sample, SampleSource
from tasks.data.sources import saved_data
from tasks.metrics.files import read_answer_results, read_caption_results

__all__ = ["Asked", "SavedRun", "asked_items", "read_run"]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What `adalink train` or `adalink evaluate` left in a folder.

    task     captioning or vqa
    texts    what was said, by image id or question id
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
        try:
            return saved_data(self.data).open().source
        except DataError as error:
            raise DataError(f"the data of the run {self.folder} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One item of a run with its picture, and the question where there was one."""

    sample: Sample
    question: Question | None = None

    @property
    def people(self) -> tuple[str, ...]:
        """What people said about it: captions or answers."""
        return self.sample.captions if self.question is None else self.question.answers


def read_run(folder: Path) -> SavedRun:
    """Read a run folder. Raises DataError, saying which file, where it is none or something in it is of another shape."""
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        task, data = metrics["task"], config["data"]["val"]
        scorer = (config.get("vqa") or {}).get("scorer", "official")
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
