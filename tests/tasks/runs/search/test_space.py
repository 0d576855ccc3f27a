"""What a search may choose, and the configs that its choices make."""

from __future__ import annotations

import re
from typing import Any

import pytest

from adalink.errors import ConfigError
from tasks.runs.config import setting_names
from tasks.runs.search.space import Space

KNOWN = setting_names()
GIVEN: dict[str, Any] = {
    "methods": {"one_of": ["adalink", ["adalink", "prefix"]]},
    "methods.lora": {"one_of": [True, False]},
    "methods.lora.rank": {"log2": [0, 6]},
    "methods.lora.exclude_layers": {"layers": 3},
    "train.learning_rate": {"log": [1e-4, 1e-2]},
    "train.learning_rates.lora": {"float": [0.1, 0.2]},
    "train.batch_size": {"int": [2, 5]},
}
CHOICES = {
    "methods": 1, "methods.lora": 0, "methods.lora.rank": 3, "train.learning_rate": 0.001, "train.learning_rates.lora": 0.15, "train.batch_size": 4,
    "methods.lora.exclude_layers[0]": 1, "methods.lora.exclude_layers[1]": 0, "methods.lora.exclude_layers[2]": 1,
}  # fmt: skip
OFF = [{"methods.lora": 1}, {"methods.lora.exclude_layers[0]": 0, "methods.lora.exclude_layers[2]": 0}]


def test_choices_are_settings_of_a_run() -> None:
    space = Space.read(GIVEN, KNOWN)
    base = {"task": "captioning", "methods": {"bridge": {"kind": "mlp"}}, "train": {"learning_rates": {"adalink": 0.5}}}
    config = space.config(base, CHOICES)
    assert config["methods"] == {"bridge": {"kind": "mlp"}, "adalink": {}, "prefix": {}, "lora": {"rank": 8, "exclude_layers": [1]}}
    assert config["train"] == {"learning_rates": {"adalink": 0.5, "lora": 0.15}, "learning_rate": 0.001, "batch_size": 4}
    assert base["methods"] == {"bridge": {"kind": "mlp"}}
    assert space.values(CHOICES)["methods.lora.exclude_layers"] == [1]


@pytest.mark.parametrize("off", OFF, ids=["switched off", "no layer left"])
def test_a_method_that_is_off_has_no_settings_that_count(off: dict[str, int]) -> None:
    """Neither a rank nor a learning rate of it makes another configuration; the control is that they do where it is on."""
    space = Space.read(GIVEN, KNOWN)
    choices = CHOICES | off
    config = space.config({"methods": {"lora": {"rank": 2}}, "train": {"learning_rates": {"lora": 0.1}}}, choices)
    assert "lora" not in config["methods"]
    assert config["train"]["learning_rates"] == {}
    other = {"methods.lora.rank": 5, "train.learning_rates.lora": 0.11}
    assert space.key(choices) == space.key(choices | other)
    assert space.key(CHOICES) != space.key(CHOICES | other)
    assert space.key(choices) != space.key(CHOICES)
    assert space.off(choices) == ["methods.lora"]
    assert space.off(CHOICES | {"methods": 0}) == ["methods.prefix"]


@pytest.mark.parametrize(
    "given, sentence",
    [({"methods.lora.rnk": {"log2": [0, 6]}}, "the space names methods.lora.rnk, and a run has no such setting: the nearest is methods.lora.rank"),
     ({"methods.lora.rank": {"log2": [6, 0]}}, "the space gives methods.lora.rank the range [6, 0], which is empty"),
     ({"train.learning_rate": {"log": [0, 1]}}, "the range [0, 1], which is empty for log"),
     ({"train.learning_rate": {"log": [1]}}, "expected two numbers, the least and the greatest"),
     ({"train.learning_rate": {"int": ["a", 2]}}, "expected two numbers"),
     ({"methods.lora.rank": {"one_of": []}}, "expected a list with at least one value"),
     ({"methods.lora.rank": [1, 2]}, "expected one of log2, int, log, float, one_of or layers with its values"),
     ({"methods.lora.exclude_layers": {"layers": 0}}, "expected how many the model has"),
     ({"methods.lora.rank": {"int": [4, 4]}, "task": {"one_of": ["vqa"]}}, "the space names task, which is the same in every trial: leave it out"),
     ({"data.val.limit": {"int": [1, 4]}}, "the space names data.val.limit, which is the same in every trial"),
     ({"methods.lora.rank": {"int": [4, 4]}, "train.batch_size": {"one_of": [2]}}, "the space has one configuration (methods.lora.rank, train.batch_size"),
     ({}, "the space names no setting"),
     ({"methods": {"int": [0, 2]}}, "the space gives methods as int: expected names of methods"),
     ({"methods.lora": {"one_of": [4, 8]}}, "the space gives methods.lora, which is a method: expected {one_of: [true, false]}")],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Space.read(given, KNOWN)
