"""A sweep: `adalink train ... --train.learning_rate 1e-3,3e-3` trains one run for each value, each in a folder of its own."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adalink.errors import ConfigError
from tasks.config import number_settings

__all__ = ["Sweep", "swept"]


@dataclass(frozen=True)
class Sweep:
    """Arguments of one run after the other, and the folder that each trains into."""

    runs: tuple[tuple[tuple[str, ...], Path], ...]

    def train(self, run: Callable[[Sequence[str]], int], is_dry: bool) -> int:
        """The exit code of the first run that fails, and 0 where all have trained and stand in a table; `run` is the command line."""
        for arguments, out in self.runs:
            print(f"sweep: {out}")
            if code := run(arguments):
                return code
        folders = [str(out) for _, out in self.runs]
        return 0 if is_dry or len(folders) < 3 else run(["compare", *folders])


def swept(arguments: Sequence[str]) -> Sweep | None:
    """The runs of a sweep; None where no setting has several values.

    Several values are written with commas and no brackets, for settings that are one number: `--train.betas [0.9,0.999]` is one value, and
    so is any text with a comma. Two such settings give every pair. Raises ConfigError where no run folder is given, or a value is missing.
    """
    if arguments[:1] != ["train"]:
        return None
    numbers = set(number_settings())
    found = {at: (name, value.split(",")) for at, name, value in _given(arguments) if name in numbers and "," in value and value[:1] not in "[{('\""}
    if not found:
        return None
    for name, values in found.values():
        if not all(part.strip() for part in values):
            raise ConfigError(f"--{name} is {','.join(values)}: one of the values between its commas is empty; write them as 1e-3,3e-3")
    out = _out(arguments)
    runs = []
    for chosen in itertools.product(*([part.strip() for part in values] for _, values in found.values())):
        one, labels = list(arguments), []
        for (at, (name, _)), value in zip(found.items(), chosen, strict=True):
            one[at] = f"--{name}={value}" if one[at].startswith("--") else value
            labels.append(f"{name.rpartition('.')[2]}={value}")
        folder = out / ",".join(labels)
        runs.append(((*one, "--out", str(folder)), folder))
    return Sweep(tuple(runs))


def _given(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(place of the value, name, value) of every setting."""
    for at, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if equals:
            yield at, name, value
        elif at + 1 < len(arguments) and not arguments[at + 1].startswith("--"):
            yield at + 1, name, arguments[at + 1]


def _out(arguments: Sequence[str]) -> Path:
    """The run folder, on the command line or in its config."""
    given: dict[str, Any] = {}
    for _, name, value in _given(arguments):
        if name == "config":
            try:
                read: Any = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):  # the run itself says what is wrong with it
                continue
            given |= {"out": read["out"]} if isinstance(read, dict) and read.get("out") else {}
        elif name == "out":
            given["out"] = value
    if not given:
        raise ConfigError("a sweep needs `out`, the folder in which each run gets one of its own: give --out")
    return Path(typing.cast("str", given["out"]))
