"""The settings of a command: a run's, of which a plan may leave some out, and of which an adapter's folder gives some to an evaluation."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

from adalink import METHODS
from adalink.errors import BudgetError, ConfigError, DataError
from multimodal.bad_samples import BadSample, BadSamples, counted
from multimodal.data.feature_cache.reader import read_manifest
from multimodal.data.images.decode import BadImage, decode_image
from multimodal.data.shards.reader import DamagedSample
from multimodal.generation.generate import GenerationChoice, GenerationSettings, saved_generation
from multimodal.sample import SampleSource
from multimodal.template import Template
from multimodal.training.settings import TrainSettings
from tasks.captioning import Captioning
from tasks.data.sources import DataConfig
from tasks.runs.compose import read_saved
from tasks.runs.config import Data, RunConfig, comments_as_help
from tasks.runs.run import refuse_taken
from tasks.task import Task
from tasks.vqa import Vqa

__all__ = [
    "SAVED", "Draft", "EvaluationSettings", "add_allow_other_base", "add_run", "check_data", "check_folders", "name_both_parts", "only_named_data",
    "settings_of",
]  # fmt: skip

SOURCES = ("images", "shards", "mix", "scenes")  # one of them says where a data set is
SPLITS = ("train", "val")

_DATA: Any = dataclasses.make_dataclass(
    "DraftData",
    [(name, Optional[DataConfig], None) for name in SPLITS],  # noqa: UP045 (jsonargparse reads it at run time)
    kw_only=True,
    frozen=True,
)
_OPTIONAL: dict[str, Any] = {"task": "captioning", "encoder": "", "language_model": "", "data": dataclasses.field(default_factory=_DATA)}
# What a run's config can be asked, and the checks that it makes of itself.
_CHECKED = {name: vars(RunConfig)[name] for name in ("__post_init__", "chosen_task", "encoder_methods", "n_answers")}


def _draft() -> Any:
    """RunConfig with defaults for what only a run needs. Fields, types and help stay those of RunConfig."""
    hints = {**typing.get_type_hints(RunConfig), "data": _DATA}
    fields: list[Any] = []
    for field in dataclasses.fields(RunConfig):
        default = _OPTIONAL.get(field.name, field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=field.default_factory)
        fields.append((field.name, hints[field.name]) if default is dataclasses.MISSING else (field.name, hints[field.name], default))
    return dataclasses.make_dataclass("Draft", fields, kw_only=True, frozen=True, namespace=_CHECKED)


Draft: Any = _draft()

# What an adapter's folder says, so that nobody has to say it again.
_SAVED: dict[str, Any] = {"task": Optional[Literal["captioning", "vqa"]], "encoder": Optional[str], "language_model": Optional[str]}  # noqa: UP045
SAVED = (*_SAVED, "layer", "generation")


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
    for kind in (RunConfig, Data, DataConfig, Captioning, Vqa, Template, TrainSettings, GenerationSettings, GenerationChoice, *METHODS.values()):
        comments_as_help(kind)
    settings.__doc__ = RunConfig.__doc__
    parser.add_class_arguments(settings, None)


def add_allow_other_base(parser: Any) -> None:
    """The option of every command that loads an adapter."""
    help = "load the adapter though a frozen part is not as it was when it was trained; what differs is a warning"
    parser.add_argument("--allow_other_base", action="store_true", help=help)


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


def only_named_data(values: Any) -> None:
    """Leave out, of the parsed settings, data sets that are half given: a recipe says how they are read, the user where they are."""
    for split in SPLITS:
        given = values["data"][split] if values["data"] is not None else None
        if given is not None and all(given[source] is None for source in SOURCES):
            values["data"][split] = None


def name_both_parts(draft: Any) -> None:
    """Raise ConfigError where the encoder or the language model is not said."""
    if missing := [name for name in ("encoder", "language_model") if not getattr(draft, name)]:
        raise ConfigError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given: name both frozen parts, such as --encoder scenes:encoder")


def check_folders(draft: Any) -> None:
    """Raises ConfigError as a run would where its folder is taken or cannot be made, and where a folder of features holds none."""
    if draft.out is not None:
        refuse_taken(draft.out, resume=False)
        if (above := next((path for path in draft.out.absolute().parents if path.exists()), None)) is not None and not above.is_dir():
            raise ConfigError(f"the run folder {draft.out} cannot be made: {above} is no folder")
    if draft.features is not None and draft.train.features != "fill":
        read_manifest(draft.features / "train")


def check_data(draft: Any) -> Sequence[str]:
    """One line for each data set: what was found where it is given, a word where it is not.

    Reads annotations or manifests, and images up to the first that can be used. Raises DataError, BudgetError and ConfigError as a run would.
    """
    lines = []
    for split in SPLITS:
        config: DataConfig | None = getattr(draft.data, split)
        if config is None:
            lines.append(f"data.{split}: not given, and not checked")
            continue
        opened = config.open()
        bad = BadSamples(budget=draft.train.bad_samples, found=opened.problems)
        place = _first_usable(opened.source, draft.chosen_task(), split, bad)
        n_bad, which = sum(bad.counts.values()), "the first one" if place == 0 else f"number {place + 1}"
        lines.append(f"data.{split}: {counted(len(opened.source), 'picture')}, {n_bad:,} known to be bad; {which} can be read")
    return lines


def _first_usable(source: SampleSource, task: Task, split: str, bad: BadSamples) -> int:
    """The index of the first sample that a run can use. Raises BudgetError where too many come before it, DataError where there is none."""
    _check_budget(bad, split)
    for index in range(len(source)):
        try:
            sample = source[index]
            decode_image(sample.image)
        except DamagedSample as error:
            bad.add(error.bad)
        except BadImage as error:
            bad.add(BadSample(key=sample.key, reason=error.reason, detail=str(error)))
        else:
            if split == "val":
                task.score({asked.item: "a" for asked in task.asked(sample)}, [sample])  # raises where there is nothing to score against
                return index
            if any((text.target or "").strip() for text in task.texts(sample, random.Random(0))):
                return index
            bad.add(BadSample(key=sample.key, reason="no text", detail=f"{sample.key} has no text to learn from"))
        _check_budget(bad, split)
    raise DataError(f"data.{split}: none of the {counted(len(source), 'image')} can be used: {bad.summary()}; mend the data, or give other data")


def _check_budget(bad: BadSamples, split: str) -> None:
    try:
        bad.check()
    except BudgetError as error:
        raise BudgetError(f"data.{split}: {error}") from None
