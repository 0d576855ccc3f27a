"""Tiny random encoders of real classes, saved as their libraries save them: what the tests of the vision tower load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PICTURE = {"image_size": 32, "patch_size": 8}


def excite(model: nn.Module) -> nn.Module:
    """Moves every weight away from its start, where norms are the identity and layer scales next to zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_transformers(folder: Path, config: Any, size: int = 32) -> Any:
    """A vision model of `config` with a CLIP image processor of `size` beside it; the model as saved."""
    return _save(folder, excite(AutoModel.from_config(config)), size)


def save_clip(folder: Path) -> Any:
    """A whole CLIP checkpoint, text half included."""
    text = {**SMALL, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    return _save(folder, excite(CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, **PICTURE}))), 32)


def save_siglip(folder: Path) -> Any:
    """A whole SigLIP checkpoint, text half included."""
    text = {**SMALL, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 32}
    return _save(folder, excite(SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, **PICTURE}))), 32)


def _save(folder: Path, model: Any, size: int) -> Any:
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return model


def save_timm(folder: Path, architecture: str, **arguments: Any) -> Any:
    """A timm model as `timm.models.save_for_hf` writes it."""
    model: Any = excite(timm.create_model(architecture, num_classes=0, **arguments))
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def save_timm_vit(folder: Path, **arguments: Any) -> Any:
    return save_timm(folder, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, **arguments)


def save_open_clip(folder: Path, vision: dict[str, Any]) -> Any:
    """An open_clip model as its hub files are laid out; the whole model as saved."""
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}}
    model = excite(open_clip.CLIP(**config))
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": statistics}))
    return model
