"""The model of a config or of a saved adapter, with the embedded parts known by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from adalink import AdaptedModel
from adalink.checkpoint.folder import AdapterConfig
from adalink.errors import CheckpointError, ConfigError
from multimodal.encoders.tower import VisionTower, load_tower
from multimodal.language import LanguageUse, load_language
from multimodal.loss.answer_head import use_for
from multimodal.model import VisionLanguageModel
from multimodal.processes import process_state
from multimodal.template import Template
from tasks.scenes.parts import encoder_folder, language_folder

__all__ = ["compose", "composed_tower", "found_part", "load_adapted", "located", "read_saved"]


def compose(encoder: str, language_model: str, *, template: Template, layer: int = -1, use: LanguageUse = "write") -> VisionLanguageModel:
    """The composed model, on this process's device; `scenes:encoder` and `scenes:language` are the parts that ship with the package."""
    tower = composed_tower(encoder, layer)
    language = load_language(found_part(language_model), use=use)
    return VisionLanguageModel(tower, dataclasses.replace(language, name=located(language_model)), template).to(process_state().device)


def composed_tower(encoder: str, layer: int = -1) -> VisionTower:
    """The encoder of a composed model, on this process's device."""
    tower = load_tower(found_part(encoder), layer=layer)
    tower.name = located(encoder)  # an adapter remembers its parts by the names that were given, not by where they were found
    return tower.to(process_state().device)


def found_part(name: str) -> str | Path:
    """The folder of an embedded part, other names as they are. Raises ConfigError for an embedded part that there is not."""
    embedded = {"scenes:encoder": encoder_folder, "scenes:language": language_folder}
    if name.startswith("scenes:") and name not in embedded:
        raise ConfigError(f"there is no embedded part {name!r}: there are {' and '.join(embedded)}")
    return embedded[name]() if name in embedded else name


def read_saved(folder: Path) -> AdapterConfig:
    """The config of an adapter that `adalink train` saved: it names both frozen parts and the task. Raises CheckpointError for another one."""
    config = AdaptedModel.read_config(folder)
    if not {"encoder", "language_model"} <= set(config.base) or not {"task", "prompt", "target", "layer"} <= set(config.task):
        raise CheckpointError(f"the adapter in {folder} was not saved by `adalink train`: it names no encoder, language model and task")
    return config


def located(name: str) -> str:
    """The absolute path of what lies in a local folder, so that it is found from another one; a hub's name, an address or an embedded part as it is."""
    return str(Path(name).absolute()) if ":" not in name and Path(name).exists() else name


def load_adapted(
    folder: Path, *, encoder: str | None, language_model: str | None, allow_other_base: bool = False
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """The composed model of a saved adapter, and what its config says of its task.

    The frozen parts are those that the adapter names unless others are given; others than it was trained on are refused, or allowed by name.
    """
    config = read_saved(folder)
    model = compose(
        encoder or config.base["encoder"].name,
        language_model or config.base["language_model"].name,
        template=Template(prompt=config.task["prompt"], target=config.task["target"]),
        layer=config.task["layer"],
        use=use_for(config.task),
    )
    model.load_adapter(folder, "default", allow_other_base=allow_other_base)
    return model, dict(config.task)
