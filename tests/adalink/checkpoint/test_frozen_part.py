"""What an adapter is bound to: the weights of a frozen model, and what else decides what it computes."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adalink import AdaLink, AdaptedModel, get_adalink_model
from adalink.checkpoint.fingerprint import FrozenPart, Sketch, differences, part_from_json, part_of, part_to_json
from adalink.checkpoint.folder import CONFIG_FILE
from adalink.errors import CheckpointError

TEXT = AdaLink(rank=4, modalities=("text",))
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bound")
    get_adalink_model(llama(), TEXT).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, "with hidden_act 'silu' in its config, but here hidden_act is 'relu'"),
        ({"rms_norm_eps": 0.1}, "with rms_norm_eps 1e-06 in its config, but here rms_norm_eps is 0.1"),
        ({"rope_theta": 500.0}, r"with rope_parameters\.rope_theta 10000\.0 in its config, but here rope_parameters\.rope_theta is 500\.0"),
    ],
)
def test_the_same_weights_under_another_config_are_another_model(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"was trained on the language model .* {message}.*allow_other_base=True"):
        AdaptedModel.from_pretrained(llama(**settings), folder)
    with pytest.warns(UserWarning, match=f"{message}.*it is loaded all the same"):
        model = AdaptedModel.from_pretrained(llama(**settings), folder, allow_other_base=True)
    assert list(model.adapters) == ["default"]


def test_what_changes_nothing_is_not_compared(folder: Path) -> None:
    base = llama(use_cache=False, attention_dropout=0.3)
    base.config.eos_token_id = 5
    base.config.num_labels = 7
    AdaptedModel.from_pretrained(base, folder)


def test_a_change_that_no_config_tells_is_seen_in_the_hidden_states(tmp_path: Path) -> None:
    get_adalink_model(llama(initializer_range=0.3), TEXT).save_pretrained(tmp_path)
    base = llama(initializer_range=0.3)
    base.model.layers[0].mlp.act_fn = nn.Tanh()
    with pytest.raises(CheckpointError, match=r"other hidden states of the same tokens \(they differ by \d+ % of the range"):
        AdaptedModel.from_pretrained(base, tmp_path)


def test_buffers_that_are_no_weights_are_compared(folder: Path) -> None:
    base = llama()
    base.model.rotary_emb.inv_freq.mul_(1.05)
    with pytest.raises(CheckpointError, match="with other buffers"):
        AdaptedModel.from_pretrained(base, folder)


@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_precision_is_not_another_model(family: str, was: torch.dtype, tmp_path: Path) -> None:
    stored = tiny(family).to(was)
    get_adalink_model(copy.deepcopy(stored), TEXT).save_pretrained(tmp_path)
    other = tiny(family).to(was)
    with torch.no_grad():
        next(parameter for parameter in reversed(list(other.parameters())) if parameter.ndim == 2).mul_(1.02)
    for now in (torch.float32, torch.bfloat16, torch.float16):
        AdaptedModel.from_pretrained(copy.deepcopy(stored).to(now), tmp_path)
        with pytest.raises(CheckpointError, match="but this one is"):  # control: a matrix that is 2 % larger
            AdaptedModel.from_pretrained(copy.deepcopy(other).to(now), tmp_path)


def test_a_folder_of_an_earlier_version_says_what_precision_it_is_about(folder: Path, tmp_path: Path) -> None:
    get_adalink_model(llama(), TEXT).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    content["base"] = {role: {"name": part["name"], "fingerprint": part["fingerprint"]} for role, part in content["base"].items()}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    AdaptedModel.from_pretrained(llama().bfloat16(), tmp_path)
    AdaptedModel.from_pretrained(llama(hidden_act="relu"), tmp_path)  # what it does not know is not compared
    with pytest.raises(CheckpointError, match=r"loaded in float16, in which precision the same weights have another fingerprint"):
        AdaptedModel.from_pretrained(llama().half(), tmp_path)


def test_a_part_survives_json_and_says_nothing_that_it_does_not_know() -> None:
    part = dataclasses.replace(part_of(llama()), tokenizer="ab", sketches={"states": Sketch((1, 2), (0.5, 1.5))})
    assert part_from_json(json.loads(json.dumps(part_to_json(part)))) == part
    assert part_to_json(FrozenPart("x", "ab")) == {"name": "x", "fingerprint": "ab"}
    assert not list(differences(FrozenPart("x", part.fingerprint), part))


def test_a_sketch_differs_by_shape_and_by_what_is_no_number() -> None:
    one = Sketch.of(torch.arange(1000.0), 10)
    assert (len(one.values), one.difference(one)) == (10, 0.0)
    assert one.difference(Sketch.of(torch.arange(999.0), 10)) == 1.0
    assert one.difference(Sketch.of(torch.full((1000,), float("nan")), 10)) == 1.0
    assert one.difference(Sketch.of(torch.arange(1000.0) + 90, 10)) == pytest.approx(0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_has_a_sketch_of_its_states(family: str) -> None:
    assert len(AdaptedModel(tiny(family)).parts["language_model"].sketches["states"].values) >= 32


def test_two_loads_of_one_folder_agree(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    bases = [AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2)]
    get_adalink_model(bases[0], TEXT).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AdaptedModel.from_pretrained(bases[1], tmp_path / "adapter", allow_other_base=True)
