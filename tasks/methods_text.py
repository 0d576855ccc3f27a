"""The list of methods on the screen, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from tasks.methods_list import Listed, Setting

__all__ = ["methods_as_json", "methods_as_text"]

WIDTH = 140


def methods_as_text(methods: Sequence[Listed], encoder: str, language_model: str) -> str:
    """For a reader: formula, places, count, settings of each method."""
    head = f"Counted on {language_model} with {encoder}; give other parts by --encoder and --language_model, and settings by --methods.NAME.SETTING."
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
