"""The page of two runs side by side: differences, and the images that went from right to wrong and back. One file, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from markupsafe import Markup
from PIL.Image import Image

from adalink.files import write_whole
from tasks.report.page import FOLDER, policy, templates, thumbnail
from tasks.report.svg import Point, draw_many

__all__ = [
    "DifferenceRow", "FlipCard", "FlipPage", "FlipSection", "RunsPage", "Series", "render_changed", "render_runs",
    "write_flip_page", "write_runs_page",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DifferenceRow:
    """One metric of both runs, of n items; interval: of after - before, (low, high), None where none was drawn."""

    name: str
    n: int
    before: float
    after: float
    interval: tuple[float, float] | None
    is_sure: bool


@dataclass(frozen=True, kw_only=True)
class FlipCard:
    """An image with the texts of both runs.

    question   empty for captions
    people     references or answers, repeats included
    """

    key: str
    image: Image | bytes | None  # None: the card says that no image was saved
    question: str
    said_before: str
    said_after: str
    before: float
    after: float
    people: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FlipSection:
    """One direction; n_changed counts all, of which the cards are the greatest."""

    name: str
    tone: Literal["good", "bad"]
    n_changed: int
    cards: Sequence[FlipCard]


@dataclass(frozen=True, kw_only=True)
class FlipPage:
    """Everything on the page, in its order."""

    title: str
    summary: str  # one line
    scorer: str  # name and version of what computed the metrics
    rows: Sequence[DifferenceRow]
    n_hidden_rows: int  # question types left out of the table
    sections: Sequence[FlipSection]
    tables: Sequence[Sequence[Sequence[str]]] = ()  # of flips: rows of cells, the first with the names of the columns
    notes: Sequence[str] = ()  # sentences below them


def write_flip_page(page: FlipPage, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError where it cannot be written."""
    write_whole(path, render_changed(page).encode("utf-8", errors="xmlcharrefreplace"))


def render_changed(page: FlipPage) -> str:
    """The page as HTML: the same text for the same page."""
    style = Markup((FOLDER / "page.css").read_text("utf-8"))
    return templates(FOLDER).get_template("flips.html.j2").render(
        page=page, style=style, policy=policy(style), thumbnail=thumbnail, counted=lambda people: Counter(people).most_common()
    )


# ----------------------------------------
# The page of several runs: what each reached, the settings that differ, and their curves laid over each other. One file, no script.


# Distinct for people with any kind of sight, on light and on dark: Okabe and Ito's colours; from the ninth run on with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#e69f00", "#7f7f7f")
DASHES = ("none", "6 4", "2 4")
_KEY = ".sample { width: 28px; height: 10px; margin-right: 0.3rem; }\n"


@dataclass(frozen=True, kw_only=True)
class Series:
    """A run's curve."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class RunsPage:
    """Everything on the page.

    tables   by title, rows of cells, the first with the names of the columns; one without other rows is left out
    series   curve -> one for each run, in the order of the runs
    notes    sentences below the title
    plots    title -> an image as SVG, with the curves of `series` under one heading; colours: what they stand for, in order
    texts    title -> a text that is written as it is, such as a config
    """

    title: str
    tables: Mapping[str, Sequence[Sequence[str]]]
    series: Mapping[str, Sequence[Series]]
    software: str
    notes: Sequence[str] = ()
    plots: Mapping[str, Markup] = field(default_factory=dict)
    colours: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


def write_runs_page(page: RunsPage, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError where it cannot be written."""
    write_whole(path, render_runs(page).encode("utf-8", errors="xmlcharrefreplace"))


def render_runs(page: RunsPage) -> str:
    """The page as HTML: the same text for the same page."""
    n_runs = max((len(series) for series in page.series.values()), default=len(page.colours))
    style = Markup((FOLDER / "page.css").read_text("utf-8") + _KEY + "".join(map(_series_style, range(n_runs))))
    return templates(FOLDER).get_template("runs.html.j2").render(page=page, style=style, policy=policy(style), draw=draw_many)


def _series_style(i: int) -> str:
    colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
    return f".series{i} {{ stroke: {colour}; stroke-width: 2; stroke-dasharray: {dash}; }}\n.curve .dot{i} {{ fill: {colour}; }}\n"
