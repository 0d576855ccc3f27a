"""The folder of a composed model's adapter: the language model's edits, and what was trained with them: an answer head, an adapted encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink import BASE_NAME, AdaptedModel, Adapter
from adalink.errors import ConfigError
from adalink.hub import local_folder
from multimodal.classify import load_head, save_head
from multimodal.vision_adapter import load_vision_adapter, save_vision_adapter

if TYPE_CHECKING:
    from multimodal.model import VisionLanguageModel

__all__ = ["load_composed", "save_composed"]


def save_composed(model: VisionLanguageModel, folder: Path, task: Mapping[str, Any]) -> None:
    """Write the active adapter's folder; `task` is kept in its config, with what must be known to read it: template, layer, answers."""
    template = model.template_of(model.adapted.active or BASE_NAME)
    known = {"prompt": template.prompt, "target": template.target, "layer": model.tower.layer}
    answers = {} if model.head is None else {"answers": len(model.head.answers)}
    model.adapted.task = {**model.adapted.task, **task, **known, **answers}
    model.adapted.save_pretrained(folder)
    save_vision_adapter(folder, model.tower, model.adapted.parts["encoder"])
    if model.head is not None:
        save_head(folder, model.head)


def load_composed(model: VisionLanguageModel, folder: str | Path, name: str, *, activate: bool = True, allow_other_base: bool = False) -> Adapter:
    """Add an adapter from its folder or hub name, in eval mode; a failure leaves the model as it was.

    Raises ConfigError where it was trained on another layer's features, CheckpointError on other frozen parts or a damaged folder.
    """
    config, parts = AdaptedModel.read_config(folder), model.adapted.parts
    layer = config.task.get("layer", model.tower.layer)
    if layer != model.tower.layer:
        config.check_base({**parts, "encoder": dataclasses.replace(parts["encoder"], sketches={})}, str(folder))  # another model is told first
        raise ConfigError(
            f"the adapter in {folder} reads the features of layer {layer}, and this model's encoder gives those of layer {model.tower.layer}: "
            f"compose the model with layer={layer}"
        )
    if not config.modules_to_save:  # those of which it has copies are no part of its base: load_adapter compares the rest
        config.check_base(parts, str(folder), allow_other_base=allow_other_base)
    local, encoder = local_folder(folder), parts["encoder"]
    vision = load_vision_adapter(local, model.tower, encoder, len(model.adapted.adapters), allow_other_base=allow_other_base)
    head = load_head(local, model.adapted, config.task["answers"]) if config.task.get("answers") else None
    adapter = model.adapted.load_adapter(local, name, activate=activate, allow_other_base=allow_other_base)
    if head is not None:
        model.heads[name] = head
    if vision is not None:
        model.tower.adapt(vision.eval())
    return adapter
