"""Texts alone: a class or a score of one text or of two, chosen by a head, by the label words, or written; scored with GLUE's metrics."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from adalink.errors import ConfigError, DataError
from multimodal.sample import Question, Sample, SampleSource
from multimodal.template import OWN_ROW, Template, Text, TextTemplate
from tasks.data.reader import Official
from tasks.data.sources import place_of
from tasks.data.text import GlueTask, text_source_of
from tasks.metrics.files import write_vqa_results
from tasks.metrics.text import CLASS_METRICS, NUMBER_METRICS, SCORER, classes_of, resampled_metrics, text_metrics
from tasks.task import Asked, Score, Task

__all__ = ["TextSettings", "TextTask", "settled"]

NO_NUMBER = -1.0  # what a written answer counts as where a score was wanted and none was written, as T5 counts it


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a text gets its class or its score."""

    how: Literal["head", "words", "write"] = "head"  # a trained head; the most probable label word; or the answer is written
    labels: tuple[str, ...] = ()  # the label words, in their order; by default GLUE's, else those of the data, sorted
    metrics: tuple[str, ...] = ()  # accuracy, f1, macro_f1, matthews_correlation, or pearson, spearmanr of scores; by default GLUE's, else accuracy
    max_tokens: int = 128  # longer texts are cut, the longest first
    pad_to: int = 0  # pad rows to so many tokens, with how: head (UniPELT's published gates average over 128); 0: to the longest of the batch
    prompt: str | None = None  # such as "<bos>{text} it was"; none: the tokenizer's own row of one text or two, with how: head
    target: str | None = None  # of the label; by default " {text}", and where it is written " {text}<eos>"
    score: Literal["sum", "mean"] = "sum"  # with how: words, of the log-probabilities of a label's tokens

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        known = (*CLASS_METRICS, *NUMBER_METRICS)
        if unknown := [name for name in self.metrics if name not in known]:
            raise ConfigError(f"text.metrics has {unknown[0]!r}: give some of {', '.join(known)}")
        if 0 < sum(name in NUMBER_METRICS for name in self.metrics) < len(self.metrics):
            raise ConfigError(f"text.metrics is {', '.join(self.metrics)}: give metrics of classes ({', '.join(CLASS_METRICS)}) or of scores, not of both")
        if self.labels and (len(set(self.labels)) < len(self.labels) or len(self.labels) < 2):
            raise ConfigError(f"text.labels is {', '.join(self.labels)}: give two or more words, each once")
        if self.pad_to and (self.how != "head" or self.pad_to < self.max_tokens):
            raise ConfigError(f"text.pad_to is {self.pad_to}, how {self.how} and max_tokens {self.max_tokens}: give max_tokens or more, with how: head")

    def template(self, is_paired: bool) -> TextTemplate:
        """The words around the texts and the label."""
        own = OWN_ROW if self.how == "head" else f"<bos>{'sentence 1: {text} sentence 2: {pair}' if is_paired else 'sentence: {text}'} answer:"
        target = " {text}<eos>" if self.how == "write" else " {text}"
        return TextTemplate(prompt=self.prompt or own, target=self.target or target, max_tokens=self.max_tokens, pad_to=self.pad_to)


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """The task on its data: `settled` finds what the settings leave open.

    labels   the label words; empty where scores are learned
    metrics  the names of its metrics, the headline first
    """

    name: ClassVar[str] = "text"

    settings: TextSettings = TextSettings()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    is_paired: bool = False
    glue: GlueTask | None = None

    @property
    def headline(self) -> str:
        """The metric that a run is judged by."""
        return self.metrics[0]

    @property
    def gives_scores(self) -> bool:
        """Whether the answer is a number."""
        return self.headline in NUMBER_METRICS

    @property
    def template(self) -> Template:
        """The words around the texts and the label."""
        return self.settings.template(self.is_paired)

    def words_for(self, sees_already: bool, as_written: bool = False) -> Template:
        """The same."""
        return self.template

    def results_name(self, split: str, algorithm: str) -> str:
        """The name that GLUE's server takes, `CoLA.tsv`; of other data text_SPLIT_ALGORITHM_results.json."""
        return self.glue.submission(split) if self.glue is not None else f"text_{split}_{algorithm}_results.json"

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """The text with its label's word, or with what a head learns."""
        return [self._learned(one) for one in sample.questions if one.answers]

    def _learned(self, question: Question) -> Text:
        label = question.answers[0]
        if self.settings.how == "head":
            scores = ((0, float(label)),) if self.gives_scores else ((self.labels.index(label), 1.0),)
            return Text(question.text, label, scores, pair=question.pair)
        return Text(question.text, written_score(label) if self.gives_scores else label, pair=question.pair)

    def asked(self, sample: Sample) -> Sequence[Asked]:
        """The text, and its pair."""
        return [Asked(one.question_id, one.text, pair=one.pair) for one in sample.questions]

    def is_graded(self, sample: Sample) -> bool:
        """Whether the row has a label."""
        return any(question.answers for question in sample.questions)

    def score(self, predictions: Mapping[int, str], source: SampleSource) -> Score:
        """The metrics in percent, over the rows with a label that were predicted; None where a correlation is undefined.

        Raises DataError where none was, or they have no label.
        """
        wanted = {one.question_id: one.answers[0] for one in _questions(source) if one.answers and one.question_id in predictions}
        if not wanted:
            raise DataError("these texts cannot be scored: none was predicted, or the data set has no labels (a test split?)")
        pairs = [(predictions[item].strip(), label) for item, label in wanted.items()]
        if self.gives_scores:
            numbers = [_number(given) for given, _ in pairs]
            n_unlisted = numbers.count(None)
            given: Sequence[float] = [NO_NUMBER if one is None else one for one in numbers]
            known: Sequence[float] = [float(label) for _, label in pairs]
        else:
            places = [self.labels.index(given) if given in self.labels else None for given, _ in pairs]
            n_unlisted = places.count(None)
            known = [self.labels.index(label) for _, label in pairs]
            given = classes_of(places, known, len(self.labels)).tolist()  # type: ignore[arg-type]
        found = {name: None if value is None else 100 * value for name, value in text_metrics(self.metrics, given, known).items()}
        if len(found) == 2:
            both = list(found.values())
            found["mean"] = None if None in both else sum(filter(None, both)) / 2
        note = f"{n_unlisted:,} of {len(pairs):,} answers name no {'number' if self.gives_scores else 'label'} (n_unlisted)"
        return Score(
            metrics={**found, **({"n_unlisted": float(n_unlisted)} if self.settings.how == "write" else {})},
            headline=self.headline,
            items={} if self.gives_scores else {item: 100.0 * (one == right) for item, one, right in zip(wanted, given, known, strict=True)},
            scorer=SCORER,
            resampled=resampled_metrics(defined, given, known) if (defined := [name for name in self.metrics if found[name] is not None]) else None,
            note=note if self.settings.how == "write" else "",
        )

    def majority(self, source: SampleSource) -> tuple[str, Score] | None:
        """The label that most rows have, and its score where every row gets it: what a model must beat. None for scores."""
        labels = Counter(one.answers[0] for one in _questions(source) if one.answers)
        if self.gives_scores or not labels:
            return None
        word = max(self.labels, key=lambda label: labels[label])
        return word, self.score({one.question_id: word for one in _questions(source)}, source)

    def write_results(self, path: Path, predictions: Mapping[int, str], official: Official | None = None) -> None:
        """GLUE's submission where the name is one's, `index` and `prediction` between tabs; else a list of question_id and answer."""
        if path.suffix != ".tsv":
            write_vqa_results(path, predictions, official)
            return
        lines = [f"{item}\t{self._submitted(text.strip())}\n" for item, text in sorted(predictions.items())]
        path.write_text("".join(["index\tprediction\n", *lines]), encoding="utf-8", newline="\n")

    def _submitted(self, text: str) -> str:
        """A number of a class, or its word, as this task's files have it; an answer that names no label as the first one."""
        if self.gives_scores:
            number = _number(text)
            return f"{NO_NUMBER if number is None else number:.3f}"
        number = self.labels.index(text) if text in self.labels else 0
        return str(number) if self.glue is not None and self.glue.numbered else self.labels[int(number)]

    def settled(self, sources: Sequence[SampleSource], labels: Sequence[str] = ()) -> TextTask:
        """The task on these data sets. labels: an adapter's, in the place of the first set's.

        Raises DataError for data without texts, for a label that is none of the label words (with its row), and for one that is no number where the
        metrics need numbers; ConfigError for scores that would be chosen by words.
        """
        found = [text_source_of(source) for source in sources]
        if None in found:
            raise DataError("the task text needs texts with labels, and the data set has images: give data.train.glue, table or disk, or another task")
        first = next(one for one in found if one is not None)
        glue, chosen = first.glue, self.settings
        metrics = chosen.metrics or ((glue.headline, *(name for name in glue.metrics if name != glue.headline)) if glue is not None else ("accuracy",))
        task = replace(self, metrics=metrics, glue=glue, is_paired=any(one.pair for one in _questions(first)))
        if task.gives_scores:
            if chosen.how == "words":
                raise ConfigError("text.how is words, and the metrics are of scores, which are no words: give head or write")
            for source in sources:
                _refuse_words(source)
            return task
        given = chosen.labels or tuple(labels) or (glue.labels if glue is not None else ()) or first.labels
        words = given or tuple(sorted({one.answers[0] for one in _questions(sources[0]) if one.answers}))
        if len(words) < 2:
            raise DataError(f"the data set has {len(words)} different labels ({', '.join(words) or 'none'}): expected two or more, or give text.labels")
        whose = "text.labels" if chosen.labels else "the adapter" if labels else "the data set before it"
        for source in sources:
            _refuse_others(source, words, whose)
        return replace(task, labels=words)


def settled(task: Task, *sources: SampleSource, labels: Sequence[str] = ()) -> Task:
    """A task of texts on its data; another task as it is."""
    return task.settled(sources, labels) if isinstance(task, TextTask) else task


def written_score(label: str) -> str:
    """A score as it is written: rounded to 0.2, with one decimal, as T5 learns STS-B. "2.57" -> "2.6"."""
    return f"{round(5 * float(label)) / 5:.1f}"


def _questions(source: SampleSource) -> Iterator[Question]:
    return (question for index in range(len(source)) for question in source[index].questions)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _refuse_words(source: SampleSource) -> None:
    for index in range(len(source)):
        for label in (answer for one in source[index].questions for answer in one.answers):
            if _number(label) is None:
                raise DataError(
                    f"{place_of(source, index)} has the label {label!r}, and the metrics need numbers: write a score there, or give text.metrics: [accuracy]"
                )


def _refuse_others(source: SampleSource, words: Sequence[str], whose: str) -> None:
    for index in range(len(source)):
        for label in (answer for one in source[index].questions for answer in one.answers):
            if label not in words:
                raise DataError(
                    f"{place_of(source, index)} has the label {label!r}, and {whose} has {', '.join(words)}: mend the row, or list all words "
                    "in text.labels"
                )
