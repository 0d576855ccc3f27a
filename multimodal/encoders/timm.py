"""Encoders of timm."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.encoders.base import Grid, Loaded, Preprocess, Stage, from_map
from multimodal.loading import loading, nearest, quiet

__all__ = ["TimmEncoder", "load_timm"]

_ADVICE = "see that its weights are there (model.safetensors in a folder; the hub reachable for a name)"


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
    with loading("timm encoder", spec, _ADVICE), quiet():
        model = timm.create_model(source, pretrained=True, num_classes=0)
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        encoder = TimmEncoder(model)
    return Loaded(encoder=encoder, preprocess=Preprocess(transform=transform))


def _refuse_unknown(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"timm has no model '{architecture}'; the nearest names are {nearest(architecture, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    if not tags:
        raise ConfigError(f"timm has no pretrained weights for '{architecture}'; choose a name of timm.list_models(pretrained=True)")
    if tag and tag not in tags:
        raise ConfigError(f"timm has no weights '{tag}' for '{architecture}'; it has {nearest(tag, tags)}")


class TimmEncoder(nn.Module):
    """A timm model, read through its own `forward_intermediates` and `forward_features`."""

    def __init__(self, model: Any) -> None:  # timm is untyped here
        super().__init__()
        self.model = model
        self._n_prefix: int | None = getattr(model, "num_prefix_tokens", None)  # CoaT has a CLS token and does not say so
        self._has_cls = getattr(model, "cls_token", None) is not None
        # Vision transformers give tokens, and apart from them what comes before the patches; the others give maps.
        options = inspect.signature(model.forward_intermediates).parameters
        self._options: dict[str, Any] = {"intermediates_only": True}
        if "return_prefix_tokens" in options:
            self._options |= {"output_fmt": "NLC", "return_prefix_tokens": bool(self._n_prefix)}
        self._is_channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")

    def whole(self, pixels: Tensor) -> object:
        return self.model(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        return tuple(self._stage(state) for state in self.model.forward_intermediates(pixels, **self._options))

    def _stage(self, state: Tensor | tuple[Tensor, Tensor]) -> Stage:
        if isinstance(state, tuple):
            return Stage(patches=state[0], cls=state[1][:, 0] if self._has_cls else None)
        return from_map(state) if state.dim() == 4 else Stage(patches=state)

    def last(self, pixels: Tensor) -> Stage:
        with Grid(self.model) as grid:
            final: Tensor = self.model.forward_features(pixels)
        if final.dim() == 4 and self._is_channels_last:
            return from_map(final.permute(0, 3, 1, 2))
        if final.dim() == 4 or self._n_prefix is None:
            return grid.stage(final)
        return Stage(patches=final[:, self._n_prefix :], cls=final[:, 0] if self._has_cls else None)
