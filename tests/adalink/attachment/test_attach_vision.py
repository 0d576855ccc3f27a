"""The same methods inside a frozen vision transformer of transformers, timm and open_clip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from existing_models import existing
from tiny import excite, tiny
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from adalink import IA3, AdaLink, Adapter, BitFit, LoRA, Method, Placement, Port, Prompt
from adalink.attachment.vision import VisionAttachment, attach_vision, read_vision
from adalink.errors import AttachError, ConfigError

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TIMM: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
MADE: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES)),
    "timm": lambda: timm.models.vision_transformer.VisionTransformer(**TIMM),
    "timm_registers": lambda: timm.models.vision_transformer.VisionTransformer(**TIMM, reg_tokens=3, no_embed_class=True),
    "open_clip": lambda: open_clip.transformer.VisionTransformer(
        image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=8, output_tokens=True
    ),
}
FAMILIES = tuple(MADE)
LINK = AdaLink(rank=4, modalities=("image",), activation="gelu", bias=True)
METHODS: dict[str, Method] = {
    "adalink": LINK,
    "lora": LoRA(groups={"image": ("image",)}, rank=2, alpha=4),
    "bitfit": BitFit(groups={"image": ("image",)}, force_bias=True),
    "ia3": IA3(groups={"image": ("image",)}),
    "prompt": Prompt(length=3, init_std=0.5),
}
ON_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY = pytest.mark.parametrize("name", METHODS)


def made(family: str) -> Any:
    torch.manual_seed(0)
    model = MADE[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.double().eval().requires_grad_(False)


def adapter_for(name: str, model: nn.Module, *, excited: bool = True) -> Adapter:
    method = METHODS[name]
    if name == "ia3" and isinstance(model, open_clip.transformer.VisionTransformer):
        method = IA3(groups={"image": ("image",)}, attention=())  # torch's own attention has no linears that run as modules
    adapter = Adapter({name: method}, read_vision(model)).double()
    if excited:
        excite(adapter)
    return adapter


def pixels() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def features(model: Any) -> Tensor:
    """The last layer's tokens [B, P + N, D]."""
    if isinstance(model, open_clip.transformer.VisionTransformer):
        pooled, tokens = model(pixels())
        return torch.cat([pooled, tokens.flatten(1)], 1)
    return model.forward_features(pixels()) if hasattr(model, "forward_features") else model(pixel_values=pixels()).last_hidden_state


def layers(model: Any, adapter: Adapter | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into each layer and what comes out, as anybody outside sees it."""
    into: list[Tensor] = []
    out: list[Tensor] = []
    names = read_vision(model).layers
    handles = [model.get_submodule(name).register_forward_hook(lambda module, args, output: out.append(output[0] if isinstance(output, tuple) else output)) for name in names]
    handles += [model.get_submodule(name).register_forward_pre_hook(lambda module, args: into.append(args[0])) for name in names]
    attachment = attach_vision(model, adapter) if adapter else None  # hooked after those above, as transformers' own are
    features(model)
    for handle in handles:
        handle.remove()
    if attachment:
        attachment.detach()
    return into, out


@EVERY
@ON_EVERY_FAMILY
def test_a_picture_is_seen_otherwise_and_detach_leaves_no_trace(family: str, name: str) -> None:
    model = made(family)
    expected, weights = features(model), copy.deepcopy(model.state_dict())
    model.train().requires_grad_(True)
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
    attachment = attach_vision(model, adapter_for(name, model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    edited = features(model)
    assert edited.shape == expected.shape
    assert not torch.isclose(edited, expected).all(-1).any()
    attachment.detach()
    assert [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(features(model.eval().requires_grad_(False)), expected)


@EVERY
@ON_EVERY_FAMILY
def test_every_weight_is_trained_and_no_frozen_byte_moves(family: str, name: str) -> None:
    model = made(family)
    weights = copy.deepcopy(model.state_dict())
    adapter = adapter_for(name, model)
    attach_vision(model, adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        features(model).square().sum().backward()
        for role, parameter in adapter.named_parameters():
            if "k_proj" not in role or "bias" not in role:  # a softmax does not see one number added to all keys
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 0, role
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adalink", "lora", "bitfit", "ia3"])
@ON_EVERY_FAMILY
def test_a_new_adapter_sees_what_the_frozen_encoder_sees(family: str, name: str) -> None:
    model = made(family)
    with torch.no_grad():  # torch's own attention has another kernel where a gradient is wanted
        expected = features(model)
        attach_vision(model, adapter_for(name, model, excited=False))
        assert torch.equal(features(model), expected)


@ON_EVERY_FAMILY
def test_adalink_edits_the_patches_before_class_token_and_positions(family: str) -> None:
    model = made(family)
    raw: list[Tensor] = []
    convolution = model.get_submodule(read_vision(model).embedding)
    first = convolution.register_forward_hook(lambda module, args, output: raw.append(output))
    adapter = adapter_for("adalink", model)
    plain = layers(model)[0][0]
    edited = layers(model, adapter)[0][0]
    first.remove()
    n_patches = raw[0].flatten(2).shape[2]
    n_before = plain.shape[1] - n_patches
    assert torch.equal(edited[:, :n_before], plain[:, :n_before])  # class and register tokens
    tokens = raw[0].flatten(2).transpose(1, 2)
    change = adapter.placements[0].edit(tokens, None, tokens) - tokens
    if family not in ("clip", "open_clip"):  # those norm what enters the first layer
        torch.testing.assert_close(edited[:, n_before:] - plain[:, n_before:], change, rtol=0, atol=1e-12)


@ON_EVERY_FAMILY
def test_prompts_go_along_with_the_tokens_and_nobody_outside_sees_them(family: str) -> None:
    model = made(family)
    adapter = adapter_for("prompt", model)
    table: Any = adapter.placements[0].edit.table
    into, out = layers(model)
    h = torch.cat([into[0], table.expand(3, -1, -1)], 1)  # the definition: more tokens in every layer
    wanted = []
    for name in read_vision(model).layers:
        output = model.get_submodule(name)(h, **({"attention_mask": None} if family in ("clip", "siglip") else {}))
        h = output[0] if isinstance(output, tuple) else output
        wanted.append(h[:, :-3])
    _, seen = layers(model, adapter)
    assert [layer.shape for layer in seen] == [layer.shape for layer in out]
    for layer, expected in zip(seen, wanted, strict=True):
        torch.testing.assert_close(layer, expected, rtol=0, atol=1e-12)
    assert not torch.isclose(seen[0], out[0]).all(-1).any()  # control


def test_hidden_states_that_transformers_collects_of_layers_have_no_slots_in_them() -> None:
    model = made("clip")
    model(pixel_values=pixels(), output_hidden_states=True)  # it hooks its layers now, before we do
    attach_vision(model, adapter_for("prompt", model))
    states = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(3, 8, 16), (3, 5, 16), (3, 5, 16)]  # the first is what the first layer was given


def test_all_methods_at_once() -> None:
    model = made("vit")
    adapter = Adapter(METHODS, read_vision(model)).double()
    excite(adapter)
    attach_vision(model, adapter)
    features(model).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def refuse(model: nn.Module, methods: dict[str, Any]) -> VisionAttachment:
    return attach_vision(model, Adapter(methods, read_vision(model)))


def test_what_an_encoder_cannot_have_is_refused() -> None:
    model = made("vit")
    before = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ConfigError, match=r"the edit adalink\.text is for text, answer tokens, and a vision encoder has image tokens: name the image modality"):
        refuse(model, {"adalink": AdaLink(rank=4, modalities=("text", "image"))})

    class Masked:
        def slots(self, anatomy: object) -> tuple[()]:
            return ()

        def place(self, anatomy: object) -> list[Placement]:
            return [Placement("hidden", Port("layers.0", "mask"), nn.Identity(), (2,))]

    with pytest.raises(ConfigError, match=r"the edit masked\.hidden changes the mask of a language model, which a vision encoder does not have"):
        refuse(model, {"masked": Masked()})
    with pytest.raises(AttachError, match=r"no linear of this model is named qq_proj; .*q_proj"):
        refuse(model, {"lora": LoRA(groups={"image": ("image",)}, rank=2, alpha=4, targets=("qq_proj",))})
    assert [len(m._forward_hooks) for m in model.modules()] == before


def test_models_that_are_no_plain_vision_transformer_are_refused() -> None:
    swin = SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2))
    with pytest.raises(AttachError, match=r"SwinModel has layers of the widths \[8, 16\], expected one width throughout: choose a plain vision transformer"):
        read_vision(swin)
    for words in (tiny("llama"), existing("llava")):
        with pytest.raises(AttachError, match="reads words: attach to it with `get_adalink_model`, or give its vision tower alone"):
            read_vision(words)
    with pytest.raises(AttachError, match="Conv2d has no list of transformer layers: expected a vision transformer"):
        read_vision(nn.Conv2d(3, 4, 1))
    with pytest.raises(AttachError, match="TransformerEncoder has no convolution that makes patches of its layers' width 8"):
        read_vision(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2))


def test_the_vision_tower_of_an_existing_model_is_one_of_these() -> None:
    model = existing("llava")
    tower = model.model.vision_tower
    adapter = Adapter({"adalink": LINK}, read_vision(tower)).double()
    attach_vision(tower, adapter)
    assert read_vision(tower).embedding.endswith("patch_embedding")


def test_slots_where_layers_are_told_of_positions_are_refused() -> None:
    model = timm.models.eva.Eva(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, use_rot_pos_emb=True).eval()
    adapter = Adapter({"prompt": METHODS["prompt"]}, read_vision(model))
    attachment = attach_vision(model, adapter)
    with pytest.raises(AttachError, match="EvaBlock is given masks or positions for its tokens, and slots have none: use an edit without slots"):
        model(pixels().float())
    attachment.detach()
    attach_vision(model, Adapter({"adalink": LINK}, read_vision(model)))
    assert model(pixels().float()).shape == (3, 16)
