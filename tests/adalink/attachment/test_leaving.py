"""Whatever is attached to a frozen model, and however it ends: outside of a bound call the model is the frozen one, and nothing stays behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import PATIENCE
from tiny import FAMILIES, excite, rows, run, tiny, token_map
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from adalink import AdaLink, AdaptedModel, Adapter, Anatomy, LoRA, Method, Prompt, attach, attach_vision, get_adalink_model
from adalink.attachment.attachment import Attachment
from adalink.errors import AdalinkError, AttachError, ConfigError
from adalink.methods.prefix import Prefix

TEXT = AdaLink(rank=2, modalities=("text",))
# Every kind of port that plain ids can have.
METHODS: dict[str, Method] = {
    "lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2), "prefix": Prefix(length=2, form="table", init_std=0.5), "soft": Prompt(length=2, init_std=0.5, positions="none"),
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def trace(model: nn.Module) -> list[Any]:
    """All that attaching touches: hooks, forwards, modes, flags, and what is kept beside."""
    modules = list(model.modules())
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), "forward" in one.__dict__, one.training) for one in modules]
    return [hooks, [parameter.requires_grad for parameter in model.parameters()], sorted(model.__dict__)]


def trained(family: str) -> Any:
    """A model that was being trained: what a frozen one is not."""
    model = tiny(family).train().requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_bound_call_the_model_is_the_frozen_one(family: str) -> None:
    ids, _, mask = rows()
    plain, model = run(tiny(family), ids, mask), tiny(family)
    adapted = AdaptedModel(model)
    excite(adapted.add_adapter("one", METHODS).double())
    assert torch.equal(run(model, ids, mask), plain)
    with adapted.disable_adapter():
        assert torch.equal(run(model, ids, mask), plain)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), tiny(family).generate(ids, attention_mask=mask, **settings))
    assert not torch.equal(adapted(IDS, **({"labels": IDS} if family == "t5" else {})).logits, model(IDS, **({"labels": IDS} if family == "t5" else {})).logits)


FAILING: dict[str, tuple[type[AdalinkError], Mapping[str, Method]]] = {
    "tokens that the model never sees": (ConfigError, {"adalink": AdaLink(rank=2, modalities=("image",))}),
    "a linear that is not there": (AttachError, {"lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2, targets=("nowhere",))}),
    "no method": (ConfigError, {}),
}


@pytest.mark.parametrize("why", FAILING)
def test_an_adapter_that_fails_leaves_no_trace(why: str) -> None:
    error, methods = FAILING[why]
    model = trained("llama")
    before = trace(model)
    with pytest.raises(error) as retained:  # as a notebook keeps it
        get_adalink_model(model, methods)
    assert trace(model) == before
    assert retained
    model(IDS)


def test_a_folder_that_is_none_leaves_no_trace(tmp_path: Path) -> None:
    model = trained("opt")
    before = trace(model)
    with pytest.raises(AdalinkError, match="is no adapter folder"):
        AdaptedModel.from_pretrained(model, tmp_path)
    assert trace(model) == before


def test_a_hook_that_cannot_be_placed_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama")
    before = trace(model)
    adapter = Adapter({"lora": METHODS["lora"]}, Anatomy.read(model))
    place, placed = Attachment._hook, []

    def third_fails(attachment: Attachment, port: Any) -> Any:
        placed.append(port)
        if len(placed) == 3:
            raise RuntimeError("no room")
        return place(attachment, port)

    monkeypatch.setattr(Attachment, "_hook", third_fails)
    with pytest.raises(RuntimeError, match="no room"):
        attach(model, adapter)
    assert trace(model) == before
    adapted = AdaptedModel(model)
    between, placed[:] = trace(model), []
    with pytest.raises(RuntimeError, match="no room"):
        adapted.add_adapter("one", METHODS["lora"])
    assert trace(model) == between
    assert not adapted.adapters


@pytest.mark.parametrize("name", ["keys", "pop", "training", "__base__"])
def test_a_name_that_a_dictionary_has_itself_is_refused_before_anything_is_attached(name: str) -> None:
    adapted = AdaptedModel(tiny("llama"))
    before = trace(adapted.base)
    with pytest.raises(ConfigError, match=f"the adapter's name is '{name}': give an identifier that is not one of"):
        adapted.add_adapter(name, TEXT)
    assert trace(adapted.base) == before


def test_a_cell_that_is_run_twice_leaves_one_adapter() -> None:
    frozen = trained("llama")
    before = trace(frozen)
    plain = tiny("llama")(IDS).logits
    first: Any = get_adalink_model(frozen, METHODS)
    once = trace(frozen)
    retained = first  # as a notebook keeps its outputs
    model = get_adalink_model(frozen, METHODS)
    excite(retained.active_adapter().double(), 1)
    excite(model.active_adapter().double(), 2)
    alone = get_adalink_model(tiny("llama"), METHODS)
    alone.active_adapter().double().load_state_dict(model.active_adapter().state_dict())
    assert torch.equal(model(IDS).logits, alone(IDS).logits)  # the first one's edits are not in it
    assert torch.equal(frozen(IDS).logits, plain)
    del first, retained
    gc.collect()
    assert trace(frozen) == once  # still frozen
    assert torch.equal(model(IDS).logits, alone(IDS).logits)
    model.gradient_checkpointing_enable()
    del model
    gc.collect()
    assert trace(frozen) == before
    frozen(IDS).logits.sum().backward()


def test_attachments_leave_in_any_order_and_twice() -> None:
    model = trained("opt")
    before = trace(model)
    first, second = (attach(model, Adapter({"lora": METHODS["lora"]}, Anatomy.read(model))) for _ in range(2))
    first.detach()
    first.detach()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.detach()
    assert trace(model) == before
    model.train()
    second.detach()
    assert model.training


def test_a_vision_encoder_is_given_back_where_a_hook_cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTConfig, ViTModel

    from adalink.attachment.vision import VisionAttachment, read_vision

    model = ViTModel(ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)).train()
    before = trace(model)
    adapter = Adapter({"adalink": AdaLink(rank=2, modalities=("image",))}, read_vision(model))
    attach_vision(model, adapter).detach()
    assert trace(model) == before

    def fails(attachment: VisionAttachment, port: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(VisionAttachment, "_hook", fails)
    with pytest.raises(RuntimeError, match="no room"):
        attach_vision(model, adapter)
    assert trace(model) == before


def test_two_threads_that_bind_different_adapters_do_not_meet() -> None:
    adapted = AdaptedModel(tiny("llama"))
    for i, name in enumerate(("one", "two")):
        excite(adapted.add_adapter(name, METHODS["lora"]).double(), i + 1)
    expected = {name: adapted(IDS, adapter_names=[name] * 2).logits for name in ("one", "two", "__base__")}
    assert not torch.equal(expected["one"], expected["two"])
    together, found = threading.Barrier(3, timeout=PATIENCE), {}  # a thread that fails lets the others go

    def ask(name: str) -> None:
        call = adapted._call({"input_ids": IDS}, [name] * 2, "right")
        together.wait()
        with adapted.attachment.bind(call.token_map):
            together.wait()  # each has bound before any calls
            try:
                found[name] = adapted.base(**call.arguments).logits
            except BaseException:
                together.abort()
                raise
            together.wait()

    def frozen(results: dict[str, Tensor]) -> None:
        together.wait()
        together.wait()
        results["__base__"] = adapted.base(IDS).logits  # bound in the others' threads alone
        together.wait()

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")] + [threading.Thread(target=frozen, args=(found,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert adapted.attachment.map is None


def test_what_is_recomputed_in_another_thread_has_its_own_tokens() -> None:
    """Autograd runs the backward pass of a GPU in threads of its own."""
    adapted = get_adalink_model(tiny("llama"), METHODS["lora"])
    excite(adapted.active_adapter().double())
    weights = list(adapted.active_adapter().parameters())
    plain = torch.autograd.grad(adapted(IDS).logits.square().sum(), weights)
    adapted.gradient_checkpointing_enable()
    loss = adapted(IDS).logits.square().sum()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, weights)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_only_the_active_adapter_requires_a_gradient() -> None:
    adapted = AdaptedModel(tiny("llama"))
    for name in ("one", "two", "three"):
        adapted.add_adapter(name, {"adalink": TEXT, "lora": METHODS["lora"]}).double()

    def trains() -> list[str]:
        return [name for name in adapted.adapters if any(parameter.requires_grad for parameter in adapted.adapters[name].parameters())]

    assert trains() == ["three"]
    adapted.set_adapter("one")
    assert trains() == ["one"]
    for name, parameter in adapted.active_adapter().named_parameters():
        parameter.requires_grad_("adalink" in name)
    adapted.set_adapter("two")
    with adapted.disable_adapter():
        assert trains() == ["two"]
    adapted.set_adapter("one")
    assert [name for name, parameter in adapted.active_adapter().named_parameters() if parameter.requires_grad] == ["adalink.text.down.weight", "adalink.text.up.weight"]
    adapted(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for name in ("two", "three") for parameter in adapted.adapters[name].parameters())
    adapted.delete_adapter("one")
    assert trains() == []
    adapted.set_adapter("three")
    assert trains() == ["three"]


def test_an_adapter_that_rests_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    adapted = AdaptedModel(tiny("llama"))
    excite(adapted.add_adapter("one", TEXT))
    adapted.add_adapter("two", TEXT)
    adapted.set_adapter("one")
    adapted.save_pretrained(tmp_path)
    loaded = adapted.load_adapter(tmp_path, "again")
    assert all(torch.equal(a, b) for a, b in zip(adapted.adapters["one"].parameters(), loaded.parameters(), strict=True))


def test_models_that_read_both_ways_are_let_through_too() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)).double().eval()
    plain = model(IDS).logits
    excite(get_adalink_model(model, METHODS).active_adapter())
    attachment = attach(model, Adapter({"lora": METHODS["lora"]}, Anatomy.read(model)))
    assert torch.equal(model(IDS).logits, plain)
    with attachment.bind(token_map(torch.zeros_like(IDS))):
        model(IDS)
