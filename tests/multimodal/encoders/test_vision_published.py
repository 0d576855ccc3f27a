"""The features that the published methods read off their encoders, equal to what the authors' code computed (float64)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import fixtures
from torch import Tensor
from transformers import CLIPImageProcessor

from multimodal.encoders.base import Features
from multimodal.encoders.tower import load_tower


def files(kind: str) -> list[Path]:
    return sorted(fixtures(kind).glob("*.json"))


def named(path: Path) -> str:
    return path.stem


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("path", files("epalm"), ids=named)
def test_epalm_reads_these_cls_tokens(path: Path, tmp_path: Path) -> None:
    sizes, tensors = json.loads(path.read_text())["vit"], load_file(path.with_suffix(".safetensors"))
    arguments = {name: sizes[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    image = {"input_size": [3, sizes["img_size"], sizes["img_size"]]}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": image}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(part(tensors, "vit."), tmp_path / "model.safetensors")
    found = load_tower(tmp_path, dtype=torch.float64)(tensors["in.images"])
    torch.testing.assert_close(found.pooled, tensors["mid.vit_cls_normed"], rtol=0, atol=1e-12)


def clip_features(path: Path, folder: Path, **options: Any) -> Features:
    sizes, tensors = json.loads(path.read_text())["config"]["vision_config"], load_file(path.with_suffix(".safetensors"))
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(part(tensors, "w.vision_model."), folder / "model.safetensors")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return load_tower(folder, dtype=torch.float64, **options)(tensors["in.pixel_values"])


@pytest.mark.parametrize("path", files("context_peft"), ids=named)
def test_context_peft_reads_these_patches(path: Path, tmp_path: Path) -> None:
    expected = load_file(path.with_suffix(".safetensors"))["tap.vision_features"]
    torch.testing.assert_close(clip_features(path, tmp_path, layer=-2).patches, expected, rtol=0, atol=1e-12)
    assert (clip_features(path, tmp_path).patches - expected).abs().max() > 0.1  # the control: the last layer is another
