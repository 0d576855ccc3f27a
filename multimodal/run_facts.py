"""What a run is a function of, kept in its checkpoints: a resume that differs is refused, or says in what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from adalink.errors import CheckpointError
from multimodal.model import VisionLanguageModel
from multimodal.train_settings import TrainSettings

__all__ = ["changed_settings", "flat", "refuse_another_model", "run_facts"]


def run_facts(model: VisionLanguageModel, settings: TrainSettings) -> dict[str, Any]:
    """As JSON: the training's settings by name, and what the model is made of."""
    adapter, vision, head = model.adapted.active_adapter(), model.tower.adapter, model.head
    template = model.template_of(model.adapted.active or "")
    made = {
        **{role: part.fingerprint for role, part in model.adapted.parts.items()},
        "methods": _methods(adapter.methods),
        "vision_methods": _methods(vision.methods) if vision is not None else {},
        "template": dataclasses.asdict(template),
        "answers": hashlib.sha256("\n".join(head.answers).encode()).hexdigest()[:16] if head is not None else "",
    }
    return json.loads(json.dumps({"train": dataclasses.asdict(settings), "model": made}, default=str))  # type: ignore[no-any-return]


def refuse_another_model(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint's model was made of something else; one that says nothing was written by an earlier version."""
    was, now = flat(found.get("model", {})), flat(own["model"])
    if was and (different := [name for name in {**was, **now} if was.get(name) != now.get(name)]):
        name = different[0]
        others = f", and {', '.join(different[1:4])} differ too" if len(different) > 1 else ""
        raise CheckpointError(f"{name} was {was.get(name)!r} and is {now.get(name)!r}{others}")


def changed_settings(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """`train.learning_rate 0.001 -> 0.0005` for each setting of the training that is another now."""
    was, now = found.get("train", {}), own["train"]
    return [f"train.{name} {was[name]} -> {now[name]}" for name in now if name in was and was[name] != now[name]]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def _methods(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"kind": type(method).__name__, **dataclasses.asdict(method)} for name, method in methods.items()}
