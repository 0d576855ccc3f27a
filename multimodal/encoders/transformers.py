"""Encoders of transformers: vision models, and the vision half of image-text checkpoints (CLIP, SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from adalink.errors import ConfigError, DataError
from multimodal.encoders.stage import Loaded, Preprocess, Stage, from_map
from multimodal.frozen import loading, quiet_transformers, split_revision

__all__ = ["TransformersEncoder", "load_transformers"]

# No encoder puts more than this many tokens (CLS, distillation, registers) before its patches.
_MOST_PREFIX_TOKENS = 16


def load_transformers(spec: str | Path, dtype: torch.dtype | None) -> Loaded:
    """The encoder of a local folder or of a hub id, `org/name` or `org/name@revision`."""
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
    with loading("vision encoder", spec, "see that the folder holds model.safetensors"), quiet_transformers():
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            name, config=config, revision=revision, dtype=dtype or "auto", output_loading_info=True
        )
    if model.main_input_name != "pixel_values":
        raise ConfigError(
            f"'{spec}' is a {config.model_type} model whose input is {model.main_input_name}, expected one that takes pixel_values; {advice}"
        )
    _refuse_missing(spec, info["missing_keys"])
    with loading("image preprocessing of", spec, "put the encoder's preprocessor_config.json beside its config.json"), quiet_transformers():
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
        with _Grid(self.model) as grid:
            hidden = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return tuple(grid.stage(state) for state in hidden[1:])

    def last(self, pixels: Tensor) -> Stage:
        with _Grid(self.model) as grid:
            state = self.model(pixel_values=pixels).last_hidden_state
        return grid.stage(state)


class _Grid:
    """Tells patches from the tokens before them, by the size of the first convolution's output.

    A vision transformer cuts patches with a convolution of h x w places, so P + N tokens hold N = h * w patches; a stack of
    convolutions or merging stages halves the sides k times, so N = ceil(h / 2^k) * ceil(w / 2^k) for the least k that fits.
    Examples: 197 tokens over 14 x 14 are 1 + 196; 49 over 56 x 56 are 0 + 49 (Swin); 201 over 14 x 14 are 5 + 196 (four registers).
    """

    def __init__(self, model: nn.Module) -> None:
        self._convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        self._side = (0, 0)

    def __enter__(self) -> _Grid:
        if self._convolution is not None:
            self._handle = self._convolution.register_forward_hook(self._measure)
        return self

    def __exit__(self, *_: object) -> None:
        if self._convolution is not None:
            self._handle.remove()

    def _measure(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self._side = (output.shape[-2], output.shape[-1])

    def stage(self, state: Tensor) -> Stage:
        if state.dim() == 4:
            return from_map(state)
        n_tokens, (high, wide) = state.shape[1], self._side
        sizes = (ceil(high / 2**k) * ceil(wide / 2**k) for k in range(8))
        n_patches = next((size for size in sizes if size <= n_tokens), 0)
        n_prefix = n_tokens - n_patches
        if n_patches == 0 or n_prefix > _MOST_PREFIX_TOKENS:
            raise ConfigError(
                f"cannot tell patches from other tokens: {n_tokens} tokens over a first convolution of {high} x {wide} places; "
                f"use an encoder that cuts patches with a convolution"
            )
        return Stage(patches=state[:, n_prefix:], cls=state[:, 0] if n_prefix else None)
