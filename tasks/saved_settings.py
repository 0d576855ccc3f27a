"""The settings of an evaluation: those of a run, of which the adapter's own folder gives what is not said."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal, Optional

from multimodal.generate import GenerationChoice, saved_generation
from tasks.compose import read_saved
from tasks.config import RunConfig

__all__ = ["SAVED", "EvaluationSettings", "settings_of"]

# What an adapter's folder says, so that nobody has to say it again.
_SAVED: dict[str, Any] = {"task": Optional[Literal["captioning", "vqa"]], "encoder": Optional[str], "language_model": Optional[str]}  # noqa: UP045
SAVED = (*_SAVED, "layer", "generation")


def _settings() -> Any:
    hints = {**typing.get_type_hints(RunConfig), **_SAVED, "generation": GenerationChoice}
    fields: list[Any] = []
    for field in dataclasses.fields(RunConfig):
        factory = GenerationChoice if field.name == "generation" else field.default_factory
        default = None if field.name in _SAVED else field.default if factory is dataclasses.MISSING else dataclasses.field(default_factory=factory)
        fields.append((field.name, hints[field.name]) if default is dataclasses.MISSING else (field.name, hints[field.name], default))
    return dataclasses.make_dataclass("EvaluationSettings", fields, kw_only=True, frozen=True)


EvaluationSettings: Any = _settings()


def settings_of(adapter: Path, given: Any) -> dict[str, Any]:
    """The fields of RunConfig for evaluating an adapter: those that are given, else those that its folder says.

    given   by name, such as the parsed arguments of the fields of EvaluationSettings
    Raises CheckpointError where the folder is none that `adalink train` wrote.
    """
    saved = read_saved(adapter)
    known = {"task": saved.task["task"], **{role: saved.base[role].name for role in ("encoder", "language_model")}}
    values = {name: given[name] for name in RunConfig.__dataclass_fields__}
    values |= {name: values[name] or value for name, value in known.items()}
    return {**values, "layer": saved.task["layer"], "generation": values["generation"].over(saved_generation(saved.task))}
