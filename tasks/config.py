"""What a run is made of: the same dataclasses are the YAML file, the command line and the Python API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from adalink import METHODS, Method
from adalink.errors import ConfigError
from multimodal.generate import GenerationSettings
from multimodal.train_settings import TrainSettings
from tasks.captioning import Captioning
from tasks.data import DataConfig
from tasks.task import Task
from tasks.vqa import Vqa

__all__ = ["Data", "Methods", "RunConfig", "chosen_methods"]

# One optional setting for each method there is, so that help, types and errors come from the method's own dataclass.
Methods: Any = dataclasses.make_dataclass(
    "Methods",
    [(name, Optional[kind], None) for name, kind in METHODS.items()],  # noqa: UP045 (jsonargparse reads it at run time)
    kw_only=True,
    frozen=True,
)


def chosen_methods(methods: Any) -> dict[str, Method]:
    """The methods that a config gives."""
    chosen = {f.name: value for f in dataclasses.fields(methods) if (value := getattr(methods, f.name)) is not None}
    if not chosen:
        raise ConfigError(f"the config names no method: under `methods:`, give one or more of {', '.join(METHODS)}")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the pictures and texts are."""

    val: DataConfig  # what is evaluated
    train: DataConfig | None = None  # what is learnt; only `train` needs it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: frozen parts, methods, data, training, evaluation."""

    task: Literal["captioning", "vqa"]  # what is asked
    encoder: str  # local folder, timm:NAME, open_clip:NAME/WEIGHTS, a transformers hub name, or scenes:encoder
    language_model: str  # local folder, a transformers hub name, or scenes:language
    data: Data
    methods: Methods
    layer: int = -1  # which encoder block the features come from: -1 the last, with its norm; -2 the one before, as Context-PEFT has it
    captioning: Captioning = field(default_factory=Captioning)  # settings of the task, where it is captioning
    vqa: Vqa = field(default_factory=Vqa)  # settings of the task, where it is vqa
    train: TrainSettings = field(default_factory=TrainSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    out: Path | None = None  # the run folder

    def chosen_task(self) -> Task:
        """The task with its settings."""
        tasks: Mapping[str, Task] = {"captioning": self.captioning, "vqa": self.vqa}
        return tasks[self.task]
