"""Encoders of timm."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.encoders.stage import Loaded, Preprocess, Stage, from_map
from multimodal.frozen import loading

__all__ = ["TimmEncoder", "load_timm"]


def load_timm(spec: str | Path) -> Loaded:
    """The encoder of a local folder, of a timm name such as `vit_base_patch16_224.augreg_in21k`, or of a hub id `timm/name`."""
    name = str(spec)
    if Path(spec).is_dir():
        source = f"local-dir:{spec}"
    elif "/" in name:
        source = name if ":" in name else f"hf-hub:{name}"
    else:
        _refuse_unknown(name)
        source = name
    with loading("timm encoder", spec, "see that its weights are there (model.safetensors in a folder; the hub reachable for a name)"):
        model = timm.create_model(source, pretrained=True, num_classes=0)
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return Loaded(encoder=TimmEncoder(model.eval()), preprocess=Preprocess(transform=transform))


def _refuse_unknown(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3) or ["vit_base_patch16_224"]
        raise ConfigError(f"timm has no model '{architecture}'; the nearest names are {', '.join(near)}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    if not tags:
        raise ConfigError(f"timm has no pretrained weights for '{architecture}'; choose a name of timm.list_models(pretrained=True)")
    if tag and tag not in tags:
        raise ConfigError(f"timm has no weights '{tag}' for '{architecture}'; it has {', '.join(tags)}")


class TimmEncoder(nn.Module):
    """A timm model, read through its own `forward_intermediates` and `forward_features`."""

    def __init__(self, model: Any) -> None:  # timm is untyped here
        super().__init__()
        self.model = model
        self._taps: Any = getattr(model, "forward_intermediates", None)
        # Models with tokens before the patches can give both apart; the others give maps only.
        self._gives_prefix = self._taps is not None and "return_prefix_tokens" in inspect.signature(self._taps).parameters
        self._n_prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._has_cls = self._n_prefix > 0 and getattr(model, "cls_token", None) is not None
        self._is_channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")

    def whole(self, pixels: Tensor) -> object:
        return self.model(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        if self._taps is None:
            return (self.last(pixels),)
        if not self._gives_prefix:
            return tuple(from_map(feature_map) for feature_map in self._taps(pixels, intermediates_only=True))
        pairs = self._taps(pixels, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC")
        return tuple(self._pair(pair) for pair in pairs)

    def _pair(self, pair: Tensor | tuple[Tensor, Tensor]) -> Stage:
        if isinstance(pair, Tensor):
            return Stage(patches=pair)
        patches, prefix = pair
        return Stage(patches=patches, cls=prefix[:, 0] if self._has_cls else None)

    def last(self, pixels: Tensor) -> Stage:
        final: Tensor = self.model.forward_features(pixels)
        if final.dim() == 4:
            return from_map(final.permute(0, 3, 1, 2) if self._is_channels_last else final)
        return Stage(patches=final[:, self._n_prefix :], cls=final[:, 0] if self._has_cls else None)
