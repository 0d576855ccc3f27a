"""A run's settings before anything is run: as in RunConfig, but what a plan can do without may be left out."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Optional

from adalink.errors import ConfigError, DataError
from multimodal.images import decode_image
from tasks.config import RunConfig
from tasks.data import DataConfig

__all__ = ["Draft", "check_data", "name_both_parts", "only_named_data"]

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


def check_data(data: Any) -> Sequence[str]:
    """One line for each data set: what was found where it is given, a word where it is not.

    Reads annotations or manifests and the first picture. Raises DataError and ConfigError as a run would.
    """
    lines = []
    for split in SPLITS:
        config: DataConfig | None = getattr(data, split)
        if config is None:
            lines.append(f"data.{split}: not given, and not checked")
            continue
        opened = config.open()
        sample = opened.source[0]
        try:
            decode_image(sample.image)
        except DataError as error:
            raise DataError(f"the first picture of data.{split} cannot be read: {error}") from error
        lines.append(f"data.{split}: {len(opened.source):,} pictures, {len(opened.problems):,} known to be bad; the first one can be read")
    return lines
