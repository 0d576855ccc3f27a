"""Every method there is: what it computes, where it edits, its settings, and what it trains on a given pair of parts."""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

import torch

from adalink import METHODS, Adapter, Anatomy, Method
from adalink.errors import AdalinkError
from tasks.planning.meta import DrawnLanguage, DrawnTower
from tasks.planning.plan import places_of, slots_of
from tasks.runs.help import comments_as_help

__all__ = ["Listed", "Setting", "listed_methods", "methods_as_json", "methods_as_text", "methods_on"]


EXAMPLE_COUNT, EXAMPLE_NUMBER, EXAMPLE_LAYERS, EXAMPLE_NAMES = 4, 1.0, (-2, -1), ("one", "two")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a method; default None where a value must be given. about: the comment beside it."""

    name: str
    type: str
    default: str | None
    about: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A method, as its own file says it, and as it is placed on the parts.

    title, formula   the first line, and the first indented block, of its file's docstring
    counted_with     the settings that `edits`, `slots` and `trained` are of: the user's, or examples for what has no default
    refused          why it cannot be placed on these parts with those settings; empty where it can
    """

    name: str
    title: str
    formula: tuple[str, ...]
    settings: tuple[Setting, ...]
    counted_with: Mapping[str, str]
    edits: tuple[str, ...] = ()
    slots: Mapping[str, int] = dataclasses.field(default_factory=dict)
    trained: int | None = None
    refused: str = ""


def listed_methods(tower: DrawnTower, language: DrawnLanguage, given: Mapping[str, Method]) -> list[Listed]:
    """One entry for each name in METHODS, in their order. given: methods with the user's settings."""
    return methods_on(Anatomy.read(language.model, tower.inputs), given)


def methods_on(anatomy: Anatomy, given: Mapping[str, Method]) -> list[Listed]:
    """The same of any model's anatomy."""
    return [_listed(name, kind, given.get(name), anatomy) for name, kind in METHODS.items()]


def _listed(name: str, kind: type[Any], given: Method | None, anatomy: Anatomy) -> Listed:
    required = {f.name: f for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    values = {field: getattr(given, field) for field in required} if given is not None else _examples(kind, required)
    title, formula = _stated(kind)
    listed = Listed(
        name=name,
        title=title,
        formula=formula,
        settings=_settings(kind, required),
        counted_with={field: written(value) for field, value in values.items()},
    )
    try:
        with torch.device("meta"):
            adapter = Adapter({name: given if given is not None else kind(**values)}, anatomy)
    except (AdalinkError, TypeError) as error:  # TypeError: a setting whose type has no example
        return dataclasses.replace(listed, refused=str(error))
    return dataclasses.replace(listed, edits=places_of(adapter)[name], slots=slots_of(adapter.slots), trained=adapter.n_parameters()[name])


def _stated(kind: type[Any]) -> tuple[str, tuple[str, ...]]:
    lines = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()
    formula: list[str] = []
    for line in lines[1:]:
        if line.startswith("    "):
            formula.append(line.strip())
        elif formula:
            break
    return (lines[0] if lines else kind.__name__), tuple(formula)


def _settings(kind: type[Any], required: Mapping[str, Any]) -> tuple[Setting, ...]:
    comments_as_help(kind)
    about = dict(line.strip().split(": ", 1) for line in (kind.__doc__ or "").rpartition("Args:")[2].splitlines() if ": " in line)
    hints = typing.get_type_hints(kind)
    return tuple(
        Setting(
            name=f.name,
            type=_type(hints[f.name]),
            default=None if f.name in required else written(f.default if f.default is not dataclasses.MISSING else f.default_factory()),  # type: ignore[operator]
            about=about.get(f.name, ""),
        )
        for f in dataclasses.fields(kind)
    )


def _examples(kind: type[Any], required: Mapping[str, Any]) -> dict[str, Any]:
    """A value for each field without a default, by its type alone; printed beside the counts, and meant for nothing else."""
    hints = typing.get_type_hints(kind)
    return {name: value for name in required if (value := _example(hints[name])) is not None}


def _example(hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Method:
        first = next(iter(METHODS.values()))
        return first(**_examples(first, {f.name: f for f in dataclasses.fields(first) if f.default is dataclasses.MISSING}))
    if origin is typing.Literal:
        return inner[0]
    if origin is tuple and typing.get_origin(inner[0]) is typing.Literal:
        return typing.get_args(inner[0])
    if origin in (typing.Union, UnionType):
        return _example(inner[0])
    if origin is collections.abc.Mapping:
        return {"all": ("all",)}
    return {int: EXAMPLE_COUNT, float: EXAMPLE_NUMBER, tuple[int, int]: EXAMPLE_LAYERS, tuple[str, ...]: EXAMPLE_NAMES}.get(hint)


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin in (typing.Union, UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}" if inner[-1] is ... else f"{len(inner)} of {_type(inner[0])}"
    if origin is collections.abc.Mapping:
        return f"{_type(inner[1])} by name"
    return str(hint.__name__)


def written(value: Any) -> str:
    """A value as a config file has it. (1, 2) -> `[1, 2]`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(written(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value.name or value}" if dataclasses.is_dataclass(value) and hasattr(value, "name") else str(value)


# ----------------------------------------
# The list of methods on the screen, and as JSON.


WIDTH = 140


def methods_as_text(methods: Sequence[Listed], parts: str) -> str:
    """For a reader: formula, places, count, settings of each method. parts: what they are counted on, in words."""
    head = f"Counted on {parts}.\nGive other parts by --model, or --encoder and --language_model, and settings by --methods.NAME.SETTING."
    return "\n\n".join([head, *("\n".join(_method(one)) for one in methods)])


def methods_as_json(methods: Sequence[Listed]) -> str:
    """The same as JSON."""
    return json.dumps([dataclasses.asdict(one) for one in methods], indent=2)


def _method(one: Listed) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in one.counted_with.items()) or "its defaults"
    trained = f"not counted with {settings}: {one.refused}" if one.trained is None else f"{one.trained:,} with {settings}"
    slots = [f"  slots     {', '.join(f'{n} {domain}' for domain, n in one.slots.items())}"] if one.slots else []
    return [
        *_wrapped(f"{one.name:<11} {one.title}", 12),
        *(f"      {line}" for line in one.formula),
        *(f"  {'edits' if i == 0 else '':<9} {edit}" for i, edit in enumerate(one.edits)),
        *slots,
        *_wrapped(f"  trains    {trained}", 12),
        *(line for setting in one.settings for line in _setting(setting)),
    ]


def _setting(setting: Setting) -> list[str]:
    default = "no default" if setting.default is None else f"default {setting.default or repr('')}"
    return _wrapped(f"    {setting.name:<16} {setting.type}, {default}{': ' if setting.about else ''}{setting.about}", 21)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
