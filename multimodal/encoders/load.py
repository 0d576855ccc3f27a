"""Finds the library and the format of an encoder from its name or its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from adalink.errors import ConfigError
from multimodal.encoders.open_clip import load_open_clip
from multimodal.encoders.stage import Loaded
from multimodal.encoders.timm import load_timm
from multimodal.encoders.transformers import load_transformers
from multimodal.frozen import existing_folder

__all__ = ["load_encoder"]


def load_encoder(spec: str | Path, dtype: torch.dtype | None) -> Loaded:
    """The encoder of a local folder, `timm:NAME`, `open_clip:MODEL/TAG`, `hf:ID`, or any other hub id of transformers (dtype: see there)."""
    folder = existing_folder(spec)
    if folder is not None:
        return _load_folder(folder, dtype)
    library, _, name = str(spec).partition(":")
    if library == "timm":
        return load_timm(name)
    if library == "open_clip":
        return load_open_clip(name)
    name = name if library == "hf" else str(spec)
    return load_timm(name) if name.startswith("timm/") else load_transformers(name, dtype)


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Loaded:
    """The encoder of a folder, whose format its configuration file tells."""
    if (folder / "open_clip_config.json").is_file():
        return load_open_clip(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"'{folder}' holds no config.json or open_clip_config.json; give the folder of a saved vision encoder") from None
    except ValueError as error:
        raise ConfigError(f"'{path}' is no JSON ({error}); save the encoder again") from error
    if "model_type" in config:
        return load_transformers(folder, dtype)
    if "architecture" in config:
        return load_timm(folder)
    raise ConfigError(f"'{path}' has neither 'model_type' (transformers) nor 'architecture' (timm); give the folder of a saved vision encoder")
