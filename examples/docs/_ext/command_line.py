"""Reference pages that are made while the documentation is built: the help of every command, and tables of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tasks.commands import COMMANDS
from tasks.runs.help import comments_as_help


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("command-help", CommandHelp)
    app.add_directive("every-command", EveryCommand)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}


class CommandHelp(SphinxDirective):
    """What a command prints with --help, or with the options given: `{command-help} train`."""

    optional_arguments, final_argument_whitespace = 1, True
    option_spec: ClassVar = {"options": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """The text as it is."""
        words = [*"".join(self.arguments).split(), *self.options.get("options", "--help").split()]
        text = _printed(words)
        if not text:
            raise self.error(f"`adalink {' '.join(words)}` printed nothing")
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


class EveryCommand(SphinxDirective):
    """A section for each command there is, with its help."""

    def run(self) -> list[nodes.Node]:
        """The sections, from Markdown."""
        text = "\n\n".join(f"## adalink {words}\n\n```{{command-help}} {words}\n```" for words in _commands(COMMANDS))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Settings(SphinxDirective):
    """A table of a dataclass's fields: `{settings} tasks.runs.config.RunConfig`, with `:prefix:` for the name of the group."""

    required_arguments = 1
    option_spec: ClassVar = {"prefix": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """The table, from Markdown."""
        module, _, name = self.arguments[0].rpartition(".")
        prefix, found = self.options.get("prefix", ""), _fields(getattr(import_module(module), name))
        rows = [f"| `{prefix}{field}` | {default} | {meaning} |" for field, default, meaning in found]
        return self.parse_text_to_nodes("\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]))


def _commands(group: Mapping[str, Any]) -> Iterator[str]:
    """`train`, `shards folder`: all but `launch`, whose options are another program's."""
    for name, found in group.items():
        yield from (f"{name} {inner}" for inner in _commands(found)) if isinstance(found, Mapping) else [name] if name != "launch" else []


def _printed(words: list[str]) -> str:
    """What a command prints, in lines of at most 100 columns."""
    from tasks.cli import main

    os.environ["COLUMNS"] = "100"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    return "".join(letter for letter in out.getvalue() if letter.isprintable() or letter == "\n").rstrip()


def _fields(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each setting that is one value; groups of settings have tables of their own."""
    comments_as_help(kind)
    lines = (kind.__doc__ or "").partition("\nArgs:\n")[2].splitlines()
    meanings = {name: meaning for name, _, meaning in (line.strip().partition(": ") for line in lines)}
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
            continue
        default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            shown = "<br>".join(f"{name}: `{value}`" for name, value in vars(default).items())
        elif default is dataclasses.MISSING:
            shown = ""
        else:
            shown = f"`{'none' if default is None else default if default != '' else '(empty)'}`"
        yield field.name, shown, meanings.get(field.name, "").replace("|", "\\|").replace("<", "&lt;")
