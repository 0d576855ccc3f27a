"""Encoders of transformers: vision models, and the vision half of image-text checkpoints (CLIP, SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from adalink.errors import ConfigError, DataError
from multimodal.encoders.base import Grid, Loaded, Preprocess, Stage
from multimodal.encoders.clips import FAMILIES, load_clips
from multimodal.loading import loading, quiet, split_revision

__all__ = ["TransformersEncoder", "load_transformers"]

def load_transformers(spec: str | Path, dtype: torch.dtype | None, frames: int | None = None) -> Loaded:
    """The encoder of a local folder or of a hub id, `org/name` or `org/name@revision`. frames: of a video encoder's clips; None: as its config says.

    Raises ConfigError for a name that leads to no encoder of images or clips, DataError for damaged or missing weights.
    """
    name, revision = (str(spec), None) if Path(spec).is_dir() else split_revision(str(spec))
    advice = "give a local folder, a hub id such as 'google/vit-base-patch16-224', 'timm:NAME' or 'open_clip:MODEL/TAG'"
    with loading("vision encoder", spec, advice):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(
            f"cannot load the vision encoder '{spec}': transformers has no encoder for model type '{config.model_type}'; {advice}"
        )
    with loading("vision encoder", spec, "see that the folder holds model.safetensors"), quiet():
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            name, config=config, revision=revision, dtype=dtype or "auto", output_loading_info=True
        )
    if config.model_type in FAMILIES:
        _refuse_missing(spec, info["missing_keys"])
        return load_clips(spec, name, revision, model, frames)
    if model.main_input_name != "pixel_values":
        raise ConfigError(
            f"'{spec}' is of model type '{config.model_type}' with the input {model.main_input_name}, expected one that takes pixel_values; {advice}, "
            f"or an encoder of clips ({', '.join(FAMILIES)})"
        )
    _refuse_missing(spec, info["missing_keys"])
    with loading("image preprocessing of", spec, "put the encoder's preprocessor_config.json beside its config.json"), quiet():
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    return Loaded(encoder=TransformersEncoder(model), preprocess=Preprocess(transform=_Processor(processor=processor)))


def _refuse_missing(spec: str | Path, missing: set[str]) -> None:
    """A pooler may be absent (classifiers have none, and no feature passes it); anything else would be random weights."""
    missing = {key for key in missing if "pooler" not in key}
    if missing:
        raise DataError(
            f"the weights of the vision encoder '{spec}' are incomplete: {len(missing)} tensors are missing, "
            f"among them {', '.join(sorted(missing)[:3])}; fetch the files again"
        )


@dataclass(frozen=True, kw_only=True)
class _Processor:
    processor: Any  # an image processor of transformers; the library is untyped here

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels[0]


class TransformersEncoder(nn.Module):
    """A vision model whose outputs are read as they come: token rows [B, P + N, D] or maps [B, C, h, w]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def whole(self, pixels: Tensor) -> object:
        return self.model(pixel_values=pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        """The hidden states after the first, which is what enters the first block."""
        with Grid(self.model) as grid:
            hidden = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return tuple(grid.stage(state) for state in hidden[1:])

    def last(self, pixels: Tensor) -> Stage:
        with Grid(self.model) as grid:
            state = self.model(pixel_values=pixels).last_hidden_state
        return grid.stage(state)
