"""Encoders of open_clip: the image half of a contrastive model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.encoders.base import Loaded, Preprocess, Stage, from_map
from multimodal.encoders.timm import TimmEncoder
from multimodal.loading import loading, nearest, quiet

__all__ = ["OpenClipEncoder", "load_open_clip", "refuse_unknown"]

_ADVICE = "see that its weights are there (open_clip_model.safetensors in a folder; the hub reachable for a name)"


def load_open_clip(spec: str | Path) -> Loaded:
    """The encoder of a local folder, of `MODEL/TAG` such as `ViT-B-32/laion2b_s34b_b79k`, or of `hf-hub:org/name`."""
    name, tag = str(spec), None
    if Path(spec).is_dir():
        name = f"local-dir:{spec}"
    elif not name.startswith("hf-hub:"):
        name, _, tag = name.partition("/")
        refuse_unknown(name, tag)
    with loading("open_clip encoder", spec, _ADVICE), quiet():
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag, require_pretrained=True)
        trunk = getattr(model.visual, "trunk", None)
        encoder = OpenClipEncoder(model.visual) if trunk is None else TimmEncoder(trunk)
    return Loaded(encoder=encoder, preprocess=Preprocess(transform=transform))


def refuse_unknown(name: str, tag: str) -> None:
    """Raises ConfigError, with the nearest names, for a model or weights that open_clip does not know."""
    models = open_clip.list_models()
    if name not in models:
        raise ConfigError(f"open_clip has no model '{name}'; the nearest names are {nearest(name, models)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        has = f"write 'open_clip:{name}/TAG' with one of {nearest(tag, tags)}" if tags else "choose another of open_clip.list_pretrained()"
        raise ConfigError(f"open_clip has no weights '{tag}' for '{name}'; {has}")


class OpenClipEncoder(nn.Module):
    """open_clip's own vision transformer or modified ResNet, read through its `forward_intermediates`."""

    def __init__(self, model: Any) -> None:  # open_clip is untyped here
        super().__init__()
        self.model = model
        self._is_transformer = isinstance(model, open_clip.transformer.VisionTransformer)

    def whole(self, pixels: Tensor) -> object:
        return self.model(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        return self._stages(pixels, None)

    def last(self, pixels: Tensor) -> Stage:
        return self._stages(pixels, 1)[-1]

    def _stages(self, pixels: Tensor, n_last: int | None) -> tuple[Stage, ...]:
        taps: Any = self.model.forward_intermediates
        if not self._is_transformer:
            return tuple(from_map(feature_map) for feature_map in taps(pixels, indices=n_last, intermediates_only=True)["image_intermediates"])
        found = taps(pixels, indices=n_last, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
        pairs = zip(found["image_intermediates"], found["image_intermediates_prefix"], strict=True)
        return tuple(Stage(patches=patches, cls=prefix[:, 0]) for patches, prefix in pairs)
