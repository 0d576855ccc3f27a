"""The page of a data set: every table of facts, the oddest samples, and its samples to search, filter, sort and page through. One file, no network."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adalink.errors import ConfigError
from adalink.files import write_whole
from multimodal.sample import BadSample
from tasks.data.look.facts import ODD, Facts, listed, the_oddest
from tasks.data.look.scan import Seen, spread_over
from tasks.report.page import FOLDER as REPORT
from tasks.report.page import Thumbnail, policy, templates
from tasks.report.svg import draw_bars

__all__ = ["MOST_BYTES", "check_place", "chosen_samples", "render", "side_for", "write_page"]

FOLDER = Path(__file__).parent
MOST_BYTES = 48 * 2**20  # of all thumbnails together; those beyond are left out
MOST_BAD = 500  # problems of samples that have no image
_MARKED = 1000  # duplicates, and likewise others, that are on the page in any case
_GENERATOR = '<meta name="generator" content="adalink data look">'
_LONE = re.compile("[\ud800-\udfff]")  # half of a pair, which has no UTF-8
_SIDES = ((1000, 192), (3000, 144), (10_000, 112))  # up to so many samples, a thumbnail is at most so many pixels wide and high


def side_for(samples: int) -> int:
    """The pixels of a thumbnail's longer side: smaller where there are many, so that the page stays below about 30 MB."""
    return next((side for most, side in _SIDES if samples <= most), 80)


def chosen_samples(facts: Facts, most: int) -> list[Seen]:
    """At most so many samples, in their order: the oddest, duplicates, those that val has too, those with problems, then others, evenly spread."""
    if len(facts.seen) <= most:
        return list(facts.seen)
    by_number = {one.number: one for one in facts.seen}
    groups = (
        [one.number for one in the_oddest(facts.odd)],
        [one.number for samples in facts.same.values() for one in samples],
        list(facts.shared),
        [one.number for one in facts.seen if one.bad is not None],
    )
    chosen = dict.fromkeys(number for group in groups for number in group[:_MARKED])
    first = dict.fromkeys(list(chosen)[:most])
    others = [number for number in by_number if number not in first]
    first.update(dict.fromkeys(others[place] for place in spread_over(len(others), most - len(first)) if len(first) < most))
    return [by_number[number] for number in sorted(first)]


# ----------------------------------------
# What the page's script reads: short names, because there are thousands.


def _entry(one: Seen, small: Sequence[Thumbnail], marks: Sequence[str], notes: Sequence[str], score: float) -> dict[str, Any]:
    """A sample: key, place, image (width, height, bytes, kind), thumbnails, captions, questions with counted answers and earlier turns, marks, notes, score."""
    image = one.images[0] if one.images else None
    return {
        "n": one.number, "k": one.key, "p": one.place, "f": one.file, "i": [image.url.partition(",")[2] for image in small if image.url],
        "r": next((image.reason for image in small if image.reason), ""),
        "s": [image.width, image.height, image.size, image.kind] if image else [0, 0, 0, ""], "x": len(one.images),
        "c": one.captions, "q": [[asked.text, Counter(asked.answers).most_common(), asked.turns] for asked in one.questions],
        "m": marks, "w": notes, "o": round(score, 2),
    }  # fmt: skip


def _bad_entry(bad: BadSample) -> dict[str, Any]:
    """A sample that the data set names and cannot give."""
    return {
        "n": -1, "k": bad.key, "p": "", "f": bad.file, "i": [], "r": bad.reason, "s": [0, 0, 0, ""], "x": 0, "c": [], "q": [],
        "m": ["problem"], "w": [f"{bad.reason}: {bad.detail}"], "o": 0,
    }  # fmt: skip


def _entries(facts: Facts, chosen: Sequence[Seen], small: Sequence[Sequence[Thumbnail]]) -> list[dict[str, Any]]:
    odd = {one.number: one for one in facts.odd if one.score >= ODD}
    same = {one.number: samples for samples in facts.same.values() for one in samples}
    entries, room = [], MOST_BYTES
    for one, images in zip(chosen, small, strict=True):
        room -= sum(len(image.url) for image in images)
        damage = next((image.reason for image in images if image.reason), "")
        notes = [*(odd[one.number].reasons if one.number in odd else ())]
        if one.number in same:
            group = same[one.number]
            notes.append(f"equal bytes: {listed([other.key for other in group[:7] if other is not one][:6], len(group) - 1)}")
        if one.number in facts.shared:
            notes.append(f"val has this image too: {facts.shared[one.number]}")
        problem = f"{one.bad.reason}: {one.bad.detail}" if one.bad is not None else damage and f"the image cannot be decoded: {damage}"
        if problem:
            notes.insert(0, problem)
        has = {"problem": bool(problem), "odd": one.number in odd, "duplicate": one.number in same, "val": one.number in facts.shared}
        fitting = images if room > 0 else [Thumbnail(reason="the page has room for no more thumbnails")]
        entries.append(_entry(one, fitting, [mark for mark, is_so in has.items() if is_so], notes, odd[one.number].score if one.number in odd else 0.0))
    seen_bad = {one.bad for one in facts.seen if one.bad is not None}
    return [*map(_bad_entry, [bad for bad in facts.problems if bad not in seen_bad][:MOST_BAD]), *entries]


def _as_script(value: object) -> Markup:
    """JSON that nothing can end: without the letters that HTML knows."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(_LONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


# ----------------------------------------
# The page.


@dataclass(frozen=True, kw_only=True)
class _Bars:
    """A histogram."""

    name: str
    values: Sequence[float]
    unit: str


def _bars(facts: Facts) -> list[_Bars]:
    found = [
        _Bars(name="Longer side of images", values=[max(image.width, image.height) for image in facts.images], unit="pixels"),
        _Bars(name="Width / height", values=[image.width / max(1, image.height) for image in facts.images], unit="ratio"),
        _Bars(name="Size of files", values=[image.size / 1024 for image in facts.images], unit="KiB"),
        *(_Bars(name=f"Length of {kind}s", values=[len(text) for text in texts], unit="characters") for kind, texts in facts.texts.items()),
    ]
    return [one for one in found if len(set(one.values)) > 1]


def render(facts: Facts, chosen: Sequence[Seen], small: Sequence[Sequence[Thumbnail]], *, title: str) -> str:
    """The page as HTML: the same text for the same facts. small: the thumbnails of each chosen sample."""
    style = Markup((REPORT / "page.css").read_text("utf-8") + (FOLDER / "look.css").read_text("utf-8"))
    script = Markup((FOLDER / "look.js").read_text("utf-8"))
    images: Mapping[int, Sequence[Thumbnail]] = {one.number: images for one, images in zip(chosen, small, strict=True)}
    by_number = {one.number: one for one in facts.seen}
    parts = {part.name: part for part in facts.parts}
    return templates(FOLDER).get_template("look.html.j2").render(
        title=title, facts=facts, parts=parts, style=style, script=script, policy=policy(style, script), generator=Markup(_GENERATOR),
        bars=_bars(facts), draw=draw_bars, chosen=chosen, answers=[answer for answer, _ in facts.answers.most_common(200)],
        oddest=[(one, by_number[one.number], images.get(one.number, ())) for one in the_oddest(facts.odd)],
        entries=_as_script(_entries(facts, chosen, small)),
    )  # fmt: skip


def write_page(path: Path, html: str) -> None:
    """Write the page, whole or not at all. Raises DataError where it cannot be written, ConfigError where another file is there."""
    check_place(path)
    write_whole(path, html.encode("utf-8", errors="xmlcharrefreplace"))


def check_place(path: Path) -> None:
    """Raises ConfigError where a file is there that is no such page."""
    if path.is_file() and _GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise ConfigError(f"{path} is there already, and no page of `adalink data look`: give another path to --out")
