"""Encoders of timm: equal to what the library itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_encoders import excite, save_timm, save_timm_vit
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from adalink.errors import ConfigError, DataError
from multimodal.encoders.timm import TimmEncoder
from multimodal.encoders.tower import load_tower


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def test_patches_are_those_of_forward_features(tmp_path: Path) -> None:
    model = save_timm_vit(tmp_path).double()
    x = pixels()
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, model.forward_features(x)[:, 1:])


def test_taps_are_the_final_norm_of_every_block_at_its_cls_token(tmp_path: Path) -> None:
    """eP-ALM, with the block outputs collected by hooks as its authors do."""
    model = save_timm_vit(tmp_path).double()
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = pixels()
    model(x)
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    assert len(seen) == 3
    torch.testing.assert_close(found.pooled, torch.stack([model.norm(output)[:, 0] for output in seen]))
    torch.testing.assert_close(load_tower(tmp_path, layer=-2, dtype=torch.float64)(x).patches, seen[-2][:, 1:])


def test_registers_are_dropped_and_no_register_is_taken_for_a_cls_token(tmp_path: Path) -> None:
    model = save_timm_vit(tmp_path, class_token=False, reg_tokens=4, global_pool="avg", fc_norm=False).double()
    x = pixels()
    found, final = load_tower(tmp_path, dtype=torch.float64)(x), model.forward_features(x)
    torch.testing.assert_close(found.patches, final[:, 4:])
    torch.testing.assert_close(found.pooled[-1], final[:, 4:].mean(1))


def test_an_encoder_that_averages_before_its_norm_is_pooled_so(tmp_path: Path) -> None:
    model = save_timm_vit(tmp_path, global_pool="avg").double()
    assert isinstance(model.norm, nn.Identity)
    x = pixels()
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, model.forward_features(x)[:, 1:])
    torch.testing.assert_close(found.pooled[-1], model(x))


@pytest.mark.parametrize("architecture", ["resnet10t", "mobilenetv2_035", "convnext_atto"])
def test_the_map_of_a_cnn_becomes_patches(tmp_path: Path, architecture: str) -> None:
    model = save_timm(tmp_path, architecture).double()
    x = pixels(64)
    found, expected = load_tower(tmp_path, dtype=torch.float64)(x), model.forward_features(x)
    torch.testing.assert_close(found.patches, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.pooled, expected.mean((2, 3))[None])


def test_a_map_with_its_channels_last_is_read_so(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4).double()
    x = pixels(64)
    found, expected = load_tower(tmp_path, dtype=torch.float64)(x), model.forward_features(x)
    assert expected.shape == (2, 8, 8, 16)
    torch.testing.assert_close(found.patches, expected.flatten(1, 2))


def test_a_cls_token_that_a_model_does_not_declare_is_found() -> None:
    model: Any = excite(timm.create_model("coat_lite_tiny", num_classes=0, img_size=64, serial_depths=(1, 1, 1, 1)))
    x = torch.randn(2, 3, 64, 64)
    found, expected = TimmEncoder(model).last(x), model.forward_features(x)
    assert expected.shape == (2, 5, 320)
    assert torch.equal(found.patches, expected[:, 1:])
    assert found.cls is not None
    assert torch.equal(found.cls, expected[:, 0])


def test_a_layer_below_the_first_is_refused(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    for layer in (-4, 0, 2):
        with pytest.raises(ConfigError, match=rf"layer={layer} is not in the encoder '.*', which has 3 blocks; choose -1 \(the last\) to -3 \(the first\)"):
            load_tower(tmp_path, layer=layer)


def test_norms_inside_blocks_that_change_nothing_are_not_taken_for_the_final_one(tmp_path: Path) -> None:
    """Layer scale of zero: every norm is fed the same tokens, and only the last of them is the final norm."""
    model = save_timm_vit(tmp_path, init_values=1e-5)
    weights = tmp_path / "model.safetensors"
    save_file({name: tensor * 0 if "gamma" in name else tensor for name, tensor in load_file(weights).items()}, weights)
    model.load_state_dict(load_file(weights))
    x = pixels()
    found, cls = load_tower(tmp_path, dtype=torch.float64)(x), model.double().forward_features(x)[:, 0]
    torch.testing.assert_close(found.pooled, torch.stack([cls, cls, cls]))


def test_the_preprocessing_is_timms_own(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    image = Image.linear_gradient("L").convert("RGB").resize((50, 40))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.equal(load_tower(tmp_path).preprocess(image), transform(image))


def test_an_encoder_that_gives_one_vector_is_refused(tmp_path: Path) -> None:
    save_timm(tmp_path, "pit_ti_224", img_size=64, base_dims=(8, 8, 8), heads=(1, 1, 1), depth=(1, 1, 1))
    with pytest.raises(ConfigError, match="the encoder gives one vector for the whole image, expected patches"):
        load_tower(tmp_path)


def test_truncated_weights_are_a_damaged_file(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"weights of the timm encoder '.*' cannot be read: .*; fetch the files again"):
        load_tower(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the timm encoder '.*': .*; see that its weights are there"):
        load_tower(tmp_path)


def test_weights_of_another_size_are_refused_in_one_line(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["embed_dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"cannot load the timm encoder") as caught:
        load_tower(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"timm has no model 'vit_bse_patch16_224'; the nearest names are vit_base_patch16_224, "):
        load_tower("timm:vit_bse_patch16_224")


def test_unknown_weights_are_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"timm has no weights 'augreg_in22k' for 'vit_base_patch16_224'; it has .*augreg_in21k.* \(10 in all\)"):
        load_tower("timm:vit_base_patch16_224.augreg_in22k")


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="timm has no pretrained weights for 'vit_small_patch16_18x2_224'"):
        load_tower("timm:vit_small_patch16_18x2_224")


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224.augreg_in21k", "timm:hf-hub:timm/no_such_model", "timm/no_such_model"])
def test_an_unreachable_hub_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the timm encoder '.*': .*; see that its weights are there") as caught:
        load_tower(name)
    assert "\n" not in str(caught.value)
