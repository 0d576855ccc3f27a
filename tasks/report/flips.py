"""The page of two runs side by side: differences, and the pictures that went from right to wrong and back. One file, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from adalink.atomic import write_whole
from tasks.report.policy import policy
from tasks.report.thumbnail import thumbnail

__all__ = ["DifferenceRow", "FlipCard", "FlipPage", "FlipSection", "render_flips", "write_flip_page"]

FOLDER = Path(__file__).parent


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
    """A picture with what both runs said about it.

    question   empty for captions
    people     references or answers, repeats included
    """

    key: str
    image: Image | bytes | None  # None: the card says that no picture was kept
    question: str
    said_before: str
    said_after: str
    before: float
    after: float
    people: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FlipSection:
    """One direction; n_flips counts all, of which the cards are the greatest."""

    name: str
    tone: Literal["good", "bad"]
    n_flips: int
    cards: Sequence[FlipCard]


@dataclass(frozen=True, kw_only=True)
class FlipPage:
    """Everything on the page, in its order."""

    title: str
    summary: str  # one line
    scorer: str  # name and version of what computed the figures
    rows: Sequence[DifferenceRow]
    n_hidden_rows: int  # question types left out of the table
    sections: Sequence[FlipSection]


def write_flip_page(page: FlipPage, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError where it cannot be written."""
    write_whole(path, render_flips(page).encode("utf-8", errors="xmlcharrefreplace"))


def render_flips(page: FlipPage) -> str:
    """The page as HTML: the same text for the same page."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = Markup((FOLDER / "page.css").read_text("utf-8"))
    return environment.get_template("flips.html.j2").render(
        page=page, style=style, policy=policy(style), thumbnail=thumbnail, counted=lambda people: Counter(people).most_common()
    )
