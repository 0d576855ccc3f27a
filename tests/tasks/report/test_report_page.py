from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_sample import EMPTY, HOSTILE, full

from adalink.errors import ConfigError, DataError
from tasks.report.page import FOLDER, AnswerCard, CaptionCard, Curve, MetricRow, Trained, render, write_report


class Page(HTMLParser):
    """The page as a browser parses it, near enough: every element with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def unknown(html: str) -> list[str]:
    """What the page would load or lead to outside itself."""
    page = Page(html)
    names = {"src", "href", "srcset", "action", "formaction", "data", "poster", "xlink:href", "background"}
    found = [value or "" for _, attributes in page.elements for name, value in attributes.items() if name in names]
    styles = [page.text] + [value or "" for _, attributes in page.elements for name, value in attributes.items() if name == "style"]
    found += [link for style in styles for link in re.findall(r"url\(\s*([^)]*)\)|@import\s+(\S+)", style) for link in link if link]
    return [link for link in found if not link.startswith(("data:", "#"))]


def test_hostile_texts_are_shown_as_they_are_and_make_no_element() -> None:
    page, plain = Page(render(full(HOSTILE))), Page(render(full(["a dog"] * len(HOSTILE))))
    assert [tag for tag, _ in page.elements if tag != "bdi"] == [tag for tag, _ in plain.elements if tag != "bdi"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on") or name == "style"]
    for text in HOSTILE:
        assert page.text.count(text) >= 10
        assert any(text in (image["alt"] or "") for image in page.every("img"))


def test_nothing_is_loaded_from_outside_and_the_check_can_fail() -> None:
    html = render(full(["a dog", "https://example.org/x.png"]))
    assert unknown(html) == []
    for foreign in ['<img src="https://x.org/a.png">', "<link href=//x.org/a.css>", "<style>b{background:url(http://x.org/b)}</style>"]:
        assert len(unknown(html.replace("<main>", foreign + "<main>"))) == 1


def test_the_policy_names_the_digests_of_the_one_style_and_the_one_script() -> None:
    html = render(full(HOSTILE))
    policy = next(meta["content"] for meta in Page(html).every("meta") if "content-security-policy" in str(meta.get("http-equiv")).lower())
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in str(policy)
    assert str(policy).startswith("default-src 'none';")


def test_every_empty_part_is_a_sentence() -> None:
    text = Page(render(EMPTY)).text
    parts = ["No metric was", "Nothing was trained", "No curve was", "No image was", "No sample was skipped", "No configuration was"]
    assert [part for part in parts if part not in text] == []


def test_hidden_states_have_a_part_only_where_they_were_compared() -> None:
    compared = render(replace(full(HOSTILE), representation=[MetricRow(name="image, layer 1", values={"rank, frozen": None, "rank, trained": 3.5})]))
    assert all(part in compared for part in ('<section id="representation"', "image, layer 1", 'href="#representation"', "3.500", "–"))
    assert "representation" not in render(full(HOSTILE))


def test_every_empty_part_of_a_card_is_a_sentence() -> None:
    caption = CaptionCard(key="1", image=None, generated=" ", references=[], score=None)
    answer = AnswerCard(key="2", image=b"", question="?", generated="", answers=[], score=None)
    text = Page(render(replace(EMPTY, cards=[caption, answer]))).text
    assert [text.count(words) for words in ("the model wrote nothing", "not scored")] == [2, 3]  # and once in the filter
    for words in ("no image was saved", "no references are known", "no answers are known", "cannot be read: empty file"):
        assert words in text


def test_the_page_states_shares_counts_and_the_scorer() -> None:
    text = Page(render(full(["red"]))).text
    assert "trained together1,000,00010.00 %" in text
    assert "frozen9,000,00090.00 %" in text
    assert "Scored by red." in text
    assert "red × 7dog × 3" in text
    small = replace(EMPTY, trained=[Trained(name="prompt", parameters=12)], frozen_parameters=7_000_000)
    assert "prompt120.00017 %" in Page(render(small)).text
    many = replace(EMPTY, bad_samples={"corrupt": [f"k{i}" for i in range(73)]})
    assert "k49 and 23 more, named in the log" in Page(render(many)).text


def test_the_same_report_gives_the_same_bytes_and_half_an_emoji_is_written(tmp_path: Path) -> None:
    report = full(["half \ud83d"])
    assert render(report) == render(report)
    write_report(report, tmp_path / "report.html")
    assert "half &#55357;" in (tmp_path / "report.html").read_text("utf-8")


def test_a_page_that_cannot_be_written_leaves_the_old_one_and_no_part_of_the_new(tmp_path: Path) -> None:
    write_report(EMPTY, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent" / "report.html", tmp_path / "report.html" / "below.html"):
        with pytest.raises(DataError, match=r"cannot be written: .*; is its folder there, writable and not full"):
            write_report(EMPTY, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "report.html"]


def test_text_is_readable_in_both_colour_schemes() -> None:
    style = (FOLDER / "page.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL))
    assert light.keys() == dark.keys()
    pairs = [(text, back) for text in ("ink", "soft", "accent") for back in ("page", "panel")]
    for text, back in pairs + [(tone, f"{tone}-back") for tone in ("good", "fair", "bad", "none")]:
        for colours in (light, dark):
            assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known grey that just fails


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("make, message", [
    (lambda: Curve(name=" ", points=[]), "a Curve has the name ' '; expected a text that is not empty"),
    (lambda: Curve(name="loss", points=[(0, 1.0), (1, None)]), r"curve 'loss' has \(1, None\) as point 1; expected .*: pass NaN"),
    (lambda: Curve(name="loss", points=[(0, 1.0, 2.0)]), r"curve 'loss' has \(0, 1.0, 2.0\) as point 0; expected"),
    (lambda: MetricRow(name="control", values={"BLEU": "3"}), "row 'control' has '3' for 'BLEU'; expected a number, or None"),
    (lambda: Trained(name="bridge", parameters=-1), "Trained 'bridge' parameters is -1; expected a whole number of weights"),
    (lambda: CaptionCard(key="7", image=None, generated="a", references="a dog", score=None), "card '7' references is 'a dog'; .*in a list"),
    (lambda: CaptionCard(key="7", image=None, generated="a", references=[], score=float("nan")), "card '7' has the score nan; expected a fin"),
    (lambda: AnswerCard(key="7", image=None, question="?", generated="a", answers=[3], score=None), r"card '7' answers is \[3\]; expected"),
    (lambda: AnswerCard(key="7", image=None, question="?", generated="a", answers=[], score=60.0), "score 60.0; .*divide percents by 100"),
    (lambda: replace(EMPTY, title=""), "a Report has the name ''; expected"),
    (lambda: replace(EMPTY, frozen_parameters=0.5), "Report.frozen_parameters is 0.5; expected a whole number"),
    (lambda: replace(EMPTY, bad_samples={"corrupt": "k1"}), r"Report.bad_samples\['corrupt'\] is 'k1'; expected a sequence of texts"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
