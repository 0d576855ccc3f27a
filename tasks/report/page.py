"""What stands on the report of a run, as plain data, and the page that is written from it.

    write_report(Report(title="Captioning: ViT-B/32 + OPT, AdaLink", ..., cards=[CaptionCard(key="3", ...)]), Path("run/report.html"))

The page is one file that needs no network and no script: pictures are data URLs, curves are inline SVG, and its content security
policy forbids it to load or send anything, so a caption that gets past the escaping still could do nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from adalink.atomic import write_whole
from adalink.errors import ConfigError
from tasks.report.policy import policy
from tasks.report.svg import Point, describe, draw
from tasks.report.table import columns, metric_cells
from tasks.report.thumbnail import thumbnail
from tasks.report.verdict import Verdict, answer_verdict, caption_verdicts

__all__ = ["AnswerCard", "CaptionCard", "Curve", "MetricRow", "Report", "Trained", "render", "write_report"]

FOLDER = Path(__file__).parent
MOST_KEYS = 50  # keys of skipped samples shown for one reason; the log names them all


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over training steps: (step, value) pairs; a value may be NaN or infinite and is then a gap."""

    name: str
    points: Sequence[Point]
    unit: str = ""

    def __post_init__(self) -> None:
        _check_named("Curve", self.name)
        for i, point in enumerate(self.points):
            if len(point) != 2 or not all(isinstance(value, Real) for value in point):
                raise ConfigError(f"curve {self.name!r} has {point!r} as point {i}; expected a (step, value) pair: pass NaN for none")


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One row of the metric table, such as `trained adapter`; a metric that was not computed is None or absent."""

    name: str
    values: Mapping[str, float | None]

    def __post_init__(self) -> None:
        _check_named("MetricRow", self.name)
        for metric, value in self.values.items():
            if value is not None and not isinstance(value, Real):
                raise ConfigError(f"row {self.name!r} has {value!r} for {metric!r}; expected a number, or None where it was not computed")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How many weights a method trains."""

    name: str
    parameters: int

    def __post_init__(self) -> None:
        _check_named("Trained", self.name)
        _check_count(f"Trained {self.name!r} parameters", self.parameters)


@dataclass(frozen=True, kw_only=True)
class CaptionCard:
    """A picture with its generated caption. `score` is in the scorer's own unit, None where it was not scored."""

    key: str
    image: Image | bytes | None  # None: the card says that no picture was kept
    generated: str
    references: Sequence[str]
    score: float | None

    def __post_init__(self) -> None:
        _check_texts(f"card {self.key!r} references", self.references)
        if self.score is not None and not math.isfinite(self.score):
            raise ConfigError(f"card {self.key!r} has the score {self.score}; expected a finite number, or None where it was not scored")


@dataclass(frozen=True, kw_only=True)
class AnswerCard:
    """A picture with a question and its generated answer. `answers` are what people said, repeats included."""

    key: str
    image: Image | bytes | None  # None: the card says that no picture was kept
    question: str
    generated: str
    answers: Sequence[str]
    score: float | None  # VQA accuracy, 0..1; None where it was not scored

    def __post_init__(self) -> None:
        _check_texts(f"card {self.key!r} answers", self.answers)
        if self.score is not None and not 0 <= self.score <= 1:
            raise ConfigError(f"card {self.key!r} has the score {self.score}; expected an accuracy from 0 to 1: divide percents by 100")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page, in its order. An empty part is a sentence on the page, not a hole."""

    title: str  # task, encoder, language model, methods
    summary: str  # one line
    scorer: str  # name and version of what computed the metrics
    rows: Sequence[MetricRow]
    trained: Sequence[Trained]
    frozen_parameters: int  # weights of all frozen parts together
    curves: Sequence[Curve]
    cards: Sequence[CaptionCard | AnswerCard]
    bad_samples: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> keys of the samples that were skipped
    config: str = ""  # the configuration as used, as it is shown

    def __post_init__(self) -> None:
        _check_named("Report", self.title)
        _check_count("Report.frozen_parameters", self.frozen_parameters)
        for reason, keys in self.bad_samples.items():
            _check_texts(f"Report.bad_samples[{reason!r}]", keys)


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError where it cannot be written."""
    # A lone surrogate (half an emoji, as a byte-level tokenizer may leave it) has no UTF-8; as a reference it shows as U+FFFD.
    write_whole(path, render(report).encode("utf-8", errors="xmlcharrefreplace"))


def render(report: Report) -> str:
    """The page as HTML: the same text for the same report."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = Markup((FOLDER / "page.css").read_text("utf-8")), Markup(environment.get_template("page.js.j2").render())
    values = [row.values for row in report.rows]
    verdicts = _verdicts(report.cards)
    return environment.get_template("page.html.j2").render(
        report=report,
        style=style,
        script=script,
        policy=policy(style, script),
        columns=columns(values),
        cells=metric_cells(values),
        n_trained=sum(part.parameters for part in report.trained),
        verdicts=verdicts,
        has_captions=any(isinstance(card, CaptionCard) for card in report.cards),
        words=list(dict.fromkeys(verdict.word for verdict in verdicts)),
        curve=draw,
        describe=describe,
        thumbnail=thumbnail,
        most_keys=MOST_KEYS,
        share=lambda parameters: _share(parameters, report),
        counted=lambda answers: Counter(answers).most_common(),
        is_answer=lambda card: isinstance(card, AnswerCard),
    )


def _verdicts(cards: Sequence[CaptionCard | AnswerCard]) -> list[Verdict]:
    thirds = iter(caption_verdicts([card.score for card in cards if isinstance(card, CaptionCard)]))
    return [next(thirds) if isinstance(card, CaptionCard) else answer_verdict(card.score) for card in cards]


def _share(parameters: int, report: Report) -> str:
    total = report.frozen_parameters + sum(part.parameters for part in report.trained)
    percent = 100 * parameters / total if total else 0.0
    return f"{percent:.2f} %" if percent >= 0.1 or percent == 0 else f"{percent:.2g} %"


def _check_named(kind: str, name: str) -> None:
    if not name.strip():
        raise ConfigError(f"a {kind} has the name {name!r}; expected a text that people can tell it by")


def _check_count(what: str, count: int) -> None:
    if not isinstance(count, int) or count < 0:
        raise ConfigError(f"{what} is {count!r}; expected a whole number of weights, 0 or more")


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{what} is {texts!r}; expected a sequence of texts: put a single one in a list")
