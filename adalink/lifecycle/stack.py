"""Adapters added up exactly: one adapter whose edit at every port is h + sum of w_k (edit_k(h) - h). It grows: ranks add.

    low-rank edits   down = [down_1; ..; down_K], up = [w_1 up_1 .. w_K up_K]     any activation, since it acts on each number by itself
    biases, gains    their weighted sum
    bridge           hidden units side by side, its norm's gain and shift in the first linear; it writes, so its weights sum to one

A bridge and AdaLink on images are a chain, and a sum of chains is no chain of sums: AdaLink without an activation is first made part of the bridge's
last linear. Where no such form exists the merge is refused. A bridge that all adapters share, number for number, stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adalink.edit import Method
from adalink.errors import ConfigError
from adalink.methods.adalink import AdaLink
from adalink.methods.bitfit import BitFit
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.bridge import Bridge
from adalink.methods.ia3 import IA3
from adalink.methods.lora import LoRA
from adalink.methods.targets import domains_of, for_group

__all__ = ["TAKEN_UP", "Parts", "check_settings", "folded", "stacked", "truncated"]

Parts = tuple[Mapping[str, Method], Mapping[str, Tensor]]  # an adapter's methods and its tensors, both by name, tensors in float64
Tensors = Mapping[str, Tensor]

# Settings that change nothing of what a trained adapter computes.
OF_TRAINING = frozenset({"dropout", "feature_dropout", "init_scale", "frozen_down"})
# Settings that differ in size or in a factor, which the sum takes up.
TAKEN_UP: Mapping[type[Any], frozenset[str]] = {
    AdaLink: frozenset({"rank"}), Bottleneck: frozenset({"width"}), Bridge: frozenset({"hidden", "bias"}),
    LoRA: frozenset({"rank", "alpha", "scaling", "multiplier"}),
}  # fmt: skip


def stacked(adapters: Mapping[str, Parts], weights: Sequence[float]) -> Parts:
    """The weighted sum of adapters, by folder, as one adapter. Raises ConfigError where no adapter computes it."""
    if len(adapters) == 1 and list(weights) == [1.0]:
        return next(iter(adapters.values()))
    for folder, (own_methods, _) in adapters.items():
        _check_sums(folder, own_methods)
    check_settings({folder: own_methods for folder, (own_methods, _) in adapters.items()}, TAKEN_UP)
    shared = _shared_bridge(list(adapters.values()))
    if not shared:
        _check_sum_of_one(adapters, weights)
    plain = [parts if shared else folded(folder, parts) for folder, parts in adapters.items()]
    methods: dict[str, Method] = {}
    tensors: dict[str, Tensor] = {}
    for name in plain[0][0]:
        own = [one[name] for one, _ in plain]
        held = [_of(name, each) for _, each in plain]
        methods[name], made = (own[0], held[0]) if name == shared else _SUMS[type(own[0])](own, held, weights)
        tensors |= {f"{name}.{key}": value for key, value in made.items()}
    return methods, tensors


def check_settings(methods: Mapping[str, Mapping[str, Method]], free: Mapping[type[Any], frozenset[str]]) -> None:
    """Raise ConfigError, with both values, where adapters by folder have other methods, or other settings than `free` ones and those of training."""
    (first, one), *others = methods.items()
    for folder, other in others:
        kinds = [{name: type(method).__name__ for name, method in found.items()} for found in (one, other)]
        if kinds[0] != kinds[1]:
            raise ConfigError(f"{first} has the methods {_listed(kinds[0])} and {folder} {_listed(kinds[1])}: give adapters of the same methods")
        for name, method in one.items():
            for field in dataclasses.fields(method):  # type: ignore[arg-type]  # every method is a dataclass
                mine, theirs = getattr(method, field.name), getattr(other[name], field.name)
                if mine != theirs and field.name not in OF_TRAINING | free.get(type(method), frozenset()):
                    raise ConfigError(f"{name}.{field.name} is {mine!r} in {first} and {theirs!r} in {folder}: give adapters that compute the same function")


def _of(name: str, tensors: Tensors) -> dict[str, Tensor]:
    """A method's tensors, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _shared_bridge(adapters: Sequence[Parts]) -> str:
    """The name of the bridge that all adapters have, number for number; empty where there is none."""
    for name, method in adapters[0][0].items():
        held = [_of(name, tensors) for _, tensors in adapters]
        if isinstance(method, Bridge) and all(one.keys() == held[0].keys() and all(torch.equal(one[key], held[0][key]) for key in one) for one in held):
            return name
    return ""


def _check_sum_of_one(adapters: Mapping[str, Parts], weights: Sequence[float]) -> None:
    """Raise ConfigError where an adapter has a bridge and the weights do not sum to one."""
    if any(isinstance(method, Bridge) for methods, _ in adapters.values() for method in methods.values()) and not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise ConfigError(f"the weights sum to {sum(weights):g}, and a bridge writes its vectors, so theirs must sum to 1: give for instance 0.5 0.5")


def folded(folder: str, adapter: Parts) -> Parts:
    """AdaLink on images as a part of the bridge's last linear, and the bridge's norm as a part of its first.

    Raises ConfigError, by folder, where AdaLink has an activation: then both together have no such form.
    """
    methods, tensors = dict(adapter[0]), dict(adapter[1])
    bridge = next((name for name, method in methods.items() if isinstance(method, Bridge)), None)
    if bridge is None:
        return methods, tensors
    edits = [name for name, method in methods.items() if isinstance(method, AdaLink) and "image" in method.modalities]
    for name in edits:
        method: Any = methods[name]
        if method.activation != "identity":
            raise ConfigError(
                f"the adapter in {folder} edits what its bridge wrote, with the activation {method.activation}: a sum of such chains is no bridge and one "
                "AdaLink; give --method average, or serve each adapter by its name (adapter_names), which is exact"
            )
        tensors = _without_image_edit(tensors, bridge, name)
        left = tuple(modality for modality in method.modalities if modality != "image")
        methods[name] = dataclasses.replace(method, modalities=left or ("text",))
        if not left:
            del methods[name]
    return _without_norm(methods, tensors, bridge)


def truncated(adapter: Parts, rank: int) -> tuple[Parts, float]:
    """The nearest adapter whose low-rank products have this rank at most, and the share of their squared norm that is dropped.

    Raises ConfigError for low-rank edits with an activation between the two matrices.
    """
    methods, tensors, total, dropped = dict(adapter[0]), dict(adapter[1]), 0.0, 0.0
    for name, method in adapter[0].items():
        if isinstance(method, Bottleneck) or (isinstance(method, AdaLink) and (method.activation != "identity" or method.bias)):
            raise ConfigError(f"{name} has an activation or a bias between its two matrices, which no singular values describe: give --method stack")
        if not isinstance(method, (AdaLink, LoRA)):
            continue
        roots = [f"{name}.{root}" for root in _roots(_of(name, tensors))]
        for root in roots:
            left, values, right = torch.linalg.svd(tensors[f"{root}.up.weight"] @ tensors[f"{root}.down.weight"], full_matrices=False)
            n = min(rank, len(tensors[f"{root}.down.weight"]))
            total, dropped = total + float((values**2).sum()), dropped + float((values[n:] ** 2).sum())
            root_values = values[:n].sqrt()
            tensors[f"{root}.up.weight"], tensors[f"{root}.down.weight"] = left[:, :n] * root_values, root_values[:, None] * right[:n]
        sizes = {root.removeprefix(f"{name}.").split(".", 1)[0]: len(tensors[f"{root}.down.weight"]) for root in roots}
        methods[name] = _of_rank(method, sizes)
    return (methods, tensors), dropped / total if total else 0.0


def _check_sums(folder: str, methods: Mapping[str, Method]) -> None:
    """Raise ConfigError where an adapter has a method that is no sum, or two that read what the other wrote."""
    images: list[str] = []
    for name, method in methods.items():
        kind = type(method).__name__
        if type(method) not in _SUMS:
            raise ConfigError(f"{name} in {folder} is a {kind}, whose effects do not add up: give --method average, or serve each adapter by its name")
        if isinstance(method, IA3) and any(isinstance(other, (LoRA, BitFit)) for other in methods.values()):
            raise ConfigError(f"{name} in {folder} scales what another method adds to, and sums of such chains have no exact form: give --method average")
        if isinstance(method, IA3) and len({*(domains := [one for names in method.groups.values() for one in domains_of(names)])}) < len(domains):
            raise ConfigError(f"{name} in {folder} has two groups for one kind of token, whose gains multiply: give --method average")
        images += method.modalities if isinstance(method, AdaLink) else ()
    if len({*images}) < len(images):
        raise ConfigError(f"two methods of {folder} edit one modality, the second what the first wrote: give --method average")


def _of_rank(method: Any, sizes: Mapping[str, int]) -> Method:
    """AdaLink or LoRA with these ranks by group or modality, and a scale of 1."""
    if isinstance(method, AdaLink):
        return dataclasses.replace(method, rank=max(sizes.values()), frozen_down=False)
    rank: Any = max(sizes.values()) if len({*sizes.values()}) == 1 else dict(sizes)
    return dataclasses.replace(method, rank=rank, alpha=rank, scaling="standard", multiplier=1.0, frozen_down=False)  # type: ignore[no-any-return]


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _roots(tensors: Tensors) -> list[str]:
    """`image`, `all.0.q_proj`: where pairs of a down and an up projection lie."""
    return [name.removesuffix(".down.weight") for name in tensors if name.endswith(".down.weight")]


def _pairs(held: Sequence[Tensors], factors: Sequence[Callable[[str], float]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Pairs of projections side by side. factors: of each adapter, by root, what its up projection is multiplied by beside its weight."""
    made: dict[str, Tensor] = {}
    for root in _roots(held[0]):
        made[f"{root}.down.weight"] = torch.cat([tensors[f"{root}.down.weight"] for tensors in held])
        ups = [weight * factor(root) * tensors[f"{root}.up.weight"] for tensors, factor, weight in zip(held, factors, weights, strict=True)]
        made[f"{root}.up.weight"] = torch.cat(ups, 1)
        if f"{root}.down.bias" in held[0]:
            made[f"{root}.down.bias"] = torch.cat([tensors[f"{root}.down.bias"] for tensors in held])
        for name in (f"{root}.up.bias", f"{root}.bias"):
            if name in held[0]:
                made[name] = _sum(name, held, weights)
    return made


def _sum(name: str, held: Sequence[Tensors], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensors[name] for tensors, weight in zip(held, weights, strict=True)]).sum(0)


def _adalink(methods: Sequence[AdaLink], held: Sequence[Tensors], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    made = _pairs(held, [lambda root: 1.0] * len(held), weights)
    return _of_rank(methods[0], {"all": sum(method.rank for method in methods)}), made


def _lora(methods: Sequence[LoRA], held: Sequence[Tensors], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    def factor(method: LoRA) -> Callable[[str], float]:
        def of(root: str) -> float:
            group = root.split(".", 1)[0]
            rank = for_group(method.rank, group)
            divisor = rank if method.scaling == "standard" else math.sqrt(rank)
            return for_group(method.multiplier, group) * for_group(method.alpha, group) / divisor

        return of

    sizes = {group: sum(for_group(method.rank, group) for method in methods) for group in methods[0].groups}
    return _of_rank(methods[0], sizes), _pairs(held, [factor(method) for method in methods], weights)


def _bottleneck(methods: Sequence[Bottleneck], held: Sequence[Tensors], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    made = _pairs(held, [lambda root: 1.0] * len(held), weights)
    return dataclasses.replace(methods[0], width=sum(method.width for method in methods)), made


def _same_size(methods: Sequence[Method], held: Sequence[Tensors], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    return methods[0], {name: _sum(name, held, weights) for name in held[0]}


def _bridge(methods: Sequence[Bridge], held: Sequence[Tensors], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    """Of bridges whose norm leaves its input as it is, and whose linears all have biases."""
    made = {name: held[0][name] for name in held[0] if name.startswith("image.layers.0.")}
    made |= {name: _sum(name, held, weights) for name in held[0] if name == "image.boundary"}
    last = "image.layers.3" if methods[0].kind == "mlp" else "image.layers.1"
    made[f"{last}.bias"] = _sum(f"{last}.bias", held, weights)
    if methods[0].kind == "linear":
        made[f"{last}.weight"] = _sum(f"{last}.weight", held, weights)
        return methods[0], made
    for name in ("weight", "bias"):
        made[f"image.layers.1.{name}"] = torch.cat([tensors[f"image.layers.1.{name}"] for tensors in held])
    made[f"{last}.weight"] = torch.cat([weight * tensors[f"{last}.weight"] for tensors, weight in zip(held, weights, strict=True)], 1)
    return dataclasses.replace(methods[0], hidden=len(made["image.layers.1.bias"])), made


def _without_image_edit(tensors: Tensors, bridge: str, adalink: str) -> dict[str, Tensor]:
    """h + up(down(h)) after the bridge's last linear W, b: W + up down W, and b likewise."""
    edit = {name.removeprefix(f"{adalink}.image."): value for name, value in tensors.items() if name.startswith(f"{adalink}.image.")}
    made = {name: value for name, value in tensors.items() if not name.startswith(f"{adalink}.image.")}
    last = f"{bridge}.image.layers.{3 if f'{bridge}.image.layers.3.weight' in tensors else 1}"
    weight, width = made[f"{last}.weight"], len(made[f"{last}.weight"])
    matrix = torch.eye(width, dtype=weight.dtype) + edit["up.weight"] @ edit["down.weight"]
    shift = edit["up.weight"] @ edit["down.bias"] + edit["up.bias"] if "up.bias" in edit else torch.zeros(width, dtype=weight.dtype)
    made[f"{last}.weight"] = matrix @ weight
    made[f"{last}.bias"] = matrix @ made.get(f"{last}.bias", torch.zeros(width, dtype=weight.dtype)) + shift
    if f"{bridge}.image.boundary" in made:
        made[f"{bridge}.image.boundary"] = made[f"{bridge}.image.boundary"] @ matrix.T + shift
    return made


def _without_norm(methods: dict[str, Method], tensors: dict[str, Tensor], name: str) -> Parts:
    """The norm's gain and shift in the linear that reads it, W diag(gain) and b + W shift; every linear of the bridge then has a bias."""
    bridge, path = methods[name], f"{name}.image.layers"
    assert isinstance(bridge, Bridge)
    for number in ("1", "3") if bridge.kind == "mlp" else ("1",):
        weight = tensors[f"{path}.{number}.weight"]
        tensors.setdefault(f"{path}.{number}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    if bridge.norm == "layer":
        gain, shift, weight = (tensors[f"{path}.{key}"] for key in ("0.weight", "0.bias", "1.weight"))
        tensors[f"{path}.1.weight"] = weight * gain
        tensors[f"{path}.1.bias"] = tensors[f"{path}.1.bias"] + weight @ shift
        tensors[f"{path}.0.weight"], tensors[f"{path}.0.bias"] = torch.ones_like(gain), torch.zeros_like(shift)
    return {**methods, name: dataclasses.replace(bridge, bias=True)}, tensors


_SUMS: Mapping[type[Any], Callable[[Sequence[Any], Sequence[Tensors], Sequence[float]], tuple[Method, dict[str, Tensor]]]] = {
    AdaLink: _adalink, BitFit: _same_size, Bottleneck: _bottleneck, Bridge: _bridge, IA3: _same_size, LoRA: _lora,
}  # fmt: skip
