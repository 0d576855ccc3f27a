"""The adapter of an encoder, in the folder of the language model's adapter that was trained with it: `vision/`, in the same format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adalink import Adapter, FrozenPart, Method
from adalink.checkpoint import AdapterConfig, load_weights, read_config, save_adapter
from adalink.errors import ConfigError
from multimodal.vision import VisionTower

__all__ = ["has_vision_adapter", "load_vision_adapter", "new_vision_adapter", "save_vision_adapter"]

FOLDER = "vision"


def new_vision_adapter(tower: VisionTower, methods: Mapping[str, Method]) -> Adapter:
    """Attach new methods to the tower's encoder. Raises ConfigError or AttachError where they do not fit it."""
    return tower.adapt(Adapter(methods, tower.vision_anatomy()))


def save_vision_adapter(folder: Path, tower: VisionTower, encoder: FrozenPart) -> None:
    """Write the encoder's adapter below the folder, where there is one."""
    if tower.adapter is not None:
        save_adapter(folder / FOLDER, tower.adapter, AdapterConfig(tower.adapter.methods, {"encoder": encoder}))


def has_vision_adapter(folder: Path) -> bool:
    """Whether an adapter's folder holds an encoder's too."""
    return (folder / FOLDER).is_dir()


def load_vision_adapter(
    folder: Path, tower: VisionTower, encoder: FrozenPart, n_adapters: int, *, allow_other_base: bool = False
) -> Adapter | None:
    """The encoder's adapter of a folder with its weights, not attached yet; None where the folder holds none.

    n_adapters: adapters that the language model has already. They share the encoder, so a folder with an encoder's adapter can only
    be the first. Raises ConfigError where the encoder is not as the folder's adapter knew it, CheckpointError for a damaged folder.
    """
    below = folder / FOLDER
    if not has_vision_adapter(folder):
        if tower.adapter is not None:
            raise ConfigError(f"the adapter in {folder} was trained on the frozen encoder, and this model's encoder is adapted: load it on a model of its own")
        return None
    if tower.adapter is not None or n_adapters:
        raise ConfigError(
            f"the adapter in {folder} was trained with an adapted encoder, which it would change for the adapters that this model has already: "
            "load it first, on a model of its own"
        )
    config = read_config(below)
    config.check_base({"encoder": encoder}, str(below), allow_other_base=allow_other_base)
    adapter = Adapter(config.methods, tower.vision_anatomy())
    load_weights(below, adapter)
    return adapter
