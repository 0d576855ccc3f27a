"""Dropout is for training: what is generated, and what a loaded adapter says, has none."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import excite, tiny

from adalink import AdaptedModel, LoRA
from adalink.attachment.attachment import without_dropout

DROPPED = {"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=4.0, dropout={"all": 0.5})}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapted() -> AdaptedModel:
    model = AdaptedModel(tiny("llama"))
    excite(model.add_adapter("one", DROPPED).double())
    return model


def test_nothing_is_dropped_inside_and_each_module_is_as_it_was_after() -> None:
    model = adapted()
    first, *_, last = model.active_adapter().modules()
    last.eval()
    modes = [module.training for module in model.modules()]
    assert not torch.equal(model(IDS).logits, model(IDS).logits)  # the control: a new adapter trains
    with without_dropout(model):
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert [module.training for module in model.modules()] == modes
    assert first.training


def test_a_model_that_trains_generates_what_it_does_in_eval_mode() -> None:
    model = adapted()
    drawn = [model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0) for _ in range(3)]
    assert model.active_adapter().training
    model.eval()
    wanted = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert all(torch.equal(ids, wanted) for ids in drawn)


def test_a_loaded_adapter_is_in_eval_mode(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = AdaptedModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(again(IDS).logits, again(IDS).logits)
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)  # saved as float32
    again.train()
    assert not torch.equal(again(IDS).logits, again(IDS).logits)
