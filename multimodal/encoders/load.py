"""Finds the library and the format of an encoder from its name or its folder. Only that library is imported, when the encoder is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from adalink.errors import ConfigError
from multimodal.encoders.base import Encoder, Loaded
from multimodal.loading import existing_folder, loading, quiet, split_revision

__all__ = ["DrawnEncoder", "draw_encoder", "load_encoder"]


def load_encoder(spec: str | Path, dtype: torch.dtype | None, frames: int | None = None) -> Loaded:
    """The encoder of a local folder, `timm:NAME`, `open_clip:MODEL/TAG`, `hf:ID`, or any other hub id of transformers (dtype and frames: see there)."""
    folder = existing_folder(spec)
    if folder is not None:
        return _load(_library_of(folder), folder, dtype, frames)
    library, _, name = str(spec).partition(":")
    if library not in ("timm", "open_clip"):
        name = name if library == "hf" else str(spec)
        library = "timm" if name.startswith("timm/") else "hf"
    return _load(library, name, dtype, frames)


def _load(library: str, spec: str | Path, dtype: torch.dtype | None, frames: int | None) -> Loaded:
    if library == "timm":
        from multimodal.encoders.timm import load_timm

        return load_timm(spec)
    if library == "open_clip":
        from multimodal.encoders.open_clip import load_open_clip

        return load_open_clip(spec)
    from multimodal.encoders.transformers import load_transformers

    return load_transformers(spec, dtype, frames)


def _library_of(folder: Path) -> str:
    """The library of a folder, whose configuration file names it."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"'{folder}' holds no config.json or open_clip_config.json; give the folder of a saved vision encoder") from None
    except ValueError as error:
        raise ConfigError(f"'{path}' is no JSON ({error}); save the encoder again") from error
    if "model_type" in config:
        return "hf"
    if "architecture" in config:
        return "timm"
    raise ConfigError(f"'{path}' has neither 'model_type' (transformers) nor 'architecture' (timm); give the folder of a saved vision encoder")


# ----------------------------------------
# Encoders without their weights: the modules of a configuration on torch's meta device, where a tensor has a shape and no values.


_LOAD = "a plan of it cannot be made, so start the training itself"
_ADVICE = "give a local folder with its config.json, 'timm:NAME', 'open_clip:MODEL/TAG', or a hub id where the hub can be reached"


@dataclass(frozen=True, kw_only=True)
class DrawnEncoder:
    """An encoder on the meta device, and the height and width of the images that it is given."""

    module: nn.Module
    pixels: tuple[int, int]

    @property
    def encoder(self) -> Encoder:
        """The module, with what every encoder can do."""
        return self.module  # type: ignore[return-value]  # as in VisionTower


def draw_encoder(spec: str | Path) -> DrawnEncoder:
    """The encoder that `spec` names (see load_tower), from its configuration alone.

    timm and open_clip hold the shapes of their architectures; transformers needs the config.json of a folder or of the hub.
    Raises ConfigError for a name or folder that leads to no encoder.
    """
    folder = existing_folder(spec)
    library, _, name = ("", "", str(spec)) if folder is not None else str(spec).partition(":")
    if folder is not None:
        library = _library_of(folder)
    elif library not in ("timm", "open_clip", "hf"):
        library, name = ("timm", str(spec)) if str(spec).startswith("timm/") else ("hf", str(spec))
    draw = {"timm": _timm, "open_clip": _open_clip, "hf": _transformers}[library]
    with loading("vision encoder", spec, _ADVICE), quiet():
        drawn = draw(str(folder) if folder is not None else name, folder is not None)
    drawn.module.eval().requires_grad_(False)
    return drawn


def _timm(name: str, is_folder: bool) -> DrawnEncoder:
    import timm
    from timm.data import resolve_model_data_config

    from multimodal.encoders.timm import TimmEncoder

    source = f"local-dir:{name}" if is_folder else f"hf-hub:{name}" if "/" in name else name
    with torch.device("meta"):
        model = timm.create_model(source, pretrained=False, num_classes=0)
    high, wide = resolve_model_data_config(model)["input_size"][1:]
    return DrawnEncoder(module=TimmEncoder(model), pixels=(high, wide))


def _open_clip(name: str, is_folder: bool) -> DrawnEncoder:
    import open_clip

    from multimodal.encoders.open_clip import OpenClipEncoder, refuse_unknown
    from multimodal.encoders.timm import TimmEncoder

    if is_folder:
        source = f"local-dir:{name}"
    elif name.startswith("hf-hub:"):
        source = name
    else:
        source, _, tag = name.partition("/")
        refuse_unknown(source, tag)
    with torch.device("meta"):
        visual: Any = open_clip.create_model(source, load_weights=False, device="meta").visual
        trunk = getattr(visual, "trunk", None)
        module: nn.Module = OpenClipEncoder(visual) if trunk is None else TimmEncoder(trunk)
    size = visual.image_size
    high, wide = size if isinstance(size, (tuple, list)) else (size, size)
    return DrawnEncoder(module=module, pixels=(high, wide))


def _transformers(name: str, is_folder: bool) -> DrawnEncoder:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    from multimodal.encoders.clips import FAMILIES
    from multimodal.encoders.transformers import TransformersEncoder

    identifier, revision = (name, None) if is_folder else split_revision(name)
    config = AutoConfig.from_pretrained(identifier, revision=revision, trust_remote_code=False)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(f"cannot draw the vision encoder '{name}': transformers has no encoder for model type '{config.model_type}'; {_ADVICE}")
    with torch.device("meta"):
        model: Any = MODEL_MAPPING[type(config)]._from_config(config, dtype=config.dtype or torch.float32)
    if config.model_type in FAMILIES:
        raise ConfigError(f"'{name}' is an encoder of {FAMILIES[config.model_type].kind}, and only those of images are drawn without their weights: {_LOAD}")
    if model.main_input_name != "pixel_values":
        raise ConfigError(
            f"'{name}' is of model type '{config.model_type}' with the input {model.main_input_name}, expected one that takes pixel_values; {_ADVICE}"
        )
    return DrawnEncoder(module=TransformersEncoder(model), pixels=_side(identifier, revision, config, is_folder))


def _side(name: str, revision: str | None, config: Any, is_folder: bool) -> tuple[int, int]:
    """What the image processor makes of an image; where a folder holds none, what the config says."""
    if is_folder and not (Path(name) / "preprocessor_config.json").is_file():
        size = getattr(config, "image_size", None)
        if size is None:
            raise ConfigError(f"neither a preprocessor_config.json nor `image_size` in config.json says how large the images of '{name}' are: add one")
        high, wide = size if isinstance(size, (tuple, list)) else (size, size)
        return int(high), int(wide)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    high, wide = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"].shape[-2:]
    return int(high), int(wide)
