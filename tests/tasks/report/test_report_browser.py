"""The page as a person sees it: laid out and run by a real browser."""

from __future__ import annotations

import re
from typing import Any

import pytest
from probed_page import CHROMIUM, WHY, probed
from report_sample import EMPTY, HOSTILE, full

from tasks.report.page import render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY)

INJECTED = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\">"
# Opens each page in a frame of a given width and writes down what it finds; pages are files, so frames may be looked into.
PROBE = """<!doctype html><body>FRAMES<pre></pre><script>
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, form = page.querySelector("#filter");
    found[frame.name] = {title: page.title, width: page.documentElement.scrollWidth, filter: form ? !form.hidden : null,
      images: [...page.images].filter((image) => image.complete && image.naturalWidth).length};
    if (form) {
      form.elements.word.value = "right";
      form.dispatchEvent(new Event("input"));
      found[frame.name].shown = [...page.querySelectorAll(".card")].filter((card) => card.offsetParent).length;
    }
  }
  document.querySelector("pre").textContent = JSON.stringify(found);
});</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pages")
    html = render(full(HOSTILE))
    broken = html.replace("<main>", "<main>" + INJECTED)
    unguarded = re.sub(r"<meta http-equiv=[^>]*>", "", broken)
    pages = {
        "phone": (390, html), "small": (320, html), "desk": (1400, html), "empty": (390, render(EMPTY)), "broken": (1400, broken),
        "unguarded": (1400, unguarded), "wide": (390, html.replace("<main>", '<main><svg width="700" height="9"></svg>'))}  # fmt: skip
    frames = []
    for name, (width, text) in pages.items():
        (folder / f"{name}.html").write_bytes(text.encode("utf-8"))
        frames.append(f'<iframe name="{name}" src="{name}.html" width="{width}" height="800" style="border:0"></iframe>')
    (folder / "probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)))
    return probed(folder, "probe.html")


def test_the_page_fits_every_screen_without_scrolling_sideways(seen: dict[str, Any]) -> None:
    assert {name: seen[name]["width"] for name in ("phone", "small", "desk", "empty")} == {
        "phone": 390, "small": 320, "desk": 1400, "empty": 390}  # fmt: skip
    assert seen["wide"]["width"] > 390


def test_hostile_texts_run_nothing(seen: dict[str, Any]) -> None:
    assert seen["phone"]["title"].split() == " ".join(HOSTILE).split()


def test_the_policy_stops_what_would_get_past_the_escaping(seen: dict[str, Any]) -> None:
    assert seen["broken"]["title"] != "pwned"
    assert seen["unguarded"]["title"] == "pwned"  # the same page without the policy


def test_pictures_show_and_the_filter_works_under_the_policy(seen: dict[str, Any]) -> None:
    assert seen["desk"]["images"] == len(HOSTILE)
    assert seen["desk"]["filter"] is True
    assert seen["desk"]["shown"] == 2  # of seven answers, every third is right
    assert seen["empty"]["filter"] is None
