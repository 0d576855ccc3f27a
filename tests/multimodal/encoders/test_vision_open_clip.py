"""Encoders of open_clip: equal to what the library itself computes."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from saved_encoders import save_open_clip

from adalink.errors import ConfigError, DataError
from multimodal.encoders.tower import load_tower

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
TIMM = {"image_size": 64, "timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def test_patches_and_the_last_tap_are_those_of_its_own_forward(tmp_path: Path) -> None:
    visual = save_open_clip(tmp_path, VISION).visual.double()
    visual.output_tokens = True
    x = pixels()
    pooled, tokens = visual(x)
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, tokens)
    torch.testing.assert_close(found.pooled[-1] @ visual.proj, pooled)


def test_taps_are_the_final_norm_of_every_block_at_its_cls_token(tmp_path: Path) -> None:
    visual = save_open_clip(tmp_path, VISION).visual.double()
    seen: list[torch.Tensor] = []
    for block in visual.transformer.resblocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = pixels()
    visual(x)
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.pooled, torch.stack([visual.ln_post(output)[:, 0] for output in seen]))
    torch.testing.assert_close(load_tower(tmp_path, layer=-2, dtype=torch.float64)(x).patches, seen[-2][:, 1:])


def test_its_resnet_gives_the_map_before_the_attention_pool(tmp_path: Path) -> None:
    visual = save_open_clip(tmp_path, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}).visual.double()
    x = pixels(64)
    tower = load_tower(tmp_path, dtype=torch.float64)
    expected = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
    torch.testing.assert_close(tower(x).patches, expected.flatten(2).transpose(1, 2))
    assert (tower.n_patches, tower.width, tower.n_layers) == (4, 256, 1)


def test_a_trunk_of_timm_is_read_as_timm_is(tmp_path: Path) -> None:
    visual = save_open_clip(tmp_path, TIMM).visual.double()
    x = pixels(64)
    found = load_tower(tmp_path, dtype=torch.float64)(x)
    torch.testing.assert_close(found.patches, visual.trunk.forward_features(x).flatten(2).transpose(1, 2))


def test_the_text_half_is_let_go(tmp_path: Path) -> None:
    save_open_clip(tmp_path, VISION)
    assert not [name for name in load_tower(tmp_path).state_dict() if "text" in name or "token_embedding" in name]


def test_the_preprocessing_is_its_validation_transform(tmp_path: Path) -> None:
    save_open_clip(tmp_path, VISION)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    image = Image.linear_gradient("L").convert("RGB").resize((50, 40))
    assert torch.equal(load_tower(tmp_path).preprocess(image), transform(image))


def test_truncated_weights_are_a_damaged_file(tmp_path: Path) -> None:
    save_open_clip(tmp_path, VISION)
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"weights of the open_clip encoder '.*' cannot be read: .*; fetch the files again"):
        load_tower(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    save_open_clip(tmp_path, VISION)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the open_clip encoder '.*': .*; see that its weights are there"):
        load_tower(tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no model 'ViT-B-33'; the nearest names are ViT-B-32, "):
        load_tower("open_clip:ViT-B-33/openai")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32/laion2b"])
def test_unknown_weights_are_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no weights '.*' for 'ViT-B-32'; write 'open_clip:ViT-B-32/TAG' with one of .* \(22 in all\)"):
        load_tower(f"open_clip:{name}")


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no weights 'any' for 'ViT-S-32'; choose another of open_clip.list_pretrained\(\)"):
        load_tower("open_clip:ViT-S-32/any")


@pytest.mark.parametrize("name", ["ViT-B-32/openai", "hf-hub:no/such-model"])
def test_an_unreachable_hub_is_one_sentence(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the open_clip encoder '.*': .*; see that its weights are there") as caught:
        load_tower(f"open_clip:{name}")
    assert "\n" not in str(caught.value)
    assert not caplog.records  # open_clip logs the failure too
