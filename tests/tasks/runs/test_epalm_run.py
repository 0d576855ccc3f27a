"""eP-ALM from the command line: trained, saved, loaded and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import RECIPES, SMALL, adalink, refused, train

PROMPT = ("--methods.prompt", "{length: 4, init_std: 1.0, form: mlp, positions: none}")
WITHOUT = ("--methods.bridge", "null", "--methods.adalink", "null", *PROMPT)


def epalm(**settings: object) -> tuple[str, str]:
    return "--methods.epalm", json.dumps({"layers": [1, 3], "n_taps": 2, "connector": "per_tap", **settings})


@pytest.mark.parametrize(
    ("task", "settings", "note"),
    [
        ("captioning", {}, "one row per image"),
        ("vqa", {"mask": "published", "layers": [1, 2], "connector": "shared"}, "one row per text: a slot of the adapter reads later tokens"),
    ],
)
def test_it_trains_and_is_evaluated(task: str, settings: dict[str, object], note: str, tmp_path: Path) -> None:
    done = train(task, tmp_path / "run", *WITHOUT, *epalm(**settings))
    assert done.code in (0, None), done
    assert note in done.out + done.err
    saved = json.loads((tmp_path / "run" / "adapter" / "adalink_config.json").read_text())
    assert saved["methods"]["epalm"]["mask"] == settings.get("mask", "causal")
    again = adalink("evaluate", "--config", RECIPES[task], "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "again", *SMALL)
    assert again.code in (0, None), again
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "run" / "results.json").read_bytes()  # the same answers


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": [3, 9]}, "eP-ALM's layers [3, 9] are outside this model, which has 4"),
        ({"n_taps": 9}, "eP-ALM taps the last 9 blocks of 'image_taps', which has 4 that can be pooled: give n_taps of 1 to 4"),
        ({"source": "sound"}, "eP-ALM reads the input 'sound', and this model has image, image_taps"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings: dict[str, object], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(train("captioning", tmp_path / "run", *WITHOUT, *epalm(**settings)))
