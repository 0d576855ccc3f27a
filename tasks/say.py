"""Messages of the argument parser, made into one sentence: what is wrong, what was found, what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ["one_sentence", "worker_sentence"]

N_LISTED = 12  # settings in one message

_UNKNOWN = (
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|does not accept option '(?P<nested>[^']+)'"
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


def one_sentence(message: str, *, command: str = "", known: Sequence[str] = ()) -> str:
    """The parser's message in one line, with the whole name of the setting; what a validation of ours said is kept as it is.

    command   the words of the command, which the parser writes before some names: `shards coco`
    known     the names of all settings, for the nearest to an unknown one
    """
    # Outermost first; a message about one setting may name it twice.
    path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    if found := re.search(_UNKNOWN, message):
        name = next(value for value in found.groups() if value)
        return _unknown(f"{path}.{name}".strip(".") if found["option"] else name, known)
    if found := re.search(r"unrecognized arguments: (.+)", message):
        return f"{found[1]} stands where nothing more is expected"
    if found := re.search(r"following arguments are required: (.+)", message):
        names = [f"{path}.{name}".strip(".").removeprefix(command.replace(" ", ".") + ".") for name in found[1].split(", ")]
        return f"{', '.join(names)} {'is not given, and has' if len(names) == 1 else 'are not given, and have'} no default"
    if found := re.search(r"Importing '(.+?)' is not allowed", message):
        return f"{path} names the class {found[1]}, and a setting imports nothing: give a method of the package, such as adalink.LoRA"
    if found := re.search(r"argument (\S+): expected (?:one|at least one) argument", message):
        return f"{found[1]} stands without a value: write one after it"
    if found := re.search(r"invalid choice: (\S+) \(choose from (.+)\)", message):
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
    if elsewhere := [whole for whole in known if whole.split(".")[-1] == parts[-1] and depth == len(parts)]:
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
