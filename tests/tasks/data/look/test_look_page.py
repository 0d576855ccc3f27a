"""The page of a data set: what gets onto it, and what a browser makes of it: search, filters, order, pages, 5,000 samples."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from probed_page import CHROMIUM, WHY, probed
from report_sample import HOSTILE, jpeg

from multimodal.sample import BadSample, Question
from tasks.data.look.facts import Facts
from tasks.data.look.page import render, side_for
from tasks.data.look.scan import ImageFile, Seen
from tasks.report.page import thumbnail

MANY = 5000
SMALL = thumbnail(jpeg(64, 48), side=32, quality=50)


def sample(number: int, text: str, answers: tuple[str, ...] = ()) -> Seen:
    """A sample as a look finds it; each is of another size."""
    image = ImageFile(kind="jpg", width=100 + number, height=100, size=1000 + number, digest=f"{number // 2 if number < 4 else number}")
    questions = (Question(question_id=number, text="what is it?", answers=answers, turns=(("user", text),)),) if answers else ()
    return Seen(number=number, key=f"{number}", images=(image,), captions=(text,), questions=questions)


def page(texts: list[str], title: str = "Data") -> str:
    """The page of samples with these captions, some with answers; one has a problem, one is in val, two are there twice."""
    seen = [sample(k, text, ("yes", "yes", text) if k % 10 == 0 else ()) for k, text in enumerate(texts)]
    problems = [BadSample(key=texts[0], reason="missing file", detail=f"{texts[0]} is missing", file="x.jpg")]
    facts = Facts(sentence=texts[0], total=len(seen), seen=seen, problems=problems, val={seen[-1].images[0].digest: texts[0]})
    return render(facts, seen, [[SMALL]] * len(seen), title=title)


def entries(html: str) -> list[dict[str, Any]]:
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="entries">(.*?)</script>', html, flags=re.DOTALL)
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_texts_are_whatever_they_are_and_end_no_script() -> None:
    texts = [*HOSTILE, "</script><script>document.title = 'pwned'</script>", "half \ud83d", "a\u2028b"]
    found = entries(page(texts))
    assert [entry["c"][0] for entry in found if entry["n"] >= 0] == texts
    assert page(texts).count("<script") == page(["a dog"] * len(texts)).count("<script")
    assert page(texts).encode("utf-8")  # half a pair too
    assert found[0]["w"] == [f"missing file: {texts[0]} is missing"]


def test_thumbnails_are_smaller_where_there_are_many_and_are_left_out_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [side_for(n) for n in (10, 2000, 5000, 50_000)] == [192, 144, 112, 80]
    monkeypatch.setattr("tasks.data.look.page.MOST_BYTES", 3 * len(SMALL.url) + 10)
    assert [bool(entry["i"]) for entry in entries(page(["a dog"] * 5))] == [False, True, True, True, False, False]


# Sets the form's values, one after the other, and writes down what is then there.
PROBE = """<!doctype html><body><iframe src="look.html" width="WIDTH" height="900" style="border:0"></iframe><pre></pre><script>
addEventListener("load", () => {
  const view = document.querySelector("iframe"), page = view.contentDocument, form = page.querySelector("#filter"), found = {};
  const keys = () => [...page.querySelectorAll("#cards .key")].map((key) => key.textContent);
  const state = () => ({keys: keys().slice(0, 3), cards: keys().length, output: form.querySelector("output").textContent,
    pager: page.querySelector(".pages").hidden ? "" : page.querySelector(".pages span").textContent});
  const set = (values) => {
    form.reset();
    for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
    form.dispatchEvent(new Event("input"));
    return state();
  };
  found.title = page.title;
  found.width = page.documentElement.scrollWidth;
  found.visible = !form.hidden;
  found.first = state();
  page.querySelector(".pages [data-step='1']").click();
  found.second = state();
  found.text = set({text: "NUMBER 4321 "});
  found.answer = set({answer: "Yes"});
  for (const mark of ["problem", "duplicate", "val"]) found[mark] = set({mark});
  found.large = set({order: "large"});
  found.none = set({text: "no such text"});
  const started = performance.now();
  found.all = set({size: "0"});
  const last = page.querySelector("#cards").lastElementChild;
  last.scrollIntoView();
  found.at = last.getBoundingClientRect().top < 900;
  found.milliseconds = performance.now() - started;
  found.image = last.querySelector("img").src.startsWith("data:image/jpeg;base64,/9j/");
  document.querySelector("pre").textContent = JSON.stringify(found);
});</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("look")
    (folder / "look.html").write_text(page([f"the text number {k} <b>" for k in range(MANY)], title="Data: <b>"))
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", "390"))
    return probed(folder, "probe.html")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
def test_a_browser_pages_searches_filters_and_sorts_five_thousand_samples(seen: dict[str, Any]) -> None:
    assert (seen["title"], seen["width"], seen["visible"]) == ("Data: <b>", 390, True)
    assert seen["first"] == {"keys": ["the text number 0 <b>", "0", "1"], "cards": 60, "output": "5,001 of 5,001 samples", "pager": "page 1 of 84"}
    assert (seen["second"]["keys"][0], seen["second"]["pager"]) == ("59", "page 2 of 84")
    assert (seen["text"]["keys"], seen["text"]["pager"]) == (["4321"], "")
    assert (seen["answer"]["output"], seen["answer"]["keys"]) == ("500 of 5,001 samples", ["0", "10", "20"])
    assert seen["problem"]["keys"] == ["the text number 0 <b>"]
    assert (seen["duplicate"]["keys"], seen["duplicate"]["cards"]) == (["0", "1", "2"], 4)
    assert seen["val"]["keys"] == ["4999"]
    assert seen["large"]["keys"] == ["4999", "4998", "4997"]
    assert (seen["none"]["cards"], seen["none"]["output"]) == (0, "0 of 5,001 samples")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
def test_a_browser_scrolls_through_all_of_them_at_once(seen: dict[str, Any]) -> None:
    assert (seen["all"]["cards"], seen["all"]["pager"]) == (MANY + 1, "")
    assert seen["at"]
    assert seen["image"]
