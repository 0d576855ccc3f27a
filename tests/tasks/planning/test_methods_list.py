"""`adalink methods`: every method of METHODS, from its own file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from cli_run import WIDTH, adalink, refused

from adalink import METHODS, AdaLink
from tasks.planning import methods as methods_list
from tasks.planning.methods import Listed


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, Any]]:
    """What `methods --json` says, by name."""
    done = adalink("methods", "--json")
    assert done.code == 0, done.err
    return {one["name"]: one for one in json.loads(done.out)}


def test_every_method_is_listed_with_its_title_and_its_settings(listed: dict[str, dict[str, Any]]) -> None:
    assert list(listed) == list(METHODS)
    for name, kind in METHODS.items():
        one = listed[name]
        assert one["title"].endswith((".", ":")), f"{name}: the first line of its file is a sentence"
        assert {setting["name"] for setting in one["settings"]} == {field.name for field in dataclasses.fields(kind)}
        required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
        assert {setting["name"] for setting in one["settings"] if setting["default"] is None} == required == set(one["counted_with"])
        assert one["trained"] is not None or one["refused"]


def test_a_method_says_its_formula_its_places_and_its_count(listed: dict[str, dict[str, Any]]) -> None:
    adalink_, prompt, lora = listed["adalink"], listed["prompt"], listed["lora"]
    assert adalink_["formula"][0].startswith("E' = E + up(act(down(E)))")
    assert adalink_["edits"] == ["embedding, for text, answer", "embedding, for image"]
    assert adalink_["trained"] == 2 * 2 * 4 * WIDTH
    assert (prompt["slots"], prompt["trained"]) == ({"prompt": 4}, 4 * WIDTH)
    assert lora["edits"][0] == "output of layers.0..3.self_attn.q_proj, for every token"
    rank = next(setting for setting in adalink_["settings"] if setting["name"] == "rank")
    assert rank == {"name": "rank", "type": "int", "default": None, "about": "R; 4 to 256 were published, with little between them"}


def test_every_method_inside_the_layers_can_leave_some_of_them_alone(listed: dict[str, dict[str, Any]]) -> None:
    note = {name: setting["about"] for name, one in listed.items() for setting in one["settings"] if setting["name"] == "exclude_layers"}
    assert note == dict.fromkeys(("adalora", "bitfit", "bottleneck", "hira", "hyper", "ia3", "lora", "prefix", "sparse_delta"), "layers that are left alone, counted from 0")


def test_settings_that_are_given_are_counted() -> None:
    done = adalink("methods", "--json", "--methods.adalink", "{rank: 7, modalities: [text]}")
    (one,) = [one for one in json.loads(done.out) if one["name"] == "adalink"]
    assert one["counted_with"] == {"rank": "7", "modalities": "[text]"}
    assert one["trained"] == 2 * 7 * WIDTH


def test_a_new_method_is_listed_by_its_name_in_METHODS_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.planning.meta import draw_language, draw_tower
    from tasks.scenes.parts import encoder_folder, language_folder

    monkeypatch.setattr(methods_list, "METHODS", {"again": AdaLink})
    (one,) = methods_list.listed_methods(draw_tower(encoder_folder()), draw_language(language_folder()), {})
    assert isinstance(one, Listed)
    assert (one.name, one.trained) == ("again", 2 * 2 * 4 * WIDTH)


def test_the_text_lists_them_all_with_what_cannot_be_counted() -> None:
    done = adalink("methods")
    assert done.code == 0
    starts = {line.split(" ")[0] for line in done.out.splitlines() if line and not line.startswith(" ")}
    assert set(METHODS) <= starts
    assert "rank             int, no default: R; 4 to 256 were published" in done.out
    assert "not counted with its defaults: BitFit finds no bias" in done.out
    assert max(map(len, done.out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--language_model", "no-such-lm"), "cannot load the language model 'no-such-lm'"),
        (("--encoder", "scenes:encodr"), "there is no embedded part 'scenes:encodr'"),
        (("--methods.lora", "{rank: 0, alpha: 1, groups: {all: [all]}}"), "LoRA's rank is 0 for the group all: give 1 or more"),
        (("--methods.lorra", "{rank: 0}"), "there is no setting methods.lorra"),
        (("lora",), "lora stands where nothing more is expected"),
    ],
)
def test_a_bad_argument_is_one_sentence(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused(adalink("methods", *arguments))
