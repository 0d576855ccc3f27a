"""The page as a person uses it, in a real browser: drop an image, read captions, ask questions."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browsing
from served import QUESTIONS, Server, photo

from adalink import BASE_NAME
from multimodal.data.images.decode import decode_image
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; the page is not looked at in a browser")

DROP = """(() => {
  const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], "%s", {type: "image/png"}));
  document.querySelector("#drop").dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: data}));
})()"""
TURNS = """[...document.querySelectorAll(".turn")].map((turn) => [turn.querySelector("h2").textContent,
  [...turn.querySelectorAll(".answer")].map((card) => [".name, h3", ".said", ".time"].map((part) => card.querySelector(part).textContent))])"""
QUIET = "document.querySelectorAll('.answer').length && !document.querySelector('.answer:not([data-done])')"


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        found.look(1400, "light")
        found.call("Page.navigate", url=server.url)
        found.until("document.querySelectorAll('.model').length === 5")
        yield found


def drop(page: Page, data: bytes, name: str = "scene.png") -> None:
    page.js(DROP % (base64.b64encode(data).decode(), name))


def turns(page: Page) -> list[Any]:
    page.until(QUIET)
    return list(page.js(TURNS))


def ask(page: Page, question: str) -> None:
    """Type and press Enter."""
    page.js("document.querySelector('#question').focus()")
    page.call("Input.insertText", text=question)
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "")


def test_a_dropped_picture_is_captioned_and_questions_are_answered_side_by_side(page: Page, model: VisionLanguageModel) -> None:
    assert page.js("document.querySelector('#question').disabled") is True
    drop(page, photo(3))
    page.until("document.querySelectorAll('.answer[data-done]').length === 2")
    image = [decode_image(photo(3))]
    captions = {name: model.generate(image, [""], adapter_names=[name])[0] for name in ("cap", "cap_b")}
    ((title, cards),) = turns(page)
    assert title == "What it shows"
    assert {name: stated for name, stated, _ in cards} == captions
    assert all(" s" in time for _, _, time in cards)
    for number, question in enumerate(QUESTIONS[:2]):
        ask(page, question)
        page.until(f"document.querySelectorAll('.turn').length === {number + 2}")
        title, cards = turns(page)[0]  # the newest is the first
        assert title == question
        answers = {name: model.generate(image, [question], adapter_names=[name])[0] for name in ("vqa", "vqa_b")}
        assert {name: stated for name, stated, _ in cards} == answers


def test_the_chosen_adapters_are_asked_and_no_others(page: Page, model: VisionLanguageModel) -> None:
    page.js("[...document.querySelectorAll('.model input')].forEach((box) => { if (box.checked !== (box.value === 'cap' || box.value === '__base__')) box.click(); })")
    assert page.js("document.querySelector('#hint').textContent") == "None of the chosen adapters answers questions."
    drop(page, photo(4))
    page.until("document.querySelectorAll('.turn').length === 1")
    ((_, cards),) = turns(page)
    base = model.generate([decode_image(photo(4))], [""], adapter_names=[BASE_NAME])[0]
    assert [name for name, _, _ in cards] == ["cap", "no adapter"]
    assert cards[1][1] == base


def tick(page: Page, *names: str) -> None:
    """Have these ticked and no others."""
    page.js(f"[...document.querySelectorAll('.model input')].forEach((box) => {{ if (box.checked !== {json.dumps(names)}.includes(box.value)) box.click(); }})")


def test_an_adapter_that_is_ticked_later_catches_up(page: Page, model: VisionLanguageModel) -> None:
    def stated(name: str, question: str) -> str:
        return model.generate([decode_image(photo(7))], [question], adapter_names=[name])[0]

    tick(page, "vqa")
    drop(page, photo(7))
    page.until("!document.querySelector('#send').disabled && !document.querySelector('.turn')")
    ask(page, QUESTIONS[0])
    page.until("document.querySelectorAll('.answer[data-done]').length === 1")
    tick(page, "vqa", BASE_NAME)
    page.until("document.querySelectorAll('.answer[data-done]').length === 2")
    tick(page, "vqa", BASE_NAME, "cap")
    page.until("document.querySelectorAll('.answer[data-done]').length === 3")
    tick(page, "vqa_b")
    page.until("document.querySelectorAll('.answer[data-done]').length === 4")
    tick(page, "vqa", "vqa_b", "cap", BASE_NAME)  # they are there already
    found = {title: {name: text for name, text, _ in cards} for title, cards in turns(page)}
    assert found == {
        "What it shows": {"no adapter": stated(BASE_NAME, ""), "cap": stated("cap", "")},
        QUESTIONS[0]: {name: stated(name, QUESTIONS[0]) for name in ("vqa", "vqa_b")},
    }


def test_which_adapters_take_no_question_and_why_is_shown(page: Page) -> None:
    tick(page, "cap", "vqa")
    template = Captioning().template.prompt
    assert page.js("document.querySelector('#cannot').textContent") == f'cap takes no question: its template, "{template}", has no place for one.'
    tick(page, "vqa")
    assert page.js("document.querySelector('#cannot').textContent") == ""


def test_what_is_no_picture_is_told_and_the_next_one_works(page: Page) -> None:
    tick(page, "cap", BASE_NAME)
    drop(page, b"8BPS", "<img src=x onerror=alert(1)>.psd")
    page.until("document.querySelector('#hint').textContent.includes('none of jpg, png, webp, gif')")
    assert page.js("document.querySelectorAll('img').length") == 1  # a name is text
    drop(page, photo(5))
    page.until(QUIET)
    assert len(turns(page)) == 1


def test_the_page_fits_every_screen_and_loads_nothing_from_elsewhere(page: Page, server: Server, tmp_path: Path) -> None:
    for width in (320, 390, 1400):
        for scheme in ("light", "dark"):
            page.look(width, scheme, tmp_path / f"{width}_{scheme}.png")
            assert page.js("document.documentElement.scrollWidth") == width
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.js(background) == "rgb(20, 23, 27)"
    loaded = page.js("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith((server.url, "blob:")) for name in loaded)
    assert page.js("document.styleSheets.length") == 1
    # The policy stops a script that gets in: the control is that the element is there.
    page.js("document.body.insertAdjacentHTML('beforeend', " + json.dumps('<img id="evil" src="x" onerror="document.title=\'pwned\'">') + ")")
    page.until("document.querySelector('#evil').complete")
    assert page.js("document.title") == "adalink: ask about an image"
