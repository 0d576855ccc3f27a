"""What is refused when adapters are attached, or when the model first runs: each in one sentence that says what would have worked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import INPUTS, excite, rows, run, tiny, token_map
from torch import Tensor, nn

from adalink import AdaLink, AdaptedModel, Adapter, Anatomy, LoRA, attach
from adalink.errors import AttachError

LORA = {"lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2)}


def adapter_for(model: nn.Module) -> Adapter:
    adapter = Adapter(LORA, Anatomy.read(model, INPUTS)).double()
    excite(adapter)
    return adapter


def test_a_model_that_is_compiled_already_is_refused() -> None:
    message = "the model is already compiled, and a compiled model never sees edits attached later: attach first, then compile"
    whole, in_place, one_layer = (tiny("llama") for _ in range(3))
    in_place.compile(backend="eager")
    one_layer.model.layers[1].compile(backend="eager")
    compiled: list[Any] = [torch.compile(whole, backend="eager"), in_place, one_layer]
    for model in compiled:
        with pytest.raises(AttachError, match=message):
            attach(model, adapter_for(tiny("llama")), anatomy=Anatomy.read(tiny("llama")))
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("settings", "kind"), [({"use_reentrant": True}, "reentrant"), ({"use_reentrant": False}, "without the context_fn of an attachment")])
def test_checkpointing_that_forgets_the_tokens_is_refused(settings: dict[str, Any], kind: str) -> None:
    message = rf"the model's gradient checkpointing is {kind}.*gradient_checkpointing_disable\(\) before attaching, and attachment.checkpoint_layers\(\) after"
    model: Any = tiny("llama")
    model.gradient_checkpointing_enable(settings)
    with pytest.raises(AttachError, match=message):
        attach(model, adapter_for(model))
    model.gradient_checkpointing_disable()
    adapted = AdaptedModel(model)
    model.gradient_checkpointing_enable(settings)
    with pytest.raises(AttachError, match=message):
        adapted.add_adapter("late", LORA)
    model.gradient_checkpointing_disable()
    attach(model, adapter_for(model))


def gradients(model: Any, adapter: Adapter, checkpointing: dict[str, Any] | None) -> list[Tensor]:
    ids, domain, mask = rows()
    adapter.zero_grad()
    attachment = attach(model, adapter)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({**checkpointing, **({} if checkpointing["use_reentrant"] else {"context_fn": attachment.checkpoint_contexts})})
        model.train()  # transformers checkpoints in training mode alone
    try:
        with attachment.bind(token_map(domain)):
            loss = run(model, ids, mask).square().sum()
        loss.backward()
        return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    finally:
        model.gradient_checkpointing_disable()
        attachment.detach()


def test_transformers_own_checkpointing_works_with_the_attachments_contexts_and_is_never_silently_wrong() -> None:
    model = tiny("llama")
    adapter = adapter_for(model)
    plain = gradients(model, adapter, None)
    again = gradients(model, adapter, {"use_reentrant": False})
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with pytest.raises(AttachError, match=r"ran outside the stack's forward: with gradient checkpointing, use `checkpoint_layers\(\)`"):
        gradients(model, adapter, {"use_reentrant": True})


def test_a_bound_call_must_have_ids() -> None:
    model = tiny("opt")
    attachment = attach(model, adapter_for(model))
    _, domain, mask = rows()
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match="OPTDecoder was called without input_ids or inputs_embeds: pass one of them"):
        model.model.decoder(attention_mask=mask)


def test_a_look_up_of_embeddings_outside_of_a_call_is_not_edited() -> None:
    model = tiny("opt")
    ids, domain, _ = rows()
    adapter = Adapter({"adalink": AdaLink(rank=2, modalities=("text",))}, Anatomy.read(model)).double()
    excite(adapter)
    attachment = attach(model, adapter)
    with attachment.bind(token_map(domain)):
        assert torch.equal(model.get_input_embeddings()(ids), nn.functional.embedding(ids, model.get_input_embeddings().weight))
