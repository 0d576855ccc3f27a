"""Which linears a method edits, and for the tokens of which domains: targets, groups of weights, and dropout of whole tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, Linear
from adalink.edit import Placement, Port
from adalink.errors import AttachError, ConfigError
from adalink.tokens import ANSWER, DOMAIN_NAMES, N_DOMAINS, TEXT, Tokens, is_autocast

__all__ = [
    "DOMAINS", "Target", "TokenDropout", "added", "at_outputs", "checked_groups", "domains_of", "dropouts", "every_token", "find_targets",
    "for_group", "layers_left", "per_group",
]  # fmt: skip


# ----------------------------------------
# The linears that a method edits, found by name or by their part in the model.


PARTS = ("query", "key", "value")  # of self-attention, also where one linear makes all three (GPT-2)
DOWN = "down"  # the linear that closes the feed-forward network


@dataclass(frozen=True)
class Target:
    """Output features [start, stop) of a linear; all of them unless the linear makes queries, keys and values at once.

    role   names the edit's tensors: layer and last path component, `0.q_proj`
    """

    linear: Linear
    start: int
    stop: int
    role: str

    @property
    def width(self) -> int:
        """How many output features."""
        return self.stop - self.start

    def spread(self, change: Tensor) -> Tensor:
        """[..., width] -> [..., n_out]: zero for the linear's other features."""
        return change if self.width == self.linear.n_out else nn.functional.pad(change, (self.start, self.linear.n_out - self.stop))


def layers_left(anatomy: Anatomy, exclude_layers: Sequence[int]) -> tuple[int, ...]:
    """The numbers of the layers that are not excluded, in order. Raises AttachError where one is outside the model, or none is left."""
    n = len(anatomy.layers)
    if unknown := [layer for layer in exclude_layers if not 0 <= layer < n]:
        raise AttachError(f"excluded layers {unknown} are outside this model, which has {n}: give numbers of 0 to {n - 1}")
    if not (left := tuple(layer for layer in range(n) if layer not in exclude_layers)):
        raise AttachError(f"all {n} layers of this model are excluded, and none is left to edit: exclude fewer")
    return left


def find_targets(anatomy: Anatomy, names: Sequence[str], exclude: Sequence[str] = (), exclude_layers: Sequence[int] = ()) -> tuple[Target, ...]:
    """The targets of these names inside the layers, in the model's order.

    A name is one of these, the first that fits:
    - `all`: every linear of the layers
    - the last path component of linears (`q_proj`, never `qq_proj`), or their last components (`mlp.c_proj`, `layers.3.mlp.down_proj`)
    - `query`, `key`, `value`: of self-attention, also as a part of one linear that makes all three
    - `down`: the linear that closes each layer's feed-forward network

    Raises AttachError, with the names that would have worked, where a name fits nothing, a layer is outside the model, or nothing is left.
    """
    left = layers_left(anatomy, exclude_layers)
    unwanted = [target for name in exclude for target in _named(anatomy, name)]
    retained = {
        target: None
        for name in names
        for target in _named(anatomy, name)
        if _layer(anatomy, target.linear.name) in left and not any(_overlap(target, other) for other in unwanted)
    }
    if not retained:
        raise AttachError(
            f"no linear is left to edit: the targets are {', '.join(names) or 'none'}, and {', '.join([*exclude, *map(str, exclude_layers)]) or 'nothing'} "
            f"is excluded; {_would_have_worked(anatomy)}"
        )
    order = {linear.name: i for i, linear in enumerate(anatomy.linears)}
    return tuple(sorted(retained, key=lambda target: (order[target.linear.name], target.start)))


def _named(anatomy: Anatomy, name: str) -> list[Target]:
    if name == "all":
        return [_whole(anatomy, linear) for linear in anatomy.linears]
    if found := [linear for linear in anatomy.linears if linear.name == name or linear.name.endswith("." + name)]:
        return [_whole(anatomy, linear) for linear in found]
    found_parts = list(_parts(anatomy, name)) if name in PARTS else list(_down(anatomy)) if name == DOWN else []
    if not found_parts:
        raise AttachError(f"no linear of this model is named {name}; {_would_have_worked(anatomy)}")
    return found_parts


def _parts(anatomy: Anatomy, name: str) -> Iterator[Target]:
    by_name = {linear.name: linear for linear in anatomy.linears}
    for projections in anatomy.projections:
        part = {"query": projections.query, "key": projections.key, "value": projections.value}[name]
        linear = by_name[part.linear]
        whole = _whole(anatomy, linear)
        is_whole = part.stop - part.start == linear.n_out
        yield whole if is_whole else Target(linear, part.start, part.stop, f"{whole.role}.{name}")


def _down(anatomy: Anatomy) -> Iterator[Target]:
    """The last linear of each layer, in the order in which the model defines them; nothing where it does not give the layer's width."""
    for layer in anatomy.layers:
        inside = [linear for linear in anatomy.linears if linear.name.startswith(layer + ".")]
        if inside and inside[-1].n_out == anatomy.layer_width:
            yield _whole(anatomy, inside[-1])


def _whole(anatomy: Anatomy, linear: Linear) -> Target:
    """All of a linear's features. Its role is its layer and last path component, or its path in the layer where two end alike (GPT-2's c_proj)."""
    layer = _layer(anatomy, linear.name)
    inside = linear.name[len(anatomy.layers[layer]) + 1 :]
    last = inside.rsplit(".", 1)[-1]
    alike = [other for other in anatomy.linears if other.name.startswith(anatomy.layers[layer] + ".") and other.name.endswith("." + last)]
    return Target(linear, 0, linear.n_out, f"{layer}.{last if len(alike) == 1 else inside}")


def _layer(anatomy: Anatomy, linear: str) -> int:
    return next(i for i, layer in enumerate(anatomy.layers) if linear.startswith(layer + "."))


def _overlap(one: Target, other: Target) -> bool:
    return one.linear == other.linear and one.start < other.stop and other.start < one.stop


def _would_have_worked(anatomy: Anatomy) -> str:
    last = sorted({linear.name.rsplit(".", 1)[-1] for linear in anatomy.linears})
    by_part = [*(PARTS if anatomy.projections else ()), *([DOWN] if list(_down(anatomy)) else [])]
    return f"its linears are named {', '.join(last)}; all" + (f", {', '.join(by_part)}" if by_part else "") + " work too"


def at_outputs(groups: Mapping[str, Iterable[str]], targets: Sequence[Target], edit: Callable[[str, Target], nn.Module]) -> list[Placement]:
    """One edit for each group and target, at the linear's output."""
    return [
        Placement(f"{group}.{target.role}", Port(target.linear.name, "output"), edit(group, target), domains_of(domains))
        for group, domains in groups.items()
        for target in targets
    ]


# ----------------------------------------
# Groups of a method: one set of weights each, for the tokens of some domains (Context-PEFT's routing).


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


def added(h: Tensor, middle: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """h [B, T, D] plus the sum of middle[i] [B, T, R_i] @ rows[i] [R_i, D], in one product: no change [B, T, D] is made beside h."""
    left, right = (parts[0] if len(parts) == 1 else torch.cat(tuple(parts), axis) for parts, axis in ((middle, -1), (rows, 0)))
    if h.dtype == left.dtype == right.dtype and not is_autocast(h.device):
        return torch.addmm(h.reshape(-1, h.shape[-1]), left.reshape(-1, left.shape[-1]), right).view(h.shape)
    return h + left @ right


# ----------------------------------------
# Dropout of a group's mask, as the released code of Context-PEFT has it: whole tokens, one draw for all layers.


class TokenDropout(nn.Module):
    """Takes a group's change from a share of the tokens, and scales the others by 1 / (1 - rate); only in training.

    One is shared by all edits of a group. The draw is stored with the call's tokens, so every layer has the same, and a layer that gradient
    checkpointing runs again has the same again.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, change: Tensor, tokens: Tokens) -> Tensor:
        """change: [B, T, D], or [D] where it is the same for every token -> the same, or [B, T, D]. A token's share [B, T, 1] of it likewise."""
        if not self.training or self.rate == 0:
            return change
        return change * self._share(tokens).to(change.dtype)

    def _share(self, tokens: Tokens) -> Tensor:
        """float [B, T, 1]: what is left of each token's change."""
        if self not in tokens.drawn:
            if tokens.origin is None:
                share = nn.functional.dropout(torch.ones(*tokens.domain.shape, 1, device=tokens.domain.device), self.rate)
            else:
                whole, place = tokens.origin
                share = torch.take_along_dim(self._share(whole), place[..., None], 1)
            tokens.drawn[self] = share
        return tokens.drawn[self]


def dropouts(method: str, rate: float | Mapping[str, float], groups: Iterable[str]) -> dict[str, TokenDropout]:
    """group -> its dropout. Raises ConfigError for a rate that is none."""
    rates = per_group(method, "dropout", rate, groups)
    for group, value in rates.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{method}'s dropout is {value} for the group {group}: give 0 or more and less than 1")
    return {group: TokenDropout(value) for group, value in rates.items()}
