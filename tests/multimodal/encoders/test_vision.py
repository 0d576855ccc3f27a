"""What every tower promises, whatever library its encoder comes from."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from saved_encoders import PICTURE, SMALL, save_clip, save_open_clip, save_timm, save_timm_vit, save_transformers
from shared import shared
from torch import nn
from transformers import ConvNextConfig, ResNetConfig, SwinConfig, ViTConfig

from multimodal.encoders.tower import VisionTower, load_tower

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
SAVED: dict[str, Callable[[Path], object]] = {
    "transformers vit": lambda folder: save_transformers(folder, ViTConfig(**SMALL, **PICTURE)),
    "transformers clip": save_clip,
    "transformers resnet": lambda folder: save_transformers(folder, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "transformers convnext": lambda folder: save_transformers(folder, ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])),
    "transformers swin": lambda folder: save_transformers(
        folder, SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4)
    ),
    "timm vit": save_timm_vit,
    "timm resnet": lambda folder: save_timm(folder, "resnet10t"),
    "open_clip vit": lambda folder: save_open_clip(folder, VISION),
}
# name: patches, width, layers that can be pooled
SHAPES = {
    "transformers vit": (16, 32, 3), "transformers clip": (16, 32, 3), "transformers resnet": (16, 16, 1), "transformers convnext": (16, 16, 1),
    "transformers swin": (16, 32, 1), "timm vit": (16, 32, 3), "timm resnet": (36, 512, 1), "open_clip vit": (16, 32, 3),
}  # fmt: skip


@pytest.fixture(params=SAVED, scope="module")
def named_tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, VisionTower]:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    SAVED[request.param](folder)
    return request.param, load_tower(folder, dtype=torch.float64)


@pytest.fixture
def tower(named_tower: tuple[str, VisionTower]) -> VisionTower:
    return named_tower[1]


def pixels_for(tower: VisionTower, count: int) -> torch.Tensor:
    return torch.randn(count, *tower.preprocess(photo()).shape, dtype=torch.float64)


def photo() -> Image.Image:
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(angle) for angle in (0, 90, 180)]).resize((90, 70))


def test_the_shapes_are_those_of_the_features(named_tower: tuple[str, VisionTower]) -> None:
    name, tower = named_tower
    assert (tower.n_patches, tower.width, tower.n_layers) == SHAPES[name]
    features = tower(pixels_for(tower, 2))
    assert features.patches.shape == (2, tower.n_patches, tower.width)
    assert features.pooled.shape == (tower.n_layers, 2, tower.width)


def test_features_do_not_depend_on_what_else_is_in_the_batch(tower: VisionTower) -> None:
    pixels = pixels_for(tower, 5)
    together, alone = tower(pixels), [tower(row[None]) for row in pixels]
    torch.testing.assert_close(together.patches, torch.cat([one.patches for one in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.pooled, torch.cat([one.pooled for one in alone], dim=1), rtol=0, atol=1e-12)


def test_features_differ_between_pictures_and_places(tower: VisionTower) -> None:
    """The control of the test above: constant features would pass it."""
    features = tower(pixels_for(tower, 2))
    assert (features.patches[0] - features.patches[1]).abs().max() > 1e-3
    assert (features.patches[0, 0] - features.patches[0, 1]).abs().max() > 1e-3
    assert (features.pooled[:, 0] - features.pooled[:, 1]).abs().amax(-1).min() > 1e-3


def test_a_tower_stays_frozen_when_the_model_around_it_trains(tower: VisionTower) -> None:
    around = nn.ModuleList([tower]).train()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    features = tower(pixels_for(tower, 2).requires_grad_())
    assert not features.patches.requires_grad
    assert not features.pooled.requires_grad
    assert not any(parameter.requires_grad for parameter in around.parameters())
    assert not any(module.training for module in tower.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_the_preprocessing_travels_without_the_weights(tower: VisionTower) -> None:
    packed = pickle.dumps(tower.preprocess)
    assert len(packed) < 4000
    again = pickle.loads(packed)
    for mode in ("RGB", "L", "RGBA", "P"):
        image = photo().convert(mode)
        assert torch.equal(again(image), tower.preprocess(image))
        assert again(image).dtype == torch.float32


def test_the_weights_are_held_once(tower: VisionTower) -> None:
    assert all(name.startswith("encoder.model.") for name in tower.state_dict())


def test_an_earlier_layer_gives_other_patches_and_the_same_grid(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    last, earlier = load_tower(tmp_path), load_tower(tmp_path, layer=-3)
    assert (earlier.layer, earlier.n_patches) == (-3, 16)
    assert torch.equal(last(pixels).pooled, earlier(pixels).pooled)
    assert (last(pixels).patches - earlier(pixels).patches).abs().max() > 0.1


def test_the_dtype_asked_for_is_that_of_the_features(tmp_path: Path) -> None:
    save_timm_vit(tmp_path)
    assert load_tower(tmp_path)(torch.randn(1, 3, 32, 32)).patches.dtype == torch.float32
    assert load_tower(tmp_path, dtype=torch.bfloat16)(torch.randn(1, 3, 32, 32)).patches.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_final_norm_is_found_in_half_precision(tmp_path: Path, pool: str, dtype: torch.dtype) -> None:
    """Means in another order round differently, and more so in sixteen bits."""
    save_timm_vit(tmp_path, global_pool=pool)
    pixels = torch.randn(2, 3, 32, 32)
    found, expected = load_tower(tmp_path, dtype=dtype)(pixels), load_tower(tmp_path)(pixels)
    torch.testing.assert_close(found.pooled.float(), expected.pooled, rtol=0.1, atol=0.1)
    torch.testing.assert_close(found.patches.float(), expected.patches, rtol=0.1, atol=0.1)


def test_a_real_mobilenet_gives_its_map_of_features() -> None:
    tower = load_tower(shared("parts/mobilenet_v2_1.0_224_hf"))
    assert (tower.n_patches, tower.width, tower.n_layers) == (49, 1280, 1)
    pixels = tower.preprocess(photo())[None]
    assert pixels.shape == (1, 3, 224, 224)
    features = tower(pixels)
    model = tower.encoder.model
    expected = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(features.patches[0, 7 * 2 + 3], expected[0, :, 2, 3])
    torch.testing.assert_close(features.pooled[0], expected.mean((2, 3)))
