"""What a task is: what it learns from a sample, what it asks about one, and how its answers are scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from multimodal.sample import Sample, SampleSource
from multimodal.template import Template, Text
from tasks.data.reader import Official
from tasks.metrics.bootstrap import Interval, Metrics, Resampling, intervals

__all__ = ["BLIND", "BLIND_TEXTS", "TRAINED", "UNTRAINED", "Asked", "Score", "Submission", "Task"]

# The rows of every table of results.
UNTRAINED, TRAINED, BLIND = "frozen parts, untrained adapter", "trained adapter", "images shuffled (blind control)"
BLIND_TEXTS = "texts shuffled (blind control)"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """How the official result file is named, and whether it may have gaps."""

    algorithm: str = "adalink"  # the part of the file's name that stands for the method
    split: str | None = None  # the part that stands for the split, such as val2014; by default what the data's files are called
    incomplete: Literal["refuse", "allow"] = "refuse"  # a file without every image or question of the split; servers take none such


@dataclass(frozen=True)
class Asked:
    """One thing to ask about an image. item: the image id (captioning) or the question id (VQA), as in the official result files.

    turns, places, pair   see `multimodal.template.Text`
    """

    item: int
    question: str
    turns: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[int, int], ...] | None = None
    pair: str = ""

    @property
    def text(self) -> Text:
        """As a model's rows are made of it."""
        return Text(self.question, None, turns=self.turns, places=self.places, pair=self.pair)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A task's metrics on a whole data set.

    metrics   name -> metric, in the unit that papers print (CIDEr 25.5, accuracy 40.1); None where it is undefined
    headline  the metric that the run is judged by: the task's, or the one that these data allow
    items     item -> the headline metric of one item
    scorer    what computed them, with its version
    other_scorers   by metric, what computed it, where that is another one
    resampled the same metrics of resampled items, for intervals; None where they cannot be resampled
    note      a sentence about what was scored, or empty
    """

    metrics: Mapping[str, float | None]
    headline: str
    items: Mapping[int, float]
    scorer: str
    other_scorers: Mapping[str, str] = field(default_factory=dict)
    resampled: Metrics | None = None
    note: str = ""

    def intervals(self, resampling: Resampling) -> dict[str, Interval]:
        """The bootstrap interval of every metric that has one."""
        return {} if self.resampled is None else intervals(self.resampled, resampling)


class Task(Protocol):
    """Captioning, VQA or texts; adding a task is one file like theirs, and its name in `tasks.runs.config`."""

    @property
    def name(self) -> str:
        """What configs and adapters call it."""

    @property
    def headline(self) -> str:
        """The metric that a run is judged by, where the data allow it (`Score.headline`)."""

    @property
    def template(self) -> Template:
        """The words around the image, the question and the answer."""

    def words_for(self, sees_already: bool, as_written: bool = False) -> Template:
        """Those words, or for a model that sees already the ones that its chat template wraps, where none were chosen.

        as_written: the questions are turns of conversations, which hold all words already
        """

    @property
    def results_name(self) -> Callable[[str, str], str]:
        """The name that the evaluation server wants the result file to have, from split and algorithm."""

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """The training texts of a sample; may draw from the generator."""

    def asked(self, sample: Sample) -> Sequence[Asked]:
        """What is asked about a sample."""

    def is_graded(self, sample: Sample) -> bool:
        """Whether people gave texts that a prediction for this sample is scored against; in a test split nobody did."""

    def score(self, predictions: Mapping[int, str], source: SampleSource) -> Score:
        """The metrics of predictions for every item of a source."""

    def write_results(self, path: Path, predictions: Mapping[int, str], official: Official | None = None) -> None:
        """The official result file; official: where a benchmark has a layout of its own."""
