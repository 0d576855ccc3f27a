"""The command line's parser: which command is meant, its options and config file, and what is wrong with them in one sentence."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from adalink.errors import AdalinkError, ConfigError, TerminatedError
from adalink.siblings import load_siblings
from tasks.commands import COMMANDS, NEEDS_NOTHING, UNNAMED, Command, Entry

__all__ = ["ConfigFile", "check_config_file", "main", "one_sentence", "parsed", "worker_sentence"]

WIDTH = 100  # columns of a help text

N_LISTED = 12  # settings in one message

_UNKNOWN = (
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<nested>[^']+)'"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+)"
)
_NO_GROUP = (
    r"dot import path string: (?P<text>.+)"
    r"|Unable to load config ['\"](?P<file>.+?)['\"]"
    r"|valid subclass of [^$]+Given value: (?P<value>.+)"
)
_KINDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "tuple": "a list", "list": "a list",
    "dict": "names with values",
}  # fmt: skip

_WHAT = """Adapt frozen vision and language models to captioning and visual question answering."""


class _Refused(ConfigError):
    """What the parser says about the arguments, in its own words."""


class _Parser(ArgumentParser):  # type: ignore[misc]  # untyped here
    """Raises where the library would print and exit: a message of a nested parser then names the whole setting."""

    is_for_help = False  # it will only be asked what the options are, and needs no types that take long to import

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the parser's message."""
        raise _Refused(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 2 something to mend, 3 a score beyond a given limit, 130 an interrupt, 143 an end that SIGTERM asked for."""
    given = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and worker processes do not mix
    words: list[str] = []
    has_settings = False
    try:
        load_siblings()  # PYTHONPATH may hold another `multimodal`
        words, entry, rest = _divided(_with_present_name(given))
        if isinstance(entry, Mapping):
            _without_command(words, entry, rest)
        command = entry.load()
        has_settings = command.has_config
        if (help_asked := _help_asked(rest)) is not None:
            _print_help(words, entry, command, is_short=help_asked == "short")
            raise SystemExit(0)
        if command.bare is not None:
            return command.bare(rest)
        arguments = _with_paths(words, [_underscored(argument) for argument in rest])
        if words == ["train"]:
            from tasks.commands.train import swept

            if sweep := swept(["train", *arguments]):
                return sweep.train(main, "--dry_run" in arguments)
        command, plain, values = _parsed(words, command, arguments)
        command.run(values, plain)
    except _Refused as error:
        from tasks.runs.config import setting_names

        sentence = one_sentence(str(error), known=setting_names() if has_settings else ())
        print(f"adalink: {sentence}; `{' '.join(['adalink', *words])} --help` lists what there is", file=sys.stderr)
        return 2
    except TerminatedError as error:
        print(f"adalink: {error}", file=sys.stderr)
        return error.exit_code
    except AdalinkError as error:
        print(f"adalink: {worker_sentence(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("adalink: interrupted", file=sys.stderr)
        return 130
    return 0


def _divided(arguments: list[str]) -> tuple[list[str], Entry | Mapping[str, Any], list[str]]:
    """(words of the command, the command or the group that they end in, what follows): `compare A B` -> (compare, runs), ..., (A, B)."""
    words: list[str] = []
    found: Entry | Mapping[str, Any] = COMMANDS
    rest = list(arguments)
    while isinstance(found, Mapping) and rest and rest[0] in found:
        words.append(rest.pop(0))
        found = found[words[-1]]
    is_whole = bool(rest) or (words and words[0] in NEEDS_NOTHING)
    if isinstance(found, Mapping) and words and words[0] in UNNAMED and is_whole and rest[:1] not in (["-h"], ["--help"]):
        words.append(UNNAMED[words[0]])
        found = found[words[-1]]
    return words, found, rest


def _without_command(words: Sequence[str], group: Mapping[str, Entry | Mapping[str, Entry]], rest: Sequence[str]) -> NoReturn:
    """Print help or the version, and exit as the parser does. Raises ConfigError where a command is misspelt or missing."""
    if rest[:1] == ["--version"] and not words:
        from importlib.metadata import version

        print(f"adalink {version('adalink')}")
    elif rest[:1] in (["-h"], ["--help"]) or not (words or rest):
        print(_commands_help(words, group))
    elif rest and rest[0].startswith("-"):
        raise _Refused(f"unrecognized arguments: {rest[0]}")
    else:
        given = repr(rest[0]) if rest else f"after {words[-1]!r}"
        raise _Refused(f"invalid choice: {given} (choose from {', '.join(map(repr, group))})")
    raise SystemExit(0)


def _commands_help(words: Sequence[str], group: Mapping[str, Entry | Mapping[str, Entry]]) -> str:
    width = max(map(len, group))
    lines = [f"  {name:<{width}}  {entry.help if isinstance(entry, Entry) else ' | '.join(entry)}" for name, entry in group.items()]
    start = " ".join(["adalink", *words])
    about = [] if words else [_WHAT, ""]
    return "\n".join([f"usage: {start} COMMAND ...", "", *about, "commands:", *lines, "", f"`{start} COMMAND --help` lists what a command takes."])


def parsed(arguments: Sequence[str]) -> tuple[Command, Any, Any]:
    """(command, its plain values, the same as objects) of a whole command line. Raises ConfigError where it is wrong, or names no command."""
    words, entry, rest = _divided(list(arguments))
    if isinstance(entry, Mapping):
        raise ConfigError(f"{' '.join(arguments)!r} names no command: expected one of {', '.join(entry)}")
    return _parsed(words, entry.load(), _with_paths(words, [_underscored(argument) for argument in rest]))


def _parsed(words: Sequence[str], command: Command, arguments: list[str]) -> tuple[Command, Any, Any]:
    if command.dry and "--dry_run" in arguments:
        command = command.dry
    _allow_imports(command)
    parser = _new_parser(words, command)
    plain = parser.parse_args(arguments)
    if command.has_config:
        from tasks.runs.config import check_groups

        command.prepare(plain)
        check_groups(plain)
    try:
        return command, plain, parser.instantiate(plain)
    except (TypeError, ValueError) as error:  # a method that refuses its values, wrapped by the parser
        raise ConfigError(one_sentence(str(error))) from None


def _new_parser(words: Sequence[str], command: Command, *, about: str = "", is_for_help: bool = False) -> _Parser:
    parser = _Parser(prog=" ".join(["adalink", *words]), description=about)
    parser.is_for_help = is_for_help
    if command.has_config:
        parser.add_argument("--config", action=ConfigFile, help="a YAML file of the settings below; what stands after it on the command line wins")
    command.add(parser)
    return parser


def _allow_imports(command: Command) -> None:
    """A config may come from anybody, and an import runs code: no setting imports anything but the classes of a config."""
    allowed = list(command.classes)
    if command.has_config:
        from tasks.runs.config import class_paths

        allowed = class_paths()
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)


def _help_asked(arguments: Sequence[str]) -> Literal["short", "all"] | None:
    """Which help is asked for, before `--`."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "all" if "--help.all" in own else "short" if {"-h", "--help"} & set(own) else None


def _print_help(words: Sequence[str], entry: Entry, command: Command, *, is_short: bool) -> None:
    """The options that most people set, or with `--help.all` every one; then examples."""
    start = " ".join(["adalink", *words])
    if command.bare is not None and not is_short:
        command.bare(["--help"])
        return
    parser = _new_parser(words, command, about=entry.help, is_for_help=True)
    text = _short_help(parser, command, start, entry.help) if is_short else parser.format_help().rstrip()
    print("\n".join([text, "", "examples:", *(f"  {line}" for line in command.examples)]))


def _short_help(parser: _Parser, command: Command, start: str, about: str) -> str:
    options = {action.dest: action for action in parser._actions if action.help != SUPPRESS and action.dest not in ("help", "print_config")}
    displayed = command.first or tuple(name for name, action in options.items() if not _is_group(action))
    rows = [one if isinstance(one, tuple) else _option(options[one]) for one in displayed]
    usage = " ".join(["usage:", start, "[OPTIONS]", *(_shape(action) for action in parser._get_positional_actions())])
    width = min(max(len(name) for name, _ in rows), 34)
    is_whole = [isinstance(one, tuple) or not command.first for one in displayed]
    lines = [line for (name, text), whole in zip(rows, is_whole, strict=True) for line in _row(name, text, width, is_whole=whole)]
    more = ["", f"`{start} --help.all` lists every one."] if command.first else []
    return "\n".join([usage, "", *textwrap.wrap(about, WIDTH), "", "options:", *lines, *more])


def _is_group(action: Action) -> bool:
    """A group of settings as a whole, given as a file."""
    return (action.help or "").startswith("Path to a configuration file")


def _shape(action: Action) -> str:
    name = str(action.metavar or action.dest.upper())
    return f"{name} ..." if action.nargs in ("+", "*") and not name.endswith("...") else name


def _option(action: Action) -> tuple[str, str]:
    """(--train.steps STEPS, what it is, with its default)."""
    about = re.sub(r"\s*\((?:required, )?type: .*\)$|\s*\(default: %\(default\)s\)$", "", " ".join((action.help or "").split()))
    default = getattr(action, "default", None)
    is_named = default not in (None, False, "", (), [], {}) and isinstance(default, (int, float, str, Path))
    about += f" (default: {default})" if is_named and default is not True else ""
    if not action.option_strings:
        return _shape(action), about
    values = "" if action.nargs == 0 else action.metavar or _values(action)
    return f"{action.option_strings[0]} {values}".strip(), about


def _values(action: Action) -> str:
    """`N`, `PATH`, `{no,bf16,fp16}`: what stands after the option, by its type."""
    hint: Any = getattr(action, "_typehint", action.type)
    inner = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is not Literal and len(inner) == 1:  # an optional one
        hint, inner = inner[0], list(get_args(inner[0]))
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    return {int: "N", float: "NUMBER", Path: "PATH", bool: "{true,false}"}.get(hint, action.dest.rpartition(".")[2].upper())


def _row(name: str, text: str, width: int, *, is_whole: bool) -> Iterator[str]:
    """The lines of an option. Texts that are not whole end at a semicolon where they are longer than a line."""
    room = WIDTH - width - 4
    if not is_whole and len(text) > room:
        about, default = re.fullmatch(r"(.*?)( \(default: .*\))?", text).groups("")  # type: ignore[union-attr]
        text = about.partition("; ")[0] + default
    first, *rest = textwrap.wrap(text, room) or [""]
    if len(name) > width:
        yield f"  {name}"
        rest, name = [first, *rest], ""
        first, *rest = rest
    yield f"  {name:<{width}}  {first}".rstrip()
    for line in rest:
        yield f"  {'':<{width}}  {line}"


# Settings of version 0.1 that have another name now; and commands, with the option that gave what is their first argument now.
RENAMED = {"--limits.cached_pictures": "--limits.cached_images"}
RENAMED_COMMANDS: Mapping[tuple[str, ...], str] = {("shards", "coco"): "--annotations", ("shards", "vqa"): "--questions", ("shards", "folder"): "--images"}


def _with_present_name(arguments: list[str]) -> list[str]:
    """`shards coco --annotations A --images I` -> `shards from A --images I`, for one version more."""
    option = RENAMED_COMMANDS.get(tuple(arguments[:2]))
    if option is None:
        return arguments
    print(f"adalink: `{' '.join(arguments[:2])}` is now `shards from PATH`; the old name goes with the next version", file=sys.stderr)
    rest = [one.removeprefix(f"{option}=") for one in arguments[2:] if one != option]
    return ["shards", "from", *rest]


def _underscored(argument: str) -> str:
    """--image-name=x_{a-b} -> --image_name=x_{a-b}: either spelling of a setting is understood, and for one version more its old name."""
    name, separator, value = argument.partition("=")
    name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
    if name in RENAMED:
        print(f"adalink: {name} is now {RENAMED[name]}; the old name goes with the next version", file=sys.stderr)
    return RENAMED.get(name, name) + separator + value


# ----------------------------------------
# A data set that is one path: `--data.train captions.csv` is `--data.train.path captions.csv`, in a config file too.

_DATA_SETS = ("--data.train", "--data.val", "--data.search", "--val", "--unlabelled")
_DATA_SETS_OF = {"compress": ("--search",), "port": ("--data",)}  # what is another thing elsewhere
_SETTINGS = (".yaml", ".yml")  # such a file holds settings of a data set, and is none


def _with_paths(words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The arguments with `.path` after the name of a data set that is given by its path alone."""
    found, names = [], (*_DATA_SETS, *_DATA_SETS_OF.get("".join(words), ()))
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        value = value if equals else arguments[at + 1] if at + 1 < len(arguments) else ""
        found.append(f"{name}.path{argument[len(name) :]}" if name in names and _is_path(value) else argument)
    return found


def _is_path(value: object) -> bool:
    """Whether the value of a data set is a path, and not settings (`{shards: shards/train}`) or a file of them."""
    return isinstance(value, str) and value not in ("", "null") and not value.lstrip().startswith(("{", "--")) and not value.endswith(_SETTINGS)


def _settings_text(path: Path) -> str:
    """A config file's settings, where a data set is a path with `path` before it."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = settings.get("data")
    if isinstance(data, dict):
        settings["data"] = {split: {"path": value} if _is_path(value) else value for split, value in data.items()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class ConfigFile(ActionConfigFile):  # type: ignore[misc]  # untyped here
    """The option `--config`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Check the file, then take its settings."""
        check_config_file(Path(values))
        super().__call__(parser, cfg, _settings_text(Path(values)), option_string)


def check_config_file(path: Path) -> None:
    """Raises ConfigError, with line and column, where the file is missing, is no YAML, holds no names, or one of them twice."""
    try:
        text = path.read_text(encoding="utf-8")
        yaml.safe_load(text)  # refuses tags that would make objects
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"the config {path} does not exist: check the path") from None
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read ({error.strerror}): give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config {path} is not text in UTF-8 ({error.reason} at byte {error.start}): give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        place = f" at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}" if error.problem_mark else ""
        raise ConfigError(f"the config {path} is not YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the config {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, yaml.MappingNode):
        found = "nothing" if tree is None else "a list" if isinstance(tree, yaml.SequenceNode) else "one value"
        raise ConfigError(f"the config {path} holds {found}: expected names with values, such as `task: captioning`")
    for name, line in _twice(tree):
        raise ConfigError(f"the config {path} gives {name!r} a second time at line {line}: keep one of them")


def _twice(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """(name, line) of every name that stands twice in one mapping; YAML would take the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key.value, key.start_mark.line + 1
                seen.add(key.value)
            yield from _twice(value)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item)


def one_sentence(message: str, *, known: Sequence[str] = ()) -> str:
    """The parser's message in one line, with the whole name of the setting; the message of a validation of ours stays as it is.

    known: the names of all settings, for the nearest to an unknown one
    """
    # Outermost first; a message about one setting may name it twice.
    path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    if found := re.search(_UNKNOWN, message):
        name = ".".join(value for value in found.groups() if value)
        if not path and found["option"] and any(whole.startswith(f"{name}.") for whole in known):  # a setting there is, and yet not where it stands
            from multimodal.training.settings import Stage

            return f"{name} is no setting of an item of train.stages: an item has {', '.join(Stage.__dataclass_fields__)}"
        return _unknown(f"{path}.{name}".strip(".") if found["option"] else name, known)
    if found := re.search(r"unrecognized arguments: (.+)", message):
        return f"{found[1]} stands where nothing more is expected"
    if found := re.search(r"following arguments are required: (.+)", message):
        names = [f"{path}.{name}".strip(".") for name in found[1].split(", ")]
        return f"{', '.join(names)} {'is not given, and has' if len(names) == 1 else 'are not given, and have'} no default"
    if found := re.search(r"Importing '(.+?)' is not allowed", message):
        return f"{path} names the class {found[1]}, and a setting imports nothing: give a method of the package, such as adalink.LoRA"
    if found := re.search(r"argument (\S+): expected (?:one|at least one) argument", message):
        return f"{found[1]} stands without a value: write one after it"
    if found := re.search(r"invalid choice: (.+) \(choose from (.+)\)", message):
        return f"there is no command {found[1]}: give one of {found[2]}"
    if found := re.search(_NO_GROUP, message):
        given = next(value for value in found.groups() if value)
        return f"{path} is {given}: expected settings by name under it, such as --{path}.NAME VALUE"
    return _expected(path, message) or _ours(message)


def worker_sentence(message: str) -> str:
    """The error itself, where a worker process of the data loader passed it on with its whole traceback; other messages as they are."""
    if "Original Traceback" not in message:
        return message
    last = message.strip().splitlines()[-1]
    return last.partition(": ")[2] or last


def _unknown(name: str, known: Sequence[str]) -> str:
    """The part of the name up to where it leaves the tree of settings, with the nearest or with what there is at that place."""
    parts = name.split(".")
    branches = {whole[:end] for whole in known for end in range(len(whole) + 1) if whole[end : end + 1] in ("", ".")}
    depth = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) not in branches), len(parts))
    group, wrong = ".".join(parts[: depth - 1]), parts[depth - 1]
    here = dict.fromkeys(whole[len(group) :].lstrip(".").split(".")[0] for whole in known if not group or whole.startswith(group + "."))
    sentence = f"there is no setting {'.'.join(parts[:depth])}"
    other = [whole for whole in known if not group or "methods." in group or "methods." not in whole]  # who names another group means no method
    if elsewhere := [whole for whole in other if whole.split(".")[-1] == parts[-1] and depth == len(parts)]:
        return f"{sentence}: it is {' or '.join(elsewhere)}"
    if near := get_close_matches(wrong, here, n=1):
        return f"{sentence}: the nearest is {'.'.join([*parts[: depth - 1], near[0]])}"
    listed = ", ".join(list(here)[:N_LISTED]) + (", ..." if len(here) > N_LISTED else "")
    return sentence + (f": {f'under {group} there are' if group else 'there are'} {listed}" if here else "")


def _expected(path: str, message: str) -> str:
    """A value of the wrong type; empty where the message is about something else."""
    wanted = [kind for kind in re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE) if "NoneType" not in kind]
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    if not path or not wanted or value is None:
        return ""
    if choices := re.match(r"typing\.Literal\[(.+)\]", wanted[0]):
        return f"{path} is {value[1]}: expected one of {choices[1]}"
    kind = re.match(r"<class '(\w+)'>", wanted[0])
    return f"{path} is {value[1]}: expected {_KINDS.get(kind[1], kind[1]) if kind else f'a {wanted[0]}'}"


def _ours(message: str) -> str:
    """A dataclass of ours that refuses its values says so in a sentence of its own, somewhere among the parser's lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in lines:
        if re.match(r"- .{25,}", line) and "Problem with given" not in line and "Expected a <class" not in line:
            return line[2:]
    return " ".join(lines)[:400]
