"""What a search may choose: settings of a run by their whole names, each with its values; and the configs that choices make."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from adalink.errors import ConfigError

__all__ = ["Choices", "Setting", "Space", "check_optuna"]

Choices = Mapping[str, Any]  # what was drawn, by parameter: numbers, exponents of `log2`, indices of `one_of`, 0 or 1 for each of `layers`
Config = dict[str, Any]  # a run's settings, nested as in its YAML file

GROUPS = ("methods", "vision_methods", "connector_methods")
NOT_SEARCHED = ("task", "out", "data.val", "data.search", "train.seed", "train.stop_at")
RATES = "train.learning_rates"  # of single methods
KINDS = "log2, int, log, float, one_of or layers"
N_NEAREST = 3


def check_optuna() -> Any:
    """The library that proposes configurations. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("a search needs Optuna, which is not installed: pip install 'adalink[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting and its values.

    kind     log2: 2^k for whole k from low to high; int, float, log: low to high; one_of: `values`; layers: each of `high` layers on or off
    """

    name: str
    kind: str
    low: float = 0
    high: float = 0
    values: tuple[Any, ...] = ()

    @staticmethod
    def read(name: str, given: Any) -> Setting:
        """From its line of the space. Raises ConfigError where the line has another form, or leaves no value."""
        if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS.replace(" or", ",").split(", "):
            raise ConfigError(f"the space gives {name} as {given!r}: expected one of {KINDS} with its values, such as {{log2: [0, 6]}}")
        ((kind, values),) = given.items()
        if kind == "one_of":
            if not isinstance(values, list) or not values:
                raise ConfigError(f"the space gives {name} one of {values!r}: expected a list with at least one value")
            return Setting(name=name, kind=kind, values=tuple(values))
        if kind == "layers":
            if not isinstance(values, int) or values < 1:
                raise ConfigError(f"the space gives {name} {values!r} layers: expected how many the model has, such as {{layers: 12}}")
            return Setting(name=name, kind=kind, high=values)
        return Setting._range(name, kind, values)

    @staticmethod
    def _range(name: str, kind: str, values: Any) -> Setting:
        is_pair = isinstance(values, list) and len(values) == 2
        try:
            low, high = (float(value) if kind in ("log", "float") else int(value) for value in values) if is_pair else (math.nan, math.nan)
        except (TypeError, ValueError):
            low = high = math.nan
        if math.isnan(low) or math.isnan(high):
            raise ConfigError(f"the space gives {name} as {{{kind}: {values!r}}}: expected two numbers, the least and the greatest")
        if low > high or (kind == "log" and low <= 0):
            raise ConfigError(f"the space gives {name} the range {values!r}, which is empty{' for log' if low <= high else ''}: give the least number first")
        return Setting(name=name, kind=kind, low=low, high=high)

    @property
    def parameters(self) -> tuple[str, ...]:
        """What is drawn for it."""
        return tuple(f"{self.name}[{layer}]" for layer in range(int(self.high))) if self.kind == "layers" else (self.name,)

    @property
    def is_fixed(self) -> bool:
        """Whether it has one value."""
        return len(self.values) == 1 if self.kind == "one_of" else self.kind != "layers" and self.low == self.high

    def distribution(self) -> Any:
        """As Optuna draws each of its parameters."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind in ("one_of", "layers"):
            return CategoricalDistribution(tuple(range(len(self.values))) if self.kind == "one_of" else (0, 1))
        if self.kind in ("log2", "int"):
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.kind == "log")

    def drawn(self, trial: Any, name: str) -> Any:
        """What an Optuna trial proposes for one of its parameters."""
        if self.kind in ("one_of", "layers"):
            return trial.suggest_categorical(name, self.distribution().choices)
        if self.kind in ("log2", "int"):
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.kind == "log")

    def value(self, choices: Choices) -> Any:
        """The setting's value: of layers a list of those that are on, or off where the name says that it excludes."""
        if self.kind == "layers":
            listed = 0 if self.name.rpartition(".")[2].startswith("exclude") else 1
            return [layer for layer, name in enumerate(self.parameters) if choices[name] == listed]
        drawn = choices[self.name]
        return 2**drawn if self.kind == "log2" else self.values[drawn] if self.kind == "one_of" else drawn

    @property
    def method(self) -> str:
        """`methods.lora` of `methods.lora.rank` and of `train.learning_rates.lora`; empty where it is not of a method."""
        group, _, rest = self.name.removeprefix(f"{RATES}.").partition(".")
        if self.name.startswith(f"{RATES}."):
            return f"methods.{group}"
        return f"{group}.{rest.partition('.')[0]}" if group in GROUPS and rest else ""

    @property
    def is_switch(self) -> bool:
        """Whether it turns methods on and off, as in `methods: {one_of: [lora, prefix]}` and `methods.lora: {one_of: [true, false]}`."""
        return self.name in GROUPS or self.name == self.method


@dataclass(frozen=True)
class Space:
    """The settings, in the order in which they are drawn."""

    settings: tuple[Setting, ...]

    @staticmethod
    def read(given: Any, known: Sequence[str]) -> Space:
        """From the content of a space file. known: the names of all settings.

        Raises ConfigError for a setting that does not exist, an empty range, and a space with one configuration.
        """
        if not isinstance(given, Mapping) or not given:
            raise ConfigError("the space names no setting: give settings of a run with their values, such as `methods.lora.rank: {log2: [0, 6]}`")
        settings = [Setting.read(_checked(str(name), known), line) for name, line in given.items()]
        for setting in settings:
            _check_switch(setting)
        if all(setting.is_fixed for setting in settings):
            raise ConfigError(f"the space has one configuration ({', '.join(map(str, given))} with one value each): there is nothing to search")
        return Space(tuple(settings))

    def drawn(self, trial: Any) -> dict[str, Any]:
        """The choices of an Optuna trial; also those of methods that are off, which do not count: TPE models all parameters together."""
        return {name: setting.drawn(trial, name) for setting in self.settings for name in setting.parameters}

    def distributions(self) -> dict[str, Any]:
        """Parameter -> its distribution."""
        return {name: setting.distribution() for setting in self.settings for name in setting.parameters}

    def values(self, choices: Choices) -> dict[str, Any]:
        """Setting -> its value, of those that count: the rank of a method that is off does not."""
        return {one.name: one.value(choices) for one in self.settings if one.is_switch or self._is_on(one.method, choices)}

    def off(self, choices: Choices) -> list[str]:
        """The methods that are not trained."""
        return [method for method in self._methods() if not self._is_on(method, choices)]

    def key(self, choices: Choices) -> str:
        """The same for two choices that make the same config."""
        return json.dumps([self.values(choices), self.off(choices)], sort_keys=True)

    def config(self, base: Config, choices: Choices) -> Config:
        """The base config with the values that were drawn, without the methods that are off."""
        found = copy.deepcopy(base)
        for name, value in self.values(choices).items():
            if name in GROUPS or (name.count(".") == 1 and name.partition(".")[0] in GROUPS):
                continue
            *groups, last = name.split(".")
            place = found
            for group in groups:
                if not isinstance(place.get(group), dict):
                    place[group] = {}
                place = place[group]
            place[last] = value
        for method in self._methods():
            group, _, name = method.partition(".")
            methods = found.setdefault(group, {})
            if not self._is_on(method, choices):
                methods.pop(name, None)
                if group == "methods":
                    found.get("train", {}).get("learning_rates", {}).pop(name, None)
            elif methods.get(name) is None:
                methods[name] = {}
        return found

    def _methods(self) -> list[str]:
        """Every method that a setting is of, or a switch turns on."""
        named = [f"{one.name}.{name}" for one in self.settings if one.name in GROUPS for value in one.values for name in _listed(value)]
        return list(dict.fromkeys([*named, *(one.method for one in self.settings if one.method)]))

    def _is_on(self, method: str, choices: Choices) -> bool:
        """Whether a method is trained, by the switches and layers that were drawn; one with no layer left is none."""
        if not method:
            return True
        group, _, name = method.partition(".")
        for one in self.settings:
            if one.name == group and one.values and name in self._switched(one) and name not in _listed(one.value(choices)):
                return False
            if one.name == method and not one.value(choices):
                return False
            if one.kind == "layers" and one.method == method and not any(choices[name] for name in one.parameters):
                return False
        return True

    @staticmethod
    def _switched(setting: Setting) -> set[str]:
        return {name for value in setting.values for name in _listed(value)}


def _listed(value: Any) -> list[str]:
    """The methods of a choice: one by its name, or several in a list."""
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _checked(name: str, known: Sequence[str]) -> str:
    """The name of a setting that may be searched. Raises ConfigError."""
    if name in NOT_SEARCHED or any(name.startswith(f"{one}.") for one in NOT_SEARCHED):
        raise ConfigError(f"the space names {name}, which is the same in every trial: leave it out")
    groups = set(_groups(known))
    inner = any(name.startswith(f"{leaf}.") for leaf in known if not leaf.startswith(GROUPS))  # a name in a setting of names with values
    is_switch = name in GROUPS or (name in groups and name.partition(".")[0] in GROUPS)
    if name in known or inner or is_switch:
        return name
    near = get_close_matches(name, [*known, *groups], n=1, cutoff=0.5)
    advice = f"the nearest is {near[0]}" if near else "see `adalink train --help.all`"
    raise ConfigError(f"the space names {name}, and a run has no such setting: {advice}")


def _check_switch(setting: Setting) -> None:
    """Raise ConfigError where a switch of methods is no list of names, or of true and false."""
    if setting.name in GROUPS and setting.kind != "one_of":
        raise ConfigError(f"the space gives {setting.name} as {setting.kind}: expected names of methods, such as {{one_of: [lora, prefix]}}")
    if setting.is_switch and setting.name not in GROUPS and not (setting.kind == "one_of" and all(isinstance(one, bool) for one in setting.values)):
        raise ConfigError(f"the space gives {setting.name}, which is a method: expected {{one_of: [true, false]}}, and settings as {setting.name}.NAME")


def _groups(known: Sequence[str]) -> Iterator[str]:
    """Every name with settings under it."""
    for name in known:
        parts = name.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts)))
