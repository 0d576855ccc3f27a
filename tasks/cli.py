"""The command line: `adalink train --config run.yaml`, and what comes before and after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from adalink.errors import AdalinkError, ConfigError, TerminatedError
from adalink.siblings import load_siblings
from tasks.config_file import ConfigFile
from tasks.say import one_sentence, worker_sentence

if TYPE_CHECKING:
    from tasks.commands import Command

__all__ = ["main"]


_WHAT = """Adapt frozen vision and language models to captioning and visual question answering. On several GPUs or nodes:
adalink launch [OPTIONS OF accelerate launch] -- COMMAND ..."""


class _Refused(ConfigError):
    """What the parser says about the arguments, in its own words."""


class _Parser(ArgumentParser):  # type: ignore[misc]  # untyped here
    """Raises where the library would print and exit: a message of a nested parser then names the whole setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was said."""
        raise _Refused(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 2 something that the user can mend, 130 an interrupt, 143 an end that SIGTERM asked for."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [_underscored(argument) for argument in given]
    command = ""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and worker processes do not mix
    try:
        load_siblings()  # PYTHONPATH may hold another `multimodal`
        if given[:1] == ["launch"]:  # its options are accelerate's
            from tasks.launch import launch

            return launch(given[1:])
        # Late: torch and transformers take seconds to import, and a user may interrupt them.
        from tasks.commands import UNNAMED, commands_for
        from tasks.sweep import swept

        if sweep := swept(arguments):
            return sweep.train(main, "--dry_run" in arguments)
        parser = _new_parser()
        commands = commands_for(arguments)
        _add(parser, commands)
        arguments = _named(arguments, commands, UNNAMED)
        command = _words(arguments, commands)
        chosen = parser.parse_args(arguments or ["--help"])
        _run(parser, chosen, commands)
    except _Refused as error:
        from tasks.config import setting_names

        has_settings = command in ("train", "evaluate", "features", "compose", "methods")
        sentence = one_sentence(str(error), command=command, known=setting_names() if has_settings else ())
        print(f"adalink: {sentence}; `adalink {command + ' ' if command else ''}--help` lists what there is", file=sys.stderr)
        return 2
    except TerminatedError as error:
        print(f"adalink: {error}", file=sys.stderr)
        return error.exit_code
    except AdalinkError as error:
        print(f"adalink: {worker_sentence(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adalink: interrupted", file=sys.stderr)
        return 130
    return 0


def entry() -> NoReturn:
    """The console script. A reader that has seen enough (`adalink methods | head`) ends it without a word, as 128 + SIGPIPE."""
    os.environ["WDS_SECURE"] = "1"  # webdataset, should anything import it, then opens no pipe and unpickles nothing
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        code = 141
    sys.exit(code)


def _underscored(argument: str) -> str:
    """--image-name=x_{a-b} -> --image_name=x_{a-b}: either spelling of a setting is understood."""
    name, separator, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + separator + value


def _named(arguments: list[str], commands: Mapping[str, Command | Mapping[str, Command]], unnamed: Mapping[str, str]) -> list[str]:
    """`compare A B` -> `compare runs A B`: the command of a group that may be left out, put in where it was."""
    group, rest = arguments[:1], arguments[1:]
    if not group or group[0] not in unnamed or not rest or rest[0] in commands[group[0]] or rest[0] in ("-h", "--help"):  # type: ignore[operator]
        return arguments
    return [*group, unnamed[group[0]], *rest]


def _new_parser() -> _Parser:
    """Without commands. A config may come from anybody, and an import runs code: no setting imports anything but the classes of a config."""
    from tasks.config import class_paths

    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=class_paths())
    parser = _Parser(prog="adalink", description=_WHAT)
    parser.add_argument("--version", action="version", version=f"adalink {_version()}")
    return parser


def _add(parser: _Parser, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND", dest="command")
    for name, command in commands.items():
        if isinstance(command, Mapping):
            group = _Parser(description=f"{name}: {', '.join(command)}")
            subcommands.add_subcommand(name, group, help=" | ".join(command))
            _add(group, command)  # after its own level: jsonargparse adds them in order
            continue
        sub = _Parser(description=command.help)
        if command.has_config:
            sub.add_argument("--config", action=ConfigFile, help="a YAML file of the settings below; what stands after it on the command line wins")
        command.add(sub)
        subcommands.add_subcommand(name, sub, help=command.help)


def _words(arguments: Sequence[str], commands: Mapping[str, Command | Mapping[str, Command]]) -> str:
    """The words of the command that the arguments begin with: `train`, `shards coco`; empty where there is none."""
    words: list[str] = []
    found: Command | Mapping[str, Command] | Mapping[str, Command | Mapping[str, Command]] = commands
    for argument in arguments:
        if not isinstance(found, Mapping) or argument not in found:
            break
        words.append(argument)
        found = found[argument]
    return " ".join(words)


def _run(parser: _Parser, chosen: Any, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    words = [chosen.command]
    command, text = commands[chosen.command], chosen[chosen.command]
    if isinstance(command, Mapping):
        words.append(text.command)
        command, text = command[text.command], text[text.command]
    if command.has_config:
        from tasks.config import check_groups

        command.prepare(text)
        check_groups(text)
    try:
        values = parser.instantiate(chosen)
    except (TypeError, ValueError) as error:  # a method that refuses its values, wrapped by the parser
        raise ConfigError(one_sentence(str(error))) from None
    for word in words:
        values = values[word]
    command.run(values, text)


def _version() -> str:
    from importlib.metadata import version

    return version("adalink")


if __name__ == "__main__":
    entry()
