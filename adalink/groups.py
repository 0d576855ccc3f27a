"""Groups of a method: one set of weights each, for the tokens of some domains (Context-PEFT's routing)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from adalink.errors import ConfigError
from adalink.tokens import ANSWER, DOMAIN_NAMES, N_DOMAINS, TEXT

__all__ = ["DOMAINS", "checked_groups", "domains_of", "every_token", "for_group", "per_group"]

# What a group may name. Text is the prompt's and the answer's, as published; `all` is every domain there is.
DOMAINS: Mapping[str, tuple[int, ...]] = {
    **{name: (domain,) for name, domain in DOMAIN_NAMES.items()},
    "text": (TEXT, ANSWER),
    "all": tuple(range(N_DOMAINS)),
}
T = TypeVar("T")


def checked_groups(method: str, groups: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """The groups with their domains as tuples. Raises ConfigError for no group, a name that cannot name tensors, or an unknown domain."""
    example = "for instance groups={'image': ('image',), 'text': ('text',)}, or groups={'shared': ('image', 'text')}"
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{method} needs groups of token domains, got {groups!r}: give one or more, {example}")
    checked = {name: (domains,) if isinstance(domains, str) else tuple(domains) for name, domains in groups.items()}
    for name, domains in checked.items():
        if not isinstance(name, str) or not name or "." in name or name == "method":
            raise ConfigError(f"{method} has a group called {name!r}: its name is part of tensor names, so give a word without a dot (and not `method`)")
        if not domains:
            raise ConfigError(f"{method}'s group {name} has no domain: give one or more of {', '.join(DOMAINS)}")
        if unknown := [domain for domain in domains if domain not in DOMAINS]:
            raise ConfigError(f"{method}'s group {name} names the unknown domain {', '.join(map(repr, unknown))}: domains are {', '.join(DOMAINS)}")
    return checked


def every_token() -> dict[str, tuple[str, ...]]:
    """One group for all tokens: what a method is without token domains."""
    return {"all": ("all",)}


def domains_of(names: Iterable[str]) -> tuple[int, ...]:
    """The domains of a group, in order. ("image", "text") -> (0, 1, 2)."""
    return tuple(sorted({domain for name in names for domain in DOMAINS[name]}))


def per_group(method: str, setting: str, value: T | Mapping[str, T], groups: Iterable[str]) -> dict[str, T]:
    """group -> value, from one value for all or one for each. Raises ConfigError where a group has none, or there is no such group."""
    names = list(groups)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if set(value) != set(names):
        given = ", ".join(value) or "none"
        raise ConfigError(f"{method}'s {setting} is given for the groups {given}, and its groups are {', '.join(names)}: give one for each")
    return {name: value[name] for name in names}


def for_group(value: T | Mapping[str, T], group: str) -> T:
    """One group's value of a setting that was checked by `per_group`."""
    return value[group] if isinstance(value, Mapping) else value
