"""Settings that are tuples, settings that have defaults, and the names of adapters as users of peft know them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import excite, tiny

from adalink import EPALM, IA3, AdaLink, AdaptedModel, BitFit, Bottleneck, LoRA, Prefix, Prompt, get_adalink_model
from adalink.errors import ConfigError
from multimodal.sample import Question, Sample
from multimodal.training.settings import TrainSettings

TEXTS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "modalities": (lambda value: AdaLink(rank=1, modalities=value), "text", r"AdaLink's modalities is the text 'text', expected a tuple: give \('text',\)"),
    "LoRA targets": (lambda value: LoRA(targets=value), "q_proj", r"LoRA's targets is the text 'q_proj'"),
    "LoRA exclude": (lambda value: LoRA(exclude=value), "q_proj", "LoRA's exclude is the text 'q_proj'"),
    "LoRA layers": (lambda value: LoRA(exclude_layers=value), 3, r"LoRA's exclude_layers is 3, expected a tuple: give \(3,\)"),
    "BitFit targets": (lambda value: BitFit(targets=value), "q_proj", "BitFit's targets is the text"),
    "IA3 attention": (lambda value: IA3(attention=value), "key", "IA3's attention is the text 'key'"),
    "IA3 feed_forward": (lambda value: IA3(feed_forward=value), "down", "IA3's feed_forward is the text 'down'"),
    "bottleneck domains": (lambda value: Bottleneck(width=1, domains=value), 2, r"the bottleneck's domains is 2, expected a tuple"),
    "bottleneck layers": (lambda value: Bottleneck(width=1, exclude_layers=value), "11", "the bottleneck's exclude_layers is the text '11'"),
    "prefix layers": (lambda value: Prefix(length=1, form="table", exclude_layers=value), "1", "the prefix's exclude_layers is the text '1'"),
    "eP-ALM layers": (lambda value: EPALM(layers=value, n_taps=1, connector="shared"), "12", "eP-ALM's layers is the text '12'"),
    "captions": (lambda value: Sample(key="a", image_id=1, media=b"", captions=value), "a dog", "sample 'a''s captions is the text 'a dog'"),
    "answers": (lambda value: Question(question_id=7, text="?", answers=value), "yes", "question 7's answers is the text 'yes'"),
    "trackers": (lambda value: TrainSettings(epochs=1, trackers=value), "wandb", "train's trackers is the text 'wandb'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_in_place_of_a_tuple_is_refused_by_its_name(name: str) -> None:
    make, value, message = TEXTS[name]
    with pytest.raises(ConfigError, match=message):
        make(value)


def test_a_list_is_a_tuple_and_a_group_of_one_domain_a_text() -> None:
    made = LoRA(groups={"words": "text"}, targets=["q_proj"], exclude_layers=[0])  # type: ignore[dict-item,arg-type]
    assert (made.groups, made.targets, made.exclude_layers) == ({"words": ("text",)}, ("q_proj",), (0,))


def test_defaults_are_the_fields_own() -> None:
    assert LoRA() == LoRA(groups={"all": ("all",)}, rank=8, alpha=16.0)
    assert IA3().groups == BitFit().groups == {"all": ("all",)}
    assert (Prompt(length=1).init_std, Prefix(length=1, form="table").init_std) == (0.02, 0.02)
    with pytest.raises(TypeError, match="rank"):  # a choice of science has none
        AdaLink(modalities=("text",))  # type: ignore[call-arg]


def test_the_active_adapter_is_a_name_and_called_an_adapter(tmp_path: Path) -> None:
    model = AdaptedModel(tiny("llama"))
    assert (model.active_adapter, model.active_adapters, model.adapter_names) == ("", [], [])
    with pytest.raises(ConfigError, match="no adapter is active"):
        model.active_adapter()
    one = model.add_adapter("one", LoRA())
    two = model.add_adapter("two", {"soft": Prompt(length=1)})
    assert (model.active_adapter, model.active_adapters, model.adapter_names) == ("two", ["two"], ["one", "two"])
    assert model.active_adapter() is two
    assert list(one.methods) == ["lora"]
    model.set_adapter("one")
    assert f"{model.active_adapter} {model.active_adapter() is one}" == "one True"
    with model.disable_adapter():
        assert model.active_adapters == []
    excite(one)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "three", activate=False)
    assert model.active_adapter == "one"
    assert [name for name, adapter in model.adapters.items() if any(p.requires_grad for p in adapter.parameters())] == ["one"]
    model.load_adapter(tmp_path, "four")
    assert model.active_adapter == "four"


def test_without_an_active_one_a_loaded_adapter_may_rest(tmp_path: Path) -> None:
    get_adalink_model(tiny("llama"), LoRA()).save_pretrained(tmp_path)
    model = AdaptedModel(tiny("llama"))
    model.load_adapter(tmp_path, "one", activate=False)
    assert (model.active_adapters, model.adapter_names) == ([], ["one"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not AdaptedModel.from_pretrained(tiny("llama"), tmp_path).training
