"""Models without their weights: shapes, fingerprints and memory equal to those of the loaded ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from saved_encoders import save_clip, save_open_clip, save_siglip, save_timm, save_timm_vit
from torch import nn

from adalink import AdaLink, Adapter, Bridge, LoRA, Prompt, fingerprint
from adalink.attachment.vision import read_vision
from adalink.errors import ConfigError, DataError
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from tasks.planning.meta import (
    cache_bytes,
    draw_adapter,
    draw_language,
    draw_tower,
    language_fingerprint,
    parameter_bytes,
    saved_bytes,
    seen_bytes,
    stored_fingerprint,
    tower_fingerprint,
)
from tasks.scenes.parts import encoder_folder, language_folder

OPEN_CLIP = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
ENCODERS: dict[str, Callable[[Path], Any]] = {
    "clip": save_clip,
    "siglip": save_siglip,
    "timm": save_timm_vit,
    "resnet": lambda folder: save_timm(folder, "resnet10t"),
    "open_clip": lambda folder: save_open_clip(folder, OPEN_CLIP),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved encoders and language models."""
    root = tmp_path_factory.mktemp("parts")
    for name, save in ENCODERS.items():
        save(root / name)
    for family in tiny.FAMILIES:
        tiny.tiny(family).float().save_pretrained(root / family)
    return root


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_drawn_tower_has_the_sizes_of_the_loaded_one(name: str, layer: int, folders: Path) -> None:
    drawn, loaded = draw_tower(folders / name, layer=layer), load_tower(folders / name, layer=layer)
    assert (drawn.n_patches, drawn.width, drawn.n_layers) == (loaded.n_patches, loaded.width, loaded.n_layers)
    assert ("image_taps" in drawn.inputs) == (loaded.n_retained > loaded.n_patches)
    assert parameter_bytes(drawn.module) == parameter_bytes(loaded)
    assert all(parameter.is_meta for parameter in drawn.module.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_the_fingerprint_of_an_encoder_is_read_without_loading_it(name: str, folders: Path) -> None:
    assert tower_fingerprint(folders / name) == fingerprint(load_tower(folders / name))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_fingerprint_of_a_language_model_is_read_without_loading_it(family: str, folders: Path) -> None:
    model = draw_language(folders / family).model
    assert stored_fingerprint(model, model, folders / family) == fingerprint(tiny.tiny(family).float())


def test_a_fingerprint_that_files_do_not_tell_is_empty_not_wrong(folders: Path, tmp_path: Path) -> None:
    assert tower_fingerprint("timm:vit_base_patch16_224.augreg_in21k") == language_fingerprint("facebook/opt-125m") == ""
    model = draw_language(folders / "llama").model
    assert stored_fingerprint(model, model, folders / "opt") == ""
    assert stored_fingerprint(model, model, tmp_path) == ""


def test_damaged_weights_are_told_while_their_fingerprint_is_read(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(DataError, match=r"the weights .*model.safetensors cannot be read: .*; fetch the file again"):
        language_fingerprint(tmp_path / "llama")


def test_a_drawn_adapter_has_the_tensors_of_the_real_one_and_leaves_the_model() -> None:
    methods = {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=3, modalities=("image", "text"))}
    real = VisionLanguageModel.compose(encoder_folder(), language_folder(), template=Template(prompt="<image>")).add_adapter("default", methods)
    language = draw_language(language_folder())
    drawn = draw_adapter(draw_tower(encoder_folder()), language, methods)
    assert {n: p.shape for n, p in drawn.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in language.model.modules())


def test_a_part_is_refused_in_the_words_of_the_real_one(folders: Path) -> None:
    for layer in (0, -9):
        with pytest.raises(ConfigError, match=rf"layer={layer} is not in the encoder .* which has 3 blocks; choose -1 \(the last\) to -3"):
            draw_tower(folders / "clip", layer=layer)
    for spec, expected in (
        ("timm:vit_foo", r"cannot load the vision encoder 'timm:vit_foo': Unknown model \(vit_foo\)"),
        ("open_clip:ViT-B-99/foo", "open_clip has no model 'ViT-B-99'"),
        ("./nowhere", "'./nowhere' should be a folder with a model's files, found nothing there"),
        ("org/no-such-encoder", "cannot load the vision encoder 'org/no-such-encoder': "),
        (str(folders / "llama"), r"with the input input_ids, expected one that takes pixel_values"),
    ):
        with pytest.raises(ConfigError, match=expected):
            draw_tower(spec)
    for spec, expected in ((str(folders / "timm"), "is of model type 'timm_wrapper', expected one that writes text"), (str(folders / "clip"), "is of model type 'clip', expected one that writes text")):
        with pytest.raises(ConfigError, match=expected):
            draw_language(spec)


def test_a_folder_without_a_config_or_a_picture_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json or open_clip_config.json; give the folder of a saved vision encoder"):
        draw_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "num_channels": 3}')
    with pytest.raises(ConfigError, match=r"neither a preprocessor_config.json nor `image_size` in config.json says how large the images"):
        draw_tower(tmp_path)


def measured_bytes(call: Callable[[], object], *modules: nn.Module) -> int:
    """What autograd keeps of a call on real tensors, beside the modules' weights."""
    retained: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        retained[tensor.untyped_storage()._cdata] = (tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return tensor

    own = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for address, (_, size) in retained.items() if address not in own)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_activations_counted_are_near_those_that_autograd_keeps(family: str) -> None:
    """On real tensors with eager attention, which keeps its matrices as the count assumes; the embedding's are the caller's."""
    rows, tokens = 3, 24
    real = tiny.tiny(family).float()
    real.set_attn_implementation("eager")
    embeds = torch.randn(rows, tokens, tiny.WIDTH, requires_grad=True)
    more = {"decoder_input_ids": torch.ones(rows, tokens, dtype=torch.int64)} if family == "t5" else {"logits_to_keep": 1}
    measured = measured_bytes(lambda: real(inputs_embeds=embeds, use_cache=False, **more), real)
    with torch.device("meta"):
        drawn = type(real)(real.config).float().eval().requires_grad_(False)
    counted = saved_bytes(drawn, rows=rows, tokens=tokens)
    assert 0.7 < counted / measured < 1.4
    assert saved_bytes(drawn, rows=2 * rows, tokens=tokens) > 1.8 * counted  # the control: it counts what a batch holds


IMAGE_LORA = {"groups": {"image": ("image",)}, "rank": 2, "alpha": 4}
IN_THE_ENCODER = {"lora": LoRA(**IMAGE_LORA), "late": LoRA(**IMAGE_LORA, exclude_layers=(0,)), "prompt": Prompt(length=2, init_std=0.5)}


@pytest.mark.parametrize("name", ["clip", "siglip", "timm", "open_clip"])
def test_the_activations_of_a_trained_encoder_are_counted_near_those_that_autograd_keeps(name: str, folders: Path) -> None:
    """Within a quarter. The control: nothing is kept below the lowest edit, and twice as many images keep twice as much."""
    drawn, counted = draw_tower(folders / name), {}
    for method, settings in IN_THE_ENCODER.items():
        real = load_tower(folders / name)
        real.adapt(Adapter({method: settings}, real.vision_anatomy()))
        pixels = torch.randn(3, 3, *drawn.pixels)
        measured = measured_bytes(partial(real, pixels), real)
        with torch.device("meta"):
            shapes = Adapter({method: settings}, read_vision(drawn.module.get_submodule("model")))
        counted[method] = seen_bytes(drawn, shapes, images=3)
        assert 0.8 < counted[method] / measured < 1.25
        assert seen_bytes(drawn, shapes, images=6) > 1.9 * counted[method]
    assert counted["late"] < 0.8 * counted["lora"]
    assert seen_bytes(drawn, shapes, images=3) == counted[method]  # nothing stays attached


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cache_counted_is_the_cache_of_a_real_call(family: str) -> None:
    real = tiny.tiny(family).float()
    with torch.device("meta"):
        drawn: nn.Module = type(real)(real.config).float().eval()
    ids = torch.ones(1, 9, dtype=torch.int64)
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    cache = real(input_ids=ids, use_cache=True, **more).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if family == "t5" else [cache]
    bytes_kept = sum(t.numel() * t.element_size() for part in parts for layer in part.layers for t in (layer.keys, layer.values))
    assert cache_bytes(drawn, tokens=9) == bytes_kept


def test_a_language_model_without_tokenizer_files_is_drawn_without_a_tokenizer(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders / "opt" / "config.json").read_bytes())
    assert draw_language(tmp_path).tokenizer is None
    assert draw_language(language_folder()).tokenizer is not None


