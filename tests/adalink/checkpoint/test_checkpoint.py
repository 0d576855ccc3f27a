"""Adapter folders: what they hold, that they are whole or absent, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import INPUTS, excite, tiny
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from adalink import AdaLink, AdaptedModel, Adapter, Anatomy, Bridge, LoRA, Method, Prompt, from_peft, get_adalink_model, to_peft
from adalink.checkpoint.fingerprint import FrozenPart, fingerprint
from adalink.checkpoint.folder import (
    CONFIG_FILE,
    PEFT_CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    load_weights,
    method_from_json,
    method_to_json,
    read_config,
    save_adapter,
)
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole

METHODS: dict[str, Method] = {
    "adalink": AdaLink(rank=4, modalities=("text", "image"), activation="gelu", bias=True, scope="prompt"),
    "bridge": Bridge(kind="mlp", hidden=8, init_scale=0.5),
    "soft": Prompt(length=2, init_std=0.1),
}
BASE = {"language_model": FrozenPart("facebook/opt-125m", "00112233aabbccdd"), "encoder": FrozenPart("timm:vit", "ffeeddccbbaa9988")}
CONFIG = AdapterConfig(METHODS, BASE, {"task": "captioning", "prompt": "<image><bos>"})
ANATOMY = Anatomy.read(tiny("opt"), INPUTS)


def adapter(seed: int) -> Adapter:
    torch.manual_seed(seed)
    made = Adapter(METHODS, ANATOMY)
    excite(made, seed)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", adapter(1), CONFIG)
    return tmp_path / "adapter"


def test_an_adapter_folder_holds_three_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adalink_config.json", "adapter_model.safetensors"]


def test_what_was_saved_comes_back(folder: Path) -> None:
    assert read_config(folder) == CONFIG
    again = adapter(2)
    load_weights(folder, again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter(1).parameters(), strict=True))


def test_tensors_are_named_by_role_and_marked_as_torch(folder: Path) -> None:
    assert set(load_file(folder / WEIGHTS_FILE)) == set(adapter(1).state_dict())
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_model_card_names_both_frozen_parts_and_what_was_trained(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    header = card.split("---")[1]
    assert "base_model:\n- facebook/opt-125m\n- timm:vit\n" in header
    assert "library_name: adalink" in header
    assert "# Adapter for captioning" in card
    assert f"| adalink | AdaLink | {adapter(1).n_parameters()['adalink']:,} |" in card


def test_saving_again_replaces_and_leaves_nothing_beside(folder: Path) -> None:
    save_adapter(folder, adapter(3), CONFIG)
    again = adapter(2)
    load_weights(folder, again)
    assert torch.equal(next(again.parameters()), next(adapter(3).parameters()))
    assert len(list(folder.iterdir())) == 3


def test_the_config_comes_last_so_half_a_folder_is_no_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[set[str]] = []

    def looked_at(path: Path, content: bytes) -> None:
        write_whole(path, content)
        there.append({each.name for each in path.parent.iterdir()})

    monkeypatch.setattr("adalink.checkpoint.folder.write_whole", looked_at)
    save_adapter(tmp_path / "new", adapter(1), CONFIG)
    assert [CONFIG_FILE in names for names in there] == [False, False, True]
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))} is no adapter folder: it has no adalink_config.json"):
        read_config(folder)
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=f"that can be read; {re.escape(str(tmp_path / 'new'))} has one"):
        read_config(tmp_path)


BROKEN = {
    '{"format": 1': "is not an adapter config",
    "\x00": "is not an adapter config",
    "null": "is not an adapter config",
    "{}": "is not an adapter config",
    '{"peft_type": "LORA", "r": 8}': r"is of the peft library \(LORA\): read its folder with adalink.from_peft",
    '{"format": 1, "methods": [], "base": {}, "task": {}}': "is not an adapter config",
    '{"format": 1, "methods": {}, "base": {"encoder": {"name": "x"}}, "task": {}}': "is not an adapter config",
    '{"format": 1, "methods": {}, "base": {"encoder": "x"}, "task": {}}': "is not an adapter config",
    '{"format": 7}': r"has format 7, and this version of adalink reads 1: update adalink",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_config_of_another_kind_is_refused(content: str, folder: Path) -> None:
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=BROKEN[content]):
        read_config(folder)


def test_a_config_of_bytes_that_are_no_text_is_refused(folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not an adapter config"):
        read_config(folder)


def test_a_model_and_its_adapter_may_lie_in_one_folder(tmp_path: Path) -> None:
    tiny("opt").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# My model\n")
    adapted = get_adalink_model(AutoModelForCausalLM.from_pretrained(tmp_path), AdaLink(rank=4, modalities=("text",)))
    excite(adapted.active_adapter(), 0)
    adapted.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(model) == fingerprint(adapted.base)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "OPTModel"
    assert (tmp_path / "README.md").read_text() == "# My model\n"
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(model, tmp_path)
    again = AdaptedModel.from_pretrained(model, tmp_path).active_adapter()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapted.active_adapter().parameters(), strict=True))


def test_a_folder_of_an_earlier_version_is_read_and_renamed_when_it_is_saved_again(folder: Path) -> None:
    (folder / CONFIG_FILE).rename(folder / PEFT_CONFIG_FILE)
    assert read_config(folder) == CONFIG
    save_adapter(folder, adapter(1), CONFIG)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_folders_of_peft_are_told_apart_and_never_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / PEFT_CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(CheckpointError, match=r"is of the peft library \(LORA\): read its folder with adalink.from_peft"):
        read_config(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"holds an adapter of the peft library, whose adapter_model.safetensors would be overwritten"):
        save_adapter(tmp_path / "theirs", adapter(1), CONFIG)
    with pytest.raises(CheckpointError, match=r"is no peft folder: .* load it with AdaptedModel.from_pretrained"):
        from_peft(folder, tiny("opt"))
    lora = Adapter({"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2)}, ANATOMY)
    with pytest.raises(ConfigError, match=r"holds an adapter of this package, whose adapter_model.safetensors would be overwritten"):
        to_peft(lora, tiny("opt"), folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        read_config(tmp_path / "file")


def test_a_method_without_its_name_is_refused(folder: Path) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text())
    del content["methods"]["adalink"]["method"]
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises((CheckpointError, ConfigError)):
        read_config(folder)


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(folder: Path) -> None:
    path, again = folder / WEIGHTS_FILE, adapter(2)
    before = {name: value.clone() for name, value in again.state_dict().items()}
    whole = load_file(path)
    some = {name: value for name, value in whole.items() if not name.startswith("soft")}
    wide = {**whole, "soft.soft.table": torch.zeros(3, 32)}
    for tensors, message in (
        (some, r"does not fit its config: missing \['soft.soft.table'\], unknown nothing"),
        ({**whole, "new": torch.zeros(1)}, r"missing nothing, unknown \['new'\]"),
        (wide, r"soft.soft.table is \(3, 32\), and this model needs \(2, 32\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            load_weights(folder, again)
        assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(size: int, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged \(.+\): copy or train it again"):
        load_weights(folder, adapter(2))


def test_absent_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_weights(folder, adapter(2))


def test_another_base_is_refused_naming_both() -> None:
    present = {"language_model": FrozenPart("my/opt", "00112233aabbccdd"), "encoder": BASE["encoder"], "other": FrozenPart("x", "y")}
    CONFIG.check_base(present, "here")  # another name for the same weights is the same part
    present["language_model"] = FrozenPart("facebook/opt-350m", "1234123412341234")
    message = (
        r"the adapter in here was trained on the language model facebook/opt-125m \(00112233aabbccdd\), but this one is facebook/opt-350m "
        r"\(1234123412341234\): load the adapter with the parts it was trained on"
    )
    with pytest.raises(CheckpointError, match=message):
        CONFIG.check_base(present, "here")
    del present["encoder"], present["language_model"]
    with pytest.raises(CheckpointError, match=r"was trained on the language model .*, but this one is missing"):
        CONFIG.check_base(present, "here")


@given(
    st.one_of(
        st.builds(
            AdaLink, rank=st.integers(1, 99), modalities=st.sampled_from([("text",), ("image", "text")]), activation=st.sampled_from(["identity", "gelu"]),
            bias=st.booleans(), scope=st.sampled_from(["prompt", "all"]),
        ),
        st.builds(Bridge, kind=st.just("mlp"), hidden=st.integers(0, 9), init_scale=st.floats(0.1, 2.0)),
        st.builds(Prompt, length=st.integers(1, 9), init_std=st.floats(0, 2.0)),
    )
)  # fmt: skip
def test_methods_survive_json(method: Any) -> None:
    assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "dora", "rank": 2}, "there is no method 'dora': give one of adalink, adalora, bitfit"),
    ({"method": "adalink", "rank": 2, "modalities": ["text"], "alpha": 1}, "adalink has no setting alpha: its settings are activation, bias, frozen_down, modalities, rank, scope"),
    ({"method": "adalink", "rank": 2}, "adalink needs the setting modalities, which has no default"),
    ({"method": "bridge", "kind": "conv"}, "the bridge's kind is 'conv'"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong_methods_in_json_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_from_json(content)


def test_a_fingerprint_is_the_same_for_single_and_bfloat16_loads() -> None:
    for family in ("opt", "t5"):
        model = tiny(family).float()
        assert fingerprint(copy.deepcopy(model).bfloat16()) == fingerprint(model) == fingerprint(copy.deepcopy(model).double())


def test_a_fingerprint_tells_other_weights_shapes_and_names_apart() -> None:
    def changed(change: Any) -> str:
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        with torch.no_grad():
            change(model)
        return fingerprint(model)

    same = changed(lambda model: None)
    assert re.fullmatch("[0-9a-f]{16}", same)
    assert same == changed(lambda model: model.requires_grad_(False))
    others = [
        changed(lambda model: model[0].weight.mul_(1.01)),
        changed(lambda model: model[1].bias.add_(0.1)),
        changed(lambda model: model.append(nn.Linear(2, 2))),
        changed(lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.reshape(20, 80)))),
    ]
    assert len({same, *others}) == 5


def test_saving_in_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception):  # noqa: B017 (what it is, is not promised here; that nothing is left behind, is)
        save_adapter(tmp_path / "file" / "adapter", adapter(1), CONFIG)
    assert os.listdir(tmp_path) == ["file"]
