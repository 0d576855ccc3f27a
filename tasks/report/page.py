"""What stands on the report of a run, as plain data, and the page that is written from it.

    write_report(Report(title="Captioning: ViT-B/32 + OPT, AdaLink", ..., cards=[CaptionCard(key="3", ...)]), Path("run/report.html"))

The page is one file that needs no network and no script: images are data URLs, curves are inline SVG, and its content security
policy forbids it to load or send anything, so a caption that gets past the escaping still could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from adalink.errors import ConfigError
from adalink.files import write_whole
from multimodal.data.images.decode import BadImage, decode_image
from tasks.report.svg import Point, describe, draw

__all__ = [
    "AnswerCard", "CaptionCard", "Cell", "Curve", "MetricRow", "Report", "Thumbnail", "Trained", "Outcome", "answer_outcome",
    "caption_verdicts", "columns", "metric_cells", "policy", "render", "thumbnail", "write_report",
]  # fmt: skip


# ----------------------------------------
# A small JPEG of an image as a data URL, so that the page needs no other file.


SIDE = 224  # pixels of the longer side; a smaller image keeps its size


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A data URL with its size in pixels; or no URL, and in `reason` why there is none."""

    url: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""


def thumbnail(image: Image.Image | bytes | None, *, side: int = SIDE, quality: int = 82) -> Thumbnail:
    """A JPEG of at most side x side pixels, about 10 KB, on white where the image is transparent.

    An image that cannot be read costs its place on the page, not the page: the reason stands where it would have been.
    """
    if image is None:
        return Thumbnail(reason="no image was saved")
    try:
        small = _small(decode_image(image) if isinstance(image, bytes) else image, side)
    except BadImage as error:
        return Thumbnail(reason=f"the image cannot be read: {error.reason}")
    except (OSError, ValueError) as error:  # a Pillow image that was never loaded, and whose file is closed or damaged
        return Thumbnail(reason=f"the image cannot be read: {error}")
    stream = BytesIO()
    small.save(stream, "JPEG", quality=quality, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Thumbnail(url=url, width=small.width, height=small.height)


def _small(image: Image.Image, side: int) -> Image.Image:
    """RGB, at most `side` on the longer side; the caller's image stays as it is."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    small = image.convert("RGB")  # a copy, also where it is RGB already
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


# ----------------------------------------
# What a page may load: nothing but images inside it, and the very style and script that it was written with.


def policy(style: str, script: str = "") -> str:
    """The content security policy of a page with this inline style and script; without a script none may run."""
    scripts = _digest(script) if script else "'none'"
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {_digest(style)}; script-src {scripts}"


def _digest(text: str) -> str:
    """The source expression that lets the browser use this inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ----------------------------------------
# The metric table: one column for each metric that any row has, numbers of a column written alike.


_NOTHING = 1e-6  # BLEU of no word in common is a little above 0, by the constants that it adds


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The metric as written, and the length of its bar: its share of the largest of its column, 0..100, or None where no bar fits."""

    text: str
    bar: float | None = None


def columns(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The metrics of all rows, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def metric_cells(rows: Sequence[Mapping[str, float | None]]) -> list[list[Cell]]:
    """One list of cells a row, in the order of `columns`: a metric that a row lacks (or has as None) is `–`."""
    by_column = [_column([row.get(name) for row in rows]) for name in columns(rows)]
    return [[column[i] for column in by_column] for i in range(len(rows))]


def _column(values: Sequence[float | None]) -> list[Cell]:
    values = [0.0 if value is not None and abs(value) < _NOTHING else value for value in values]
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    has_bars = largest > 0 and all(value >= 0 for value in finite)
    return [_cell(value, largest, has_bars) for value in values]


def _cell(value: float | None, largest: float, has_bars: bool) -> Cell:
    if value is None:
        return Cell(text="–")
    if not math.isfinite(value):
        return Cell(text="not a number" if math.isnan(value) else "∞" if value > 0 else "-∞")
    decimals = 1 if largest >= 100 else 2 if largest >= 10 or largest == 0 else 3
    text = f"{value:,.{decimals}f}" if largest == 0 or 1e-2 <= largest < 1e9 else f"{value:.3g}"
    return Cell(text=text, bar=round(100 * value / largest, 1) if has_bars else None)


# ----------------------------------------
# What the score of one image means, as a sign, a word and a colour: never the colour alone.


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`tone` colours the badge; `sign`, `word` and `metric` stand in it; people filter the page by `word`."""

    tone: Literal["good", "fair", "bad", "none"]
    sign: str
    word: str
    metric: str = ""


UNSCORED = Outcome(tone="none", sign="–", word="not scored")


def answer_outcome(score: float | None) -> Outcome:
    """A VQA accuracy in 0..1: 1.0 -> right, 0.6 -> partly right, 0.0 -> wrong."""
    if score is None:
        return UNSCORED
    metric = f"{100 * score:.3g} %"
    if score >= 1:
        return Outcome(tone="good", sign="✓", word="right", metric=metric)
    if score > 0:
        return Outcome(tone="fair", sign="◐", word="partly right", metric=metric)
    return Outcome(tone="bad", sign="✗", word="wrong", metric=metric)


def caption_verdicts(scores: Sequence[float | None]) -> list[Outcome]:
    """Each caption against the others on the page, by thirds: 0.1, 0.5, 2.0 -> lower, middle, higher.

    A caption score has no mark for right, so a sign by itself would claim more than the score says. Equal scores share their
    middle rank; but the lowest score is lower however many share it (most CIDEr-D scores of a weak model are 0), unless all are equal.
    """
    known = sorted(score for score in scores if score is not None)
    return [UNSCORED if score is None else _third(score, known) for score in scores]


def _third(score: float, known: Sequence[float]) -> Outcome:
    rank = (bisect_left(known, score) + bisect_right(known, score)) / (2 * len(known))
    metric = f"{score:.3f}"
    if rank > 2 / 3:
        return Outcome(tone="good", sign="▲", word="higher", metric=metric)
    if rank < 1 / 3 or known[0] == score < known[-1]:
        return Outcome(tone="bad", sign="▼", word="lower", metric=metric)
    return Outcome(tone="fair", sign="●", word="middle", metric=metric)


FOLDER = Path(__file__).parent
MOST_KEYS = 50  # keys of skipped samples printed for one reason; the log names them all


@cache
def templates(folder: Path) -> Environment:
    """The page templates of a folder: each is compiled when it is first used, and once."""
    return Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


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
    """An image with its generated caption. `score` is in the scorer's own unit, None where it was not scored."""

    key: str
    image: Image.Image | bytes | None  # None: the card says that no image was saved
    generated: str
    references: Sequence[str]
    score: float | None

    def __post_init__(self) -> None:
        _check_texts(f"card {self.key!r} references", self.references)
        if self.score is not None and not math.isfinite(self.score):
            raise ConfigError(f"card {self.key!r} has the score {self.score}; expected a finite number, or None where it was not scored")


@dataclass(frozen=True, kw_only=True)
class AnswerCard:
    """An image with a question and its generated answer. `answers` are those of people, repeats included."""

    key: str
    image: Image.Image | bytes | None  # None: the card says that no image was saved
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
    config: str = ""  # the configuration as used, as the page prints it
    representation: Sequence[MetricRow] = ()  # what the adapter does to hidden states, a row for each layer and domain; the page has no such part without

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
    style, script = Markup((FOLDER / "page.css").read_text("utf-8")), Markup(templates(FOLDER).get_template("page.js.j2").render())
    values, states = ([row.values for row in rows] for rows in (report.rows, report.representation))
    verdicts = _verdicts(report.cards)
    return templates(FOLDER).get_template("page.html.j2").render(
        report=report,
        style=style,
        script=script,
        policy=policy(style, script),
        columns=columns(values),
        cells=metric_cells(values),
        state_columns=columns(states),
        state_cells=metric_cells(states),
        n_trained=sum(part.parameters for part in report.trained),
        verdicts=verdicts,
        has_captions=any(isinstance(card, CaptionCard) for card in report.cards),
        words=list(dict.fromkeys(outcome.word for outcome in verdicts)),
        curve=draw,
        describe=describe,
        thumbnail=thumbnail,
        most_keys=MOST_KEYS,
        share=lambda parameters: _share(parameters, report),
        counted=lambda answers: Counter(answers).most_common(),
        is_answer=lambda card: isinstance(card, AnswerCard),
    )


def _verdicts(cards: Sequence[CaptionCard | AnswerCard]) -> list[Outcome]:
    thirds = iter(caption_verdicts([card.score for card in cards if isinstance(card, CaptionCard)]))
    return [next(thirds) if isinstance(card, CaptionCard) else answer_outcome(card.score) for card in cards]


def _share(parameters: int, report: Report) -> str:
    total = report.frozen_parameters + sum(part.parameters for part in report.trained)
    percent = 100 * parameters / total if total else 0.0
    return f"{percent:.2f} %" if percent >= 0.1 or percent == 0 else f"{percent:.2g} %"


def _check_named(kind: str, name: str) -> None:
    if not name.strip():
        raise ConfigError(f"a {kind} has the name {name!r}; expected a text that is not empty")


def _check_count(what: str, count: int) -> None:
    if not isinstance(count, int) or count < 0:
        raise ConfigError(f"{what} is {count!r}; expected a whole number of weights, 0 or more")


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{what} is {texts!r}; expected a sequence of texts: put a single one in a list")
