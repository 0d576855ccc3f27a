"""The command line: `adalink train --config run.yaml`, and what comes before and after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from adalink.errors import AdalinkError, ConfigError
from tasks.say import one_sentence

if TYPE_CHECKING:
    from tasks.commands import Command

__all__ = ["main"]


class _Parser(ArgumentParser):  # type: ignore[misc]  # untyped here
    """Says what is wrong with the arguments in one sentence, and where the help is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with 2."""
        print(f"adalink: {one_sentence(message)}; `{self.prog.split(' [')[0]} --help` lists what there is", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 2 something that the user can mend, 130 an interrupt."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and worker processes do not mix
    try:
        from tasks.commands import COMMANDS  # late: it imports torch and transformers, and a wrong name need not wait for them

        parser = _Parser(prog="adalink", description="Adapt frozen vision and language models to captioning and visual question answering.")
        parser.add_argument("--version", action="version", version=f"adalink {_version()}")
        _add(parser, COMMANDS)
        chosen = parser.parse_args(arguments or ["--help"])
        _run(parser, chosen, COMMANDS)
    except AdalinkError as error:
        print(f"adalink: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adalink: interrupted", file=sys.stderr)
        return 130
    return 0


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main())


def _add(parser: _Parser, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND", dest="command")
    for name, command in commands.items():
        if isinstance(command, Mapping):
            group = _Parser(description=f"{name}: {', '.join(command)}")
            _add(group, command)
            subcommands.add_subcommand(name, group, help=" | ".join(command))
            continue
        sub = _Parser(description=command.help)
        if command.has_config:
            sub.add_argument("--config", action=ActionConfigFile, help="a YAML file of the settings below; what stands after it on the command line wins")
        command.add(sub)
        subcommands.add_subcommand(name, sub, help=command.help)


def _run(parser: _Parser, chosen: Any, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    try:
        values, text = parser.instantiate(chosen), chosen
    except (TypeError, ValueError) as error:  # a method that refuses its values, wrapped by the parser
        raise ConfigError(one_sentence(str(error))) from None
    name = values.command
    command, values, text = commands[name], values[name], text[name]
    if isinstance(command, Mapping):
        command, values, text = command[values.command], values[values.command], text[values.command]
    command.run(values, text)


def _version() -> str:
    from importlib.metadata import version

    return version("adalink")


if __name__ == "__main__":
    entry()
