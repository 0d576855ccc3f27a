"""The settings of a command: a run's, of which a plan may leave some out, and of which an adapter's folder gives some to an evaluation."""

from __future__ import annotations

import dataclasses
import typing
from argparse import SUPPRESS
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Optional

from adalink.checkpoint.precision import BaseSettings, Precision
from adalink.methods import METHODS
from multimodal.existing.budget import ImageTokens
from multimodal.generation.settings import GenerationChoice, GenerationSettings, saved_generation
from multimodal.template import Template
from multimodal.training.settings import TrainSettings
from tasks.captioning import Captioning
from tasks.data.sources import DataConfig
from tasks.runs.config import Data, Parts, RunConfig
from tasks.runs.help import comments_as_help
from tasks.vqa import Vqa

__all__ = [
    "DATA_ROWS", "METHODS_ROW", "PARTS_FIRST", "SAVED", "DryRunConfig", "EvaluationSettings", "add_data_set", "add_run", "data_set_of",
    "only_named_data", "settings_of",
]  # fmt: skip

SOURCES = ("path", "images", "media", "shards", "mix", "glue", "table", "disk", "scenes")  # one of them says where a data set is
SPLITS = ("train", "val")
DATA_SETS = (*SPLITS, "search")

# What `--help` lists of a run's settings.
PARTS_FIRST = ("config", "task", "model", "encoder", "language_model")
DATA_ROWS = (
    ("--data.val PATH", "a table, an annotation file, a folder: what is evaluated on; --data.val.NAME VALUE says more (--help.all)"),
    ("--data.train PATH", "what is trained on, likewise"),
)
METHODS_ROW = ("--methods.NAME SETTINGS", "one or more methods, such as --methods.lora '{rank: 8}'; `adalink methods` lists them")

# Help lists the methods by name. Their settings have a help of their own, for which the method itself is imported, and torch.
METHOD_GROUPS = {"methods": "methods", "vision_methods": "methods inside the encoder", "connector_methods": "methods on the connector of `model`"}

_DATA: Any = dataclasses.make_dataclass(
    "DraftData",
    [(name, Optional[DataConfig], None) for name in DATA_SETS],  # noqa: UP045 (jsonargparse reads it at run time)
    kw_only=True,
    frozen=True,
)
_OPTIONAL: dict[str, Any] = {"task": "captioning", "data": dataclasses.field(default_factory=_DATA)}
# What a run's config can be asked, and the checks that it makes of itself.
_ASKED = ("check_features", "check_form", "check_texts", "chosen_task", "encoder_methods", "methods_on_connector", "n_answers", "parts")
_CHECKED = {name: vars(RunConfig)[name] for name in _ASKED}


def _dry_run_config() -> Any:
    """RunConfig with defaults for what only a run needs. Fields, types and help stay those of RunConfig."""
    hints = {**typing.get_type_hints(RunConfig), "data": _DATA}
    fields: list[Any] = []
    for field in dataclasses.fields(RunConfig):
        default = _OPTIONAL.get(field.name, field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=field.default_factory)
        fields.append((field.name, hints[field.name]) if default is dataclasses.MISSING else (field.name, hints[field.name], default))
    checked = {**_CHECKED, "__post_init__": vars(RunConfig)["check_features"]}
    return dataclasses.make_dataclass("DryRunConfig", fields, kw_only=True, frozen=True, namespace=checked)


DryRunConfig: Any = _dry_run_config()

# What an adapter's folder says, so that nobody has to say it again.
_SAVED: dict[str, Any] = {"task": Optional[Literal["captioning", "vqa", "text"]]}  # noqa: UP045
SAVED = (*_SAVED, "model", "encoder", "language_model", "image_tokens", "base", "frames", "layer", "generation")


def _evaluation_settings() -> Any:
    hints = {**typing.get_type_hints(RunConfig), **_SAVED, "generation": GenerationChoice}
    fields: list[Any] = []
    for field in dataclasses.fields(RunConfig):
        factory = GenerationChoice if field.name == "generation" else field.default_factory
        default = None if field.name in _SAVED else field.default if factory is dataclasses.MISSING else dataclasses.field(default_factory=factory)
        fields.append((field.name, hints[field.name]) if default is dataclasses.MISSING else (field.name, hints[field.name], default))
    return dataclasses.make_dataclass("EvaluationSettings", fields, kw_only=True, frozen=True)


EvaluationSettings: Any = _evaluation_settings()


def add_run(parser: Any, settings: Any = RunConfig) -> None:
    """The settings of a run, each with the comment beside its field as its help. settings: RunConfig, Draft or EvaluationSettings."""
    methods = () if parser.is_for_help else METHODS.values()
    tasks, parts = (Captioning, Vqa, Template), (ImageTokens, Precision, BaseSettings)
    for kind in (RunConfig, Data, DataConfig, *tasks, *parts, TrainSettings, GenerationSettings, GenerationChoice, *methods):
        comments_as_help(kind)
    settings.__doc__ = RunConfig.__doc__
    parser.add_class_arguments(settings, None, skip=set(METHOD_GROUPS) if parser.is_for_help else None)
    if parser.is_for_help:
        for group, about in METHOD_GROUPS.items():
            options = parser.add_argument_group(about)
            for name in METHODS:
                options.add_argument(f"--{group}.{name}", metavar="SETTINGS", default=SUPPRESS, help=f"`--{group}.{name}.help` lists them")


NOT_OF_ONE_SET = frozenset({"path", "decode"})  # of a data set's settings, what commands that look at one do not take by name


def add_data_set(parser: Any, without: Collection[str] = ()) -> None:
    """The settings of one data set, its path first and without a name. without: settings that the command does not take."""
    comments_as_help(DataConfig)
    about = "a file or folder that shows what it is: a table, an annotation file, an imagefolder, shards"
    parser.add_argument("path", type=str, nargs="?", metavar="PATH", help=about)
    parser.add_class_arguments(DataConfig, None, skip={*NOT_OF_ONE_SET, *without})


def data_set_of(values: Any, without: Collection[str] = ()) -> DataConfig:
    """The data set that a command's values name."""
    taken = [one.name for one in dataclasses.fields(DataConfig) if one.name not in NOT_OF_ONE_SET.union(without)]
    return DataConfig(path=values.path, **{name: values[name] for name in taken})


def settings_of(adapter: Path, given: Any) -> dict[str, Any]:
    """The fields of RunConfig for evaluating an adapter: those that are given, else those that its folder says.

    given   by name, such as the parsed arguments of the fields of EvaluationSettings
    Raises CheckpointError where the folder is none that `adalink train` wrote.
    """
    from tasks.runs.compose import read_saved

    saved = read_saved(adapter)
    values = {name: given[name] for name in RunConfig.__dataclass_fields__}
    parts = Parts(**{name: values[name] for name in ("model", "encoder", "language_model", "image_tokens", "base", "frames")})
    values |= {"task": values["task"] or saved.task["task"], **vars(parts.over(Parts.of(saved.base, saved.task)))}
    return {**values, "layer": saved.task["layer"], "generation": values["generation"].over(saved_generation(saved.task))}


def only_named_data(values: Any) -> None:
    """Leave out, of the parsed settings, data sets that are half given: a recipe says how they are read, the user where they are."""
    for split in DATA_SETS:
        given = values["data"][split] if values["data"] is not None else None
        if given is not None and all(given[source] is None for source in SOURCES):
            values["data"][split] = None


