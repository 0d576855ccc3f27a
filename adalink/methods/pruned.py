"""The published start of a ladder: its layers and norms are cut out of the frozen model's own, by Fisher information (structural pruning).

A walk through the model decides which rows of each matrix stay. The columns of a matrix are the rows that stayed in the one before it; of its
rows 1 / reduction stay, those with the largest sum of importances. Of matrices that read the same (queries, keys and values) the same rows stay: their
importances are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import SEPARATE, in_rows, is_conv1d
from adalink.edit import Adapter
from adalink.errors import AttachError
from adalink.methods.ladder import Encoded, End, Ladder, Rung

__all__ = ["importances", "start_pruned"]

TOGETHER = (*SEPARATE, ("gate_proj", "up_proj"), ("wi_0", "wi_1"))  # linears that read the same, by their last path component
FUSED = {"c_attn": 3}  # linears that are several of those, one after the other


def importances(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Fisher information of a model's weights, by name: the sum over samples of the squared gradient of a sample's loss. Flags are then as before.

    losses   each runs the frozen model on one sample, and gives its mean cross entropy
    """
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    try:
        model.requires_grad_(True)
        for loss in losses:
            gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.square()
    finally:
        for name, flag in flags.items():
            parameters[name].requires_grad_(flag)
    return found


@torch.no_grad()
def start_pruned(adapter: Adapter, model: nn.Module, importance: Mapping[str, Tensor]) -> None:
    """Give the ladder of an adapter its published start: layers, norms and distances of the model, pruned; D and U stay as they were drawn.

    importance: of each weight, by its name in the model, as `importances` gives it. An adapted model's `start` must then be set to None.
    Raises AttachError where no method of the adapter is a ladder, and for layers whose linears or norms are not understood.
    """
    anatomy, ladder = adapter.anatomy, next((method for method in adapter.methods.values() if isinstance(method, Ladder)), None)
    if ladder is None:
        raise AttachError(f"the adapter has no ladder whose start could be pruned, its methods are {', '.join(adapter.methods)}: add a ladder to it")
    walk = _Walk(model, importance, ladder.reduction)
    walk.begin(model.get_submodule(f"{anatomy.stack}.{anatomy.embedding}".lstrip(".")), anatomy.layer_width)
    for of, root in (("stack", anatomy.stack), ("reader", anatomy.reader)):
        if root is None:
            continue
        placed = [one for one in adapter.placements if one.port.of == of]
        rungs = {one.port.module: one.edit for one in placed if isinstance(one.edit, Rung)}
        stack, path = model.get_submodule(root), anatomy.layers[0].rpartition(".")[0]
        for number in range(len(list(stack.get_submodule(path).children()))):
            layer = stack.get_submodule(f"{path}.{number}")
            pruned, rung = walk.through(layer), rungs.get(f"{path}.{number}")
            if rung is not None:
                _fill(rung.block, pruned | _tables(stack.get_submodule(f"{path}.0")))
        for end in (one.edit for one in placed if isinstance(one.edit, Encoded | End)):
            if anatomy.final_norm is not None:
                _fill(end.norm, walk.norm(stack.get_submodule(anatomy.final_norm)))


def _fill(module: Any, values: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


def _tables(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer knows of distances, by head: it is as it was."""
    return {f"{name}.weight": module.weight for name, module in layer.named_modules() if isinstance(module, nn.Embedding)}


class _Walk:
    """The rows that stayed in the last matrix, on the way through a model."""

    def __init__(self, model: nn.Module, importance: Mapping[str, Tensor], reduction: int) -> None:
        self.reduction = reduction
        self._of = {id(parameter): importance[name] for name, parameter in model.named_parameters()}
        self.rows: Tensor

    def begin(self, embedding: Any, width: int) -> None:
        """Of the word embedding the most important features; where layers are wider than it, the first ones."""
        by_feature = self._of[id(embedding.weight)].abs().sum(0)
        self.rows = self._largest(by_feature) if len(by_feature) == width else torch.arange(width // self.reduction)

    def through(self, layer: nn.Module) -> dict[str, Tensor]:
        """The layer's weights, pruned, by their names in it. Raises AttachError."""
        found: dict[str, Tensor] = {}
        groups = list(_groups(layer))
        norms = [(name, module) for name, module in layer.named_modules() if "norm" in type(module).__name__.lower()]
        if len(groups) % 2 or len(norms) != len(groups) // 2:
            raise AttachError(
                f"a {type(layer).__name__} has {len(norms)} norms and {len(groups)} groups of linears, expected one norm before each pair of them: "
                "start the ladder as it is drawn"
            )
        for number, group in enumerate(groups):
            if number % 2 == 0:
                name, norm = norms[number // 2]
                found |= {f"{name}.{key}": value for key, value in self.norm(norm).items()}
            found |= self._group(group)
        return found

    def norm(self, norm: nn.Module) -> dict[str, Tensor]:
        """A norm's weights at the rows that stayed."""
        return {name: parameter[self.rows] for name, parameter in norm.named_parameters()}

    def _group(self, group: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        """Linears that read the same. Those of grouped keys and values, which have fewer rows than queries, keep rows of their own."""
        columns, found, first = self.rows, {}, None
        parts = [(name, linear, part) for name, linear in group for part in _parts(name, linear)]
        by_rows: dict[int, list[tuple[str, Any, slice]]] = {}
        for one in parts:
            by_rows.setdefault(one[2].stop - one[2].start, []).append(one)
        pruned: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        for alike in by_rows.values():
            product = torch.stack([in_rows(self._of[id(linear.weight)], linear)[part][:, columns] for _, linear, part in alike]).prod(0)
            rows = self._largest(product.abs().sum(1))
            first = rows if first is None else first
            for name, linear, part in alike:
                bias = None if linear.bias is None else linear.bias[part][rows]
                pruned.setdefault(name, []).append((in_rows(linear.weight, linear)[part][rows][:, columns], bias))
        for name, linear in group:
            weight = torch.cat([weight for weight, _ in pruned[name]])
            found[f"{name}.weight"] = in_rows(weight, linear)
            if linear.bias is not None:
                found[f"{name}.bias"] = torch.cat([bias for _, bias in pruned[name] if bias is not None])
        assert first is not None
        self.rows = first
        return found

    def _largest(self, sums: Tensor) -> Tensor:
        n = len(sums) - round(len(sums) * (1 - 1 / self.reduction))
        return sums.topk(n).indices.sort().values


def _parts(name: str, linear: Any) -> list[slice]:
    n_out = len(in_rows(linear.weight, linear))
    n = FUSED.get(name.rpartition(".")[2], 1)
    return [slice(i * n_out // n, (i + 1) * n_out // n) for i in range(n)]


def _groups(layer: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """The linears of a layer in their order; those that read the same are one group."""
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    while linears:
        parent, _, last = linears[0][0].rpartition(".")
        together = next((names for names in TOGETHER if last in names), (last,))
        group = [one for one in linears if one[0].rpartition(".")[0] == parent and one[0].rpartition(".")[2] in together]
        linears = [one for one in linears if one not in group]
        yield sorted(group, key=lambda one: together.index(one[0].rpartition(".")[2]))
