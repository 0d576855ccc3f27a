"""The linears that a method edits, found by name or by their part in the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adalink.anatomy import Anatomy, Linear
from adalink.errors import AttachError

__all__ = ["Target", "find_targets", "layers_left"]

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
    if outside := [layer for layer in exclude_layers if not 0 <= layer < n]:
        raise AttachError(f"excluded layers {outside} are outside this model, which has {n}: give numbers of 0 to {n - 1}")
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
    kept = {
        target: None
        for name in names
        for target in _named(anatomy, name)
        if _layer(anatomy, target.linear.name) in left and not any(_overlap(target, other) for other in unwanted)
    }
    if not kept:
        raise AttachError(
            f"no linear is left to edit: the targets are {', '.join(names) or 'none'}, and {', '.join([*exclude, *map(str, exclude_layers)]) or 'nothing'} "
            f"is excluded; {_would_have_worked(anatomy)}"
        )
    order = {linear.name: i for i, linear in enumerate(anatomy.linears)}
    return tuple(sorted(kept, key=lambda target: (order[target.linear.name], target.start)))


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
