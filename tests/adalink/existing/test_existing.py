"""Existing vision-language models, each of its real class: one line attaches, image tokens are found by id, and nothing else changes."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_models import DECODERS, FAMILIES, IMAGE_ID, answers, batch, excite, existing
from shared import covering
from torch import Tensor

from adalink import AdaLink, AdaptedModel, LoRA, Prompt, get_adalink_model
from adalink.errors import CheckpointError

BOTH = AdaLink(rank=4, modalities=("text", "image"), activation="gelu", bias=True)
PROMPT_SCOPE = AdaLink(rank=4, modalities=("text", "image"), scope="prompt")
SOFT = Prompt(length=3, init_std=0.5)
LORA = LoRA(groups={"image": ("image",), "text": ("text",)}, rank={"image": 4, "text": 2}, alpha=4)  # Context-PEFT, on images and text apart
METHODS: dict[str, Any] = {
    "adalink": {"adalink": BOTH},
    "prompt_scope": {"adalink": PROMPT_SCOPE},
    "soft": {"soft": SOFT, "adalink": BOTH},
    "lora": {"lora": LORA},
}
ON_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
MATRIX = list(product(FAMILIES, METHODS))
NEVER = [2, 60, IMAGE_ID]  # no end, and no token that would want an image
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": NEVER}


def adapted(family: str, name: str, seed: int = 1) -> AdaptedModel:
    model = get_adalink_model(existing(family), METHODS[name])
    excite(model.active_adapter().double(), seed)
    return model


def merged(model: AdaptedModel, inputs: dict[str, Any]) -> Tensor:
    """What the language model's layers read: the merged embeddings after the edits, [B, T, D]."""
    seen: list[Tensor] = []
    stack = model.attachment.stack
    handle = stack.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def hooks(model: Any) -> list[tuple[Any, ...]]:
    """What is hooked to each module: transformers itself hooks some vision layers, to collect what they give."""
    return [(*module._forward_hooks, *module._forward_pre_hooks, "forward" in vars(module)) for module in model.modules()]


@ON_EVERY_FAMILY
def test_each_modality_is_edited_at_its_own_tokens_and_padding_at_none(family: str) -> None:
    inputs = answers(family, batch(family))
    ids, real = inputs["input_ids"], inputs["attention_mask"] == 1
    is_image = ids == IMAGE_ID
    plain = merged(AdaptedModel(existing(family)), inputs)
    for modality, its_own in (("image", is_image), ("text", real & ~is_image)):
        model = get_adalink_model(existing(family), AdaLink(rank=4, modalities=(modality,)))  # type: ignore[arg-type]
        excite(model.active_adapter().double())
        edited = merged(model, inputs)
        bottleneck = model.active_adapter().placements[0].edit
        assert torch.equal(edited[~its_own], plain[~its_own])
        assert torch.equal(edited[its_own], bottleneck(plain, None, plain)[its_own])  # after the merge, and after Gemma's scale
        assert not torch.isclose(edited[its_own], plain[its_own]).all(-1).any()


@ON_EVERY_FAMILY
def test_a_new_adapter_leaves_the_model_as_it_was_and_unloading_leaves_no_trace(family: str) -> None:
    base = existing(family)
    weights = copy.deepcopy(base.state_dict())
    inputs = answers(family, batch(family))
    with torch.no_grad():
        expected = base(**inputs).logits
    base.train().requires_grad_(True)
    before = hooks(base)
    model = get_adalink_model(base, BOTH)
    model.active_adapter().double()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        excite(model.active_adapter())
        assert not torch.equal(model(**inputs).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
    assert model.unload() is base
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(module.training for module in base.modules())
    assert hooks(base) == before
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())
    with torch.no_grad():
        assert torch.equal(base.eval().requires_grad_(False)(**inputs).logits, expected)  # CPU kernels differ where a weight may want a gradient


@pytest.mark.parametrize(("family", "name"), covering(MATRIX, each=1, shift=1))
def test_a_few_steps_lower_the_loss_and_leave_every_frozen_byte(family: str, name: str) -> None:
    model = adapted(family, name)
    weights = copy.deepcopy(model.base.state_dict())
    inputs = answers(family, batch(family))
    optimizer = torch.optim.AdamW(model.active_adapter().parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        for role, parameter in model.active_adapter().named_parameters():
            if ".1." not in role:  # the last layer writes nothing at the images that anybody reads
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 0, role
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(weights[key], value) for key, value in model.base.state_dict().items())
    assert all(parameter.grad is None for parameter in model.base.parameters())


def check_cached(family: str, name: str, beams: int) -> None:
    model, inputs = adapted(family, name), batch(family)
    cached, uncached = (model.generate(**inputs, **SETTINGS, num_beams=beams, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **SETTINGS, num_beams=beams), cached)  # control: the adapter is at work


@pytest.mark.parametrize(("family", "name"), covering(MATRIX, each=1))
def test_cached_generation_equals_uncached(family: str, name: str) -> None:
    check_cached(family, name, beams=1)


@pytest.mark.parametrize(("family", "name"), covering(MATRIX, each=1, shift=2, hard=("soft",)))
def test_cached_generation_with_beams_equals_uncached(family: str, name: str) -> None:
    check_cached(family, name, beams=3)


@pytest.mark.parametrize(("family", "name"), covering(product(DECODERS, METHODS), each=1, shift=3))
def test_training_sees_the_edits_that_generation_saw(family: str, name: str) -> None:
    model, inputs = adapted(family, name), batch(family)
    ids = model.generate(**inputs, **SETTINGS)
    n_prompt = inputs["input_ids"].shape[1]
    assert torch.equal(ids[:, :n_prompt], inputs["input_ids"])
    gradients = answers(family, inputs, n=4)
    gradients["input_ids"] = ids
    gradients["labels"][:, n_prompt:] = ids[:, n_prompt:]
    with torch.no_grad():
        logits = model(**gradients).logits
    assert logits.shape[1] == ids.shape[1]
    logits[..., NEVER] = -torch.inf
    assert torch.equal(logits[:, n_prompt - 1 : -1].argmax(-1), ids[:, n_prompt:])


@ON_EVERY_FAMILY
def test_rows_are_served_by_the_adapters_they_name(family: str) -> None:
    model = adapted(family, "soft")
    excite(model.add_adapter("second", METHODS["adalink"]).double(), 2)
    inputs = batch(family)

    def generated(names: list[str]) -> Tensor:
        return model.generate(**inputs, **SETTINGS, num_beams=2, adapter_names=names)

    apart = {name: generated([name] * 3) for name in ("default", "second", "__base__")}
    mixed = generated(list(apart))
    assert all(torch.equal(mixed[i], alone[i]) for i, alone in enumerate(apart.values()))
    assert not torch.equal(apart["default"], apart["second"])
    plain = existing(family).generate(**inputs, **SETTINGS, num_beams=2)
    assert torch.equal(apart["__base__"], plain)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma", "blip2_opt", "blip2_t5"])
def test_checkpointed_gradients_equal_plain_ones(family: str) -> None:
    model, inputs = adapted(family, "lora"), answers(family, batch(family))
    weights = list(model.active_adapter().parameters())
    plain = torch.autograd.grad(model(**inputs).loss, weights, allow_unused=True)
    model.attachment.checkpoint_layers()
    again = torch.autograd.grad(model(**inputs).loss, weights, allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert any(a is not None and a.abs().max() > 0 for a in plain)


@pytest.mark.parametrize("family", ["llava", "blip2_t5"])
def test_an_adapter_is_saved_and_loaded_onto_the_same_model_alone(family: str, tmp_path: Path) -> None:
    model, inputs = adapted(family, "soft"), answers(family, batch(family))
    model.active_adapter().float().double()  # what a file of float32 holds
    model.save_pretrained(tmp_path)
    again = AdaptedModel.from_pretrained(existing(family), tmp_path)
    again.active_adapter().double()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-12)
    with pytest.raises(CheckpointError, match=r"was trained on the language model .*ForConditionalGeneration \(.*\), but this one is"):
        AdaptedModel.from_pretrained(existing(family, seed=1), tmp_path)
