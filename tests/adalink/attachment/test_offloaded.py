"""A frozen model whose weights are brought from memory or disk when a module runs is adapted, trained, saved and loaded as any other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import excite, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from adalink import IA3, AdaLink, AdaptedModel, Anatomy, LoRA, Method, Prompt, get_adalink_model
from adalink.checkpoint.fingerprint import FrozenPart, fingerprint
from adalink.edit import execution_device
from adalink.errors import AttachError, ConfigError
from adalink.methods.prefix import Prefix
from adalink.methods.unipelt import Gated

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TEXT = {"text": ("text",)}
METHODS: dict[str, Method] = {
    "adalink": AdaLink(rank=2, modalities=("text",)), "lora": Gated(inner=LoRA(groups=TEXT, rank=2, alpha=2)), "ia3": IA3(groups=TEXT),
    "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=4), "soft": Prompt(length=2, init_std=0.5, positions="none"),
}  # fmt: skip
WAYS = ("memory", "disk", "map")


def offloaded(family: str, way: str, folder: Path) -> Any:
    model: Any = tiny(family)
    if way == "memory":
        return cpu_offload(model, CPU)
    if way == "disk":
        return disk_offload(model, folder, CPU)
    *others, last = [name for name, child in model.named_modules() if name and not list(child.children()) and next(child.parameters(), None) is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dispatch_model(model, {**dict.fromkeys(others, "disk"), last: "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True)


def inputs(family: str) -> dict[str, Any]:
    return {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_a_model_that_lies_elsewhere_learns_and_is_saved_as_one_that_does_not(family: str, way: str, tmp_path: Path) -> None:
    frozen = offloaded(family, way, tmp_path / "weights")
    assert any(parameter.is_meta for parameter in frozen.parameters())
    models = [get_adalink_model(frozen, METHODS), get_adalink_model(tiny(family), METHODS)]
    for model in models:
        excite(model.active_adapter().double())
    models[0].active_adapter().load_state_dict(models[1].active_adapter().state_dict())
    for model in models:
        optimizer = torch.optim.SGD(model.active_adapter().parameters(), lr=0.1)
        for _ in range(2):
            model(**inputs(family)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # float32 steps inside (T5's and Llama's norms) may round apart where weights lie elsewhere in memory
    for a, b in zip(models[0].active_adapter().parameters(), models[1].active_adapter().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    models[0].save_pretrained(tmp_path / "adapter")
    again = AdaptedModel.from_pretrained(tiny(family), tmp_path / "adapter")
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(models[0].generate(IDS, **settings), again.generate(IDS, **settings))
    back = AdaptedModel.from_pretrained(offloaded(family, way, tmp_path / "others"), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(back(**inputs(family)).logits, again(**inputs(family)).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_given_back_with_its_loaders(way: str, tmp_path: Path) -> None:
    frozen = offloaded("llama", way, tmp_path)
    frozen.requires_grad_(True)
    plain = frozen(IDS).logits.detach()
    model = get_adalink_model(frozen, METHODS["lora"])
    excite(model.active_adapter().double())
    weights = list(model.active_adapter().parameters())
    wanted = torch.autograd.grad(model(IDS).logits.square().sum(), weights)
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(IDS).logits.square().sum(), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    model.unload()
    assert torch.equal(frozen(IDS).logits, plain)
    assert all(parameter.requires_grad for parameter in frozen.parameters())


def test_a_model_that_transformers_itself_offloads(tmp_path: Path) -> None:
    tiny("opt").save_pretrained(tmp_path / "model")  # its head is tied to its embedding
    places = {"model.decoder.embed_tokens": "cpu", "lm_head": "cpu", **dict.fromkeys((f"model.decoder.{name}" for name in (
        "embed_positions", "final_layer_norm", "layers", "project_in", "project_out")), "disk")}  # fmt: skip
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float64)
    assert any(parameter.is_meta for parameter in frozen.parameters())
    model = get_adalink_model(frozen, METHODS)
    assert model.parts["language_model"].fingerprint == fingerprint(tiny("opt"))
    model(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.active_adapter().parameters())


def test_weights_that_are_nowhere_are_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttachError, match=r"the weight 0.bias of Sequential is on the meta device and nothing says where its values are: load the model with"):
        fingerprint(model)
    assert execution_device(model, "0").type == "meta"  # a plan: nothing has values


def spread(family: str) -> Any:
    """A model whose second half computes on another device: on meta, which has no values, but refuses what lies elsewhere as a GPU does."""
    model: Any = tiny(family)
    anatomy = Anatomy.read(model)
    stack = model.get_submodule(anatomy.stack)
    for module in (stack.get_submodule(anatomy.layers[1]), stack.get_submodule(anatomy.final_norm or ""), model.get_output_embeddings()):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("name", ["adalink", "lora", "ia3", "soft"])  # not what layers share (a prefix): that is moved, which meta cannot
def test_edits_compute_where_the_module_of_their_port_does(family: str, name: str) -> None:
    model = AdaptedModel(spread(family), parts={"language_model": FrozenPart("spread", "")})
    adapter = model.add_adapter("one", {name: METHODS[name]})
    devices = {parameter.device.type for parameter in adapter.parameters()}
    assert devices == ({"cpu", "meta"} if name in ("lora", "ia3") else {"cpu"})  # the others are at the embedding, or shared
    output = model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert output.logits.is_meta
    assert model.device == CPU


def test_copies_of_modules_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modules_to_save names lm_head, whose weights are offloaded: give it a device in device_map"):
        get_adalink_model(offloaded("llama", "disk", tmp_path), METHODS["lora"], modules_to_save=["lm_head"])
