"""A model with named adapters: the methods that users of this field know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import INPUTS, excite, tiny
from torch import Tensor

from adalink import BASE_ROW, AdaLink, AdaptedModel, Bridge, FrozenPart, Prompt, get_adalink_model
from adalink.checkpoint.folder import WEIGHTS_FILE
from adalink.errors import CheckpointError, ConfigError

TEXT_ONLY = {"adalink": AdaLink(rank=4, modalities=("text",))}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def add(model: AdaptedModel, name: str, seed: int) -> None:
    excite(model.add_adapter(name, TEXT_ONLY).double(), seed)


@pytest.fixture
def model() -> AdaptedModel:
    model = AdaptedModel(tiny("llama"))
    add(model, "first", 1)
    add(model, "second", 2)
    return model


def logits(model: AdaptedModel, name: str | None) -> Tensor:
    if name is None:
        with model.disable_adapter():
            return model(IDS).logits
    model.set_adapter(name)
    return model(IDS).logits


def test_adapters_are_added_set_and_disabled(model: AdaptedModel) -> None:
    assert model.active == "second"
    first, second, none = logits(model, "first"), logits(model, "second"), logits(model, None)
    assert model.active == "second"
    assert torch.equal(none, tiny("llama")(IDS).logits)
    assert not torch.equal(first, second)
    assert not torch.equal(first, none)
    assert torch.equal(logits(model, "first"), first)


def test_adding_an_adapter_changes_no_other(model: AdaptedModel) -> None:
    before = logits(model, "first")
    add(model, "third", 3)
    assert model.active == "third"
    assert torch.equal(logits(model, "first"), before)


def test_disabled_adapters_come_back_even_after_an_error(model: AdaptedModel) -> None:
    with pytest.raises(ConfigError, match="no adapter is active"), model.disable_adapter():
        model.active_adapter()
    assert model.active == "second"


def test_rows_name_the_adapters_that_serve_them(model: AdaptedModel) -> None:
    assert model.rows(3).tolist() == [1, 1, 1]
    assert model.rows(3, ["second", None, "first"]).tolist() == [1, BASE_ROW, 0]
    with pytest.raises(ConfigError, match="2 adapter names were given for 3 rows: give one for each row"):
        model.rows(3, ["first", "second"])
    with pytest.raises(ConfigError, match="there is no adapter 'third': this model has first, second"):
        model.rows(1, ["third"])


def test_names_that_cannot_be_used_are_refused(model: AdaptedModel) -> None:
    for name in ("first", "my adapter", "a.b", ""):
        with pytest.raises(ConfigError, match=rf"the adapter's name is '{name}': give an identifier that is not one of \['first', 'second'\]"):
            model.add_adapter(name, TEXT_ONLY)
    with pytest.raises(ConfigError, match="there is no adapter 'third': this model has first, second"):
        model.set_adapter("third")
    with pytest.raises(ConfigError, match="there is no adapter 'x': this model has none"):
        AdaptedModel(tiny("llama")).set_adapter("x")
    assert model.active == "second"


def test_without_an_active_adapter_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter is active: call add_adapter or set_adapter first"):
        AdaptedModel(tiny("llama")).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_padding_is_nobodys(model: AdaptedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    seen: list[Tensor] = []
    embedding: Any = model.attachment.stack.embed_tokens
    embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDS, attention_mask=mask)
    words = embedding.weight[IDS]
    assert torch.equal(seen[0][0, 0], words[0, 0])
    assert not torch.equal(seen[0][0, 1], words[0, 1])


def test_generation_equals_calling_the_model_again_and_again(model: AdaptedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    generated = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = IDS
    for _ in range(5):
        mask_now = torch.cat([mask, torch.ones(2, ids.shape[1] - 4, dtype=torch.int64)], 1)
        positions = (mask_now.cumsum(1) - 1).clamp(min=0)
        ids = torch.cat([ids, model(ids, attention_mask=mask_now, position_ids=positions).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


def test_saved_and_loaded_by_name(model: AdaptedModel, tmp_path: Path) -> None:
    expected = logits(model, "first")
    model.task = {"task": "x"}
    model.save_pretrained(str(tmp_path))
    again = AdaptedModel.from_pretrained(tiny("llama"), tmp_path)
    again.adapters["default"].double()
    again.adapters["default"].load_state_dict(model.adapters["first"].state_dict())
    assert torch.equal(logits(again, "default"), expected)
    assert again.task == {"task": "x"}
    assert AdaptedModel.read_config(tmp_path).methods == TEXT_ONLY


def test_loaded_weights_are_the_saved_ones(model: AdaptedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = model.load_adapter(tmp_path, "again")
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value.double(), model.adapters["second"].get_parameter(name), rtol=1e-6, atol=1e-6)


def test_an_adapter_of_another_base_is_refused_and_the_model_stays(model: AdaptedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    other = AdaptedModel(tiny("llama", seed=9))
    with pytest.raises(CheckpointError, match=r"was trained on the language model LlamaForCausalLM \(.*\), but this one is LlamaForCausalLM \("):
        other.load_adapter(tmp_path, "one")
    assert not other.adapters
    same = AdaptedModel(tiny("llama").float())
    same.load_adapter(tmp_path, "one")  # in another precision it is the same base


def damaged(model: AdaptedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    return folder


def test_a_damaged_adapter_is_not_added(model: AdaptedModel, tmp_path: Path) -> None:
    before = logits(model, "first"), logits(model, "second")
    with pytest.raises(CheckpointError, match="is damaged"):
        model.load_adapter(damaged(model, tmp_path), "third")
    assert list(model.adapters) == ["first", "second"]
    assert torch.equal(logits(model, "first"), before[0])
    assert torch.equal(logits(model, "second"), before[1])


def test_a_damaged_adapter_leaves_the_active_one_active(model: AdaptedModel, tmp_path: Path) -> None:
    folder = damaged(model, tmp_path)
    with pytest.raises(CheckpointError, match="is damaged"):
        model.load_adapter(folder, "third")
    assert model.active == "second"


def test_the_frozen_part_stays_in_eval_mode_whatever_train_is_called(model: AdaptedModel) -> None:
    model.train()
    assert not any(module.training for module in model.base.modules())


def test_names_that_lead_to_no_adapter_are_refused() -> None:
    for name, kind in (("no-such-adapter", "LocalEntryNotFoundError"), ("no such name!", "HFValidationError")):
        with pytest.raises(ConfigError, match=rf"{name} is neither a folder nor an adapter on the hub \({kind}\): check the name"):
            AdaptedModel.read_config(name)


def test_one_line_makes_an_adapted_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_adalink_model(tiny("opt"), AdaLink(rank=4, modalities=("text",)))
    assert (list(model.adapters), list(model.active_adapter().methods)) == (["default"], ["adalink"])
    model.print_trainable_parameters()
    n = sum(parameter.numel() for parameter in tiny("opt").parameters())
    line = f"trained: 256 || all: {n + 256:,} || trained share: {100 * 256 / (n + 256):.4f} % (adalink 256)\n"  # 2 x 32 x 4
    assert capsys.readouterr().out == line


def test_the_trained_parameters_of_each_method_are_counted() -> None:
    model = AdaptedModel(tiny("opt"), inputs=INPUTS, parts={"language_model": FrozenPart("x", "y")})
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "soft": Prompt(length=3, init_std=0.1)})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 2 * 20 + 20 * 32 + 32 + 3 * 32
    assert f"trained: {trained:,} || " in model.trainable_summary()
    assert model.trainable_summary().endswith("(bridge 712, soft 96)")
