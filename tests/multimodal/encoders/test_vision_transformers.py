"""Encoders of transformers: equal to what the library itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from saved_encoders import PICTURE, SMALL, save_clip, save_siglip, save_transformers
from transformers import (
    BeitConfig,
    CLIPImageProcessor,
    CLIPVisionModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Siglip2VisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from adalink.errors import ConfigError, DataError
from multimodal.encoders.base import Grid
from multimodal.encoders.tower import load_tower

DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def outputs(model: Any, pixels: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels, output_hidden_states=True)


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    "config, n_prefix",
    [
        (ViTConfig(**SMALL, **PICTURE), 1),
        (DeiTConfig(**SMALL, **PICTURE), 2),
        (Dinov2Config(**DINO), 1),
        (Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 5),
        (BeitConfig(**SMALL, **PICTURE, use_mean_pooling=False), 1),
    ],
    ids=["vit", "deit", "dinov2", "registers", "beit"],
)
def test_patches_are_the_last_hidden_state_and_taps_are_normed_cls_tokens(tmp_path: Path, config: Any, n_prefix: int) -> None:
    model = save_transformers(tmp_path, config).double()
    x = pixels()
    found, expected = load_tower(tmp_path, dtype=torch.float64)(x), outputs(model, x)
    torch.testing.assert_close(found.patches, expected.last_hidden_state[:, n_prefix:])
    taps = torch.stack([model.layernorm(state)[:, 0] for state in expected.hidden_states[1:]])
    torch.testing.assert_close(found.pooled, taps)
    torch.testing.assert_close(found.pooled[-1], expected.last_hidden_state[:, 0])


def test_the_penultimate_layer_of_clip_is_its_hidden_state_without_a_norm(tmp_path: Path) -> None:
    whole = save_clip(tmp_path).double()
    x = pixels()
    expected = outputs(whole.vision_model, x)
    found = load_tower(tmp_path, layer=-2, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, expected.hidden_states[-2][:, 1:])


def test_the_last_layer_of_clip_is_normed_as_its_pooled_output_is(tmp_path: Path) -> None:
    """transformers norms the CLS token only and hands out the patches raw; the tower norms both."""
    whole = save_clip(tmp_path).double()
    x = pixels()
    vision = whole.vision_model
    expected, found = outputs(vision, x), load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, vision.post_layernorm(expected.hidden_states[-1])[:, 1:])
    torch.testing.assert_close(found.pooled[-1], expected.pooler_output)


def test_the_vision_half_alone_loads_like_the_whole_checkpoint(tmp_path: Path) -> None:
    save_clip(tmp_path / "whole")
    half = CLIPVisionModel.from_pretrained(tmp_path / "whole")
    half.save_pretrained(tmp_path / "half")
    CLIPImageProcessor.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "half")
    x = pixels()
    assert torch.equal(load_tower(tmp_path / "whole")(x).pooled, load_tower(tmp_path / "half")(x).pooled)


def test_an_encoder_without_a_cls_token_is_pooled_by_the_mean_of_its_normed_patches(tmp_path: Path) -> None:
    vision = save_siglip(tmp_path).double().vision_model
    x = pixels()
    expected, found = outputs(vision, x), load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, expected.last_hidden_state)
    means = torch.stack([vision.post_layernorm(state).mean(1) for state in expected.hidden_states[1:]])
    torch.testing.assert_close(found.pooled, means)


def test_an_encoder_that_averages_before_its_norm_is_pooled_so(tmp_path: Path) -> None:
    model = save_transformers(tmp_path, BeitConfig(**SMALL, **PICTURE, use_mean_pooling=True)).double()
    x = pixels()
    expected, found = outputs(model, x), load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(found.pooled[-1], expected.pooler_output)
    torch.testing.assert_close(found.pooled[0], model.pooler.layernorm(expected.hidden_states[1][:, 1:].mean(1)))


def test_stages_of_one_width_are_all_pooled(tmp_path: Path) -> None:
    model = save_transformers(tmp_path, ConvNextConfig(num_stages=3, hidden_sizes=[8, 8, 8], depths=[1, 1, 1])).double()
    x = pixels()
    expected, found = outputs(model, x), load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, expected.last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.pooled, torch.stack([model.layernorm(state.mean((2, 3))) for state in expected.hidden_states[1:]]))


def test_stages_of_growing_width_give_their_last_only(tmp_path: Path) -> None:
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4)
    model = save_transformers(tmp_path, config).double()
    x = pixels()
    expected, found = outputs(model, x), load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, expected.last_hidden_state)
    torch.testing.assert_close(found.pooled, expected.last_hidden_state.mean(1)[None])
    earlier = load_tower(tmp_path, layer=-2, dtype=torch.float64)(x)
    torch.testing.assert_close(earlier.patches, expected.hidden_states[-2])


def test_the_preprocessing_is_that_of_the_saved_processor(tmp_path: Path) -> None:
    save_clip(tmp_path)
    image = Image.linear_gradient("L").convert("RGB").resize((50, 40))
    expected = CLIPImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load_tower(tmp_path).preprocess(image), expected)


def test_a_model_that_reads_text_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of model type 'gpt2' with the input input_ids, expected one that takes pixel_values; give a local"):
        load_tower(tmp_path)


def test_an_encoder_that_needs_more_than_pixels_is_refused(tmp_path: Path) -> None:
    config = Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=8)
    save_transformers(tmp_path, config)
    with pytest.raises(ConfigError, match=r"missing 2 required positional arguments.* choose an encoder that turns a batch of images alone"):
        load_tower(tmp_path)


def test_an_encoder_that_drops_patches_at_random_is_refused(tmp_path: Path) -> None:
    save_transformers(tmp_path, ViTMAEConfig(**SMALL, **PICTURE, mask_ratio=0.5))
    with pytest.raises(ConfigError, match="gives different features each time for the same image"):
        load_tower(tmp_path)


def test_a_missing_preprocessing_is_named(tmp_path: Path) -> None:
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"image preprocessing of '.*': .*put the encoder's preprocessor_config.json beside"):
        load_tower(tmp_path)


def test_preprocessing_that_keeps_the_shape_of_pictures_is_refused(tmp_path: Path) -> None:
    save_transformers(tmp_path, ViTConfig(**SMALL, **PICTURE))
    CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gives images of different sizes \(\[3, 32, 51\] and \[3, 53, 32\]\), expected one size"):
        load_tower(tmp_path)


def test_missing_weights_are_counted_and_named(tmp_path: Path) -> None:
    save_transformers(tmp_path, ViTConfig(**SMALL, **PICTURE))
    deeper = ViTConfig(**{**SMALL, "num_hidden_layers": 4}, **PICTURE)
    deeper.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"are incomplete: 16 tensors are missing, among them .*layers?\.3\.attention.*; fetch the files again"):
        load_tower(tmp_path)


def test_truncated_weights_are_a_damaged_file(tmp_path: Path) -> None:
    save_transformers(tmp_path, ViTConfig(**SMALL, **PICTURE))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"weights of the vision encoder '.*' cannot be read: .*; fetch the files again"):
        load_tower(tmp_path)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    save_transformers(tmp_path, ViTConfig(**SMALL, **PICTURE))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the vision encoder '.*': .*no file named model.safetensors.*; see that the folder holds"):
        load_tower(tmp_path)


def test_tokens_that_are_no_patches_are_refused() -> None:
    with Grid(torch.nn.Conv2d(3, 4, 8)) as grid:
        pass
    with pytest.raises(ConfigError, match="cannot distinguish patches from other tokens: 117 tokens over a first convolution of 0 x 0 places"):
        grid.stage(torch.zeros(1, 117, 4))
    convolution = torch.nn.Conv2d(3, 4, 8, stride=8)
    with Grid(convolution) as grid:
        convolution(torch.zeros(1, 3, 32, 32))
    assert grid.stage(torch.zeros(1, 17, 4)).patches.shape == (1, 16, 4)
    assert grid.stage(torch.zeros(1, 4, 4)).cls is None
    with pytest.raises(ConfigError, match="117 tokens over a first convolution of 4 x 4 places"):
        grid.stage(torch.zeros(1, 117, 4))
