"""What frozen weights take in memory, in each precision and on each of several cards: counted from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalink import Anatomy
from adalink.checkpoint.precision import Precision, cast, chosen_linears, packed_bytes, some_linears

__all__ = ["PRECISIONS", "bytes_by_precision", "cast_as", "gathered_bytes", "per_card", "weight_bytes"]

PRECISIONS = ("float32", "bfloat16", "bfloat16 int8", "bfloat16 nf4")  # that a plan lists
_SPLIT = ("frozen weights", "trained weights", "gradients", "optimizer state")  # by FSDP2


def cast_as(module: nn.Module, precision: Precision) -> None:
    """Give a module on the meta device the dtype of a precision."""
    if precision.dtype != "auto":
        cast(module, getattr(torch, precision.dtype))


def weight_bytes(module: nn.Module, quantiser: str, name: str = "", linears: Callable[[str], bool] | None = None) -> dict[str, int]:
    """Dotted name -> bytes of each weight, a shared one under its first name.

    module     in its dtype, on the meta device
    quantiser  `int8`, `nf4`, `fp8`, or empty
    linears    which linear layers are quantised, as in `settle`

    Raises ConfigError where no layer can be quantised.
    """
    chosen = {f"{path}.weight" for path in some_linears(module, name, linears)} if quantiser else set()
    return {path: _bytes(weight, quantiser if path in chosen else "") for path, weight in module.named_parameters()}


def bytes_by_precision(module: nn.Module, names: Collection[str] | None = None) -> dict[str, int]:
    """Precision, as `bfloat16 nf4` -> bytes of the weights that `names` names, or of all; for the precisions that they can have."""
    weights = dict(module.named_parameters())
    weights = {path: weights[path] for path in (weights if names is None else names)}
    linears = {f"{path}.weight" for path in chosen_linears(module)} & weights.keys()
    found = {}
    for precision in map(Precision.of, PRECISIONS):
        if linears or not precision.quantiser:
            dtype = getattr(torch, precision.dtype)
            drawn = {path: torch.empty_like(weight, dtype=dtype if weight.is_floating_point() else None, device="meta") for path, weight in weights.items()}
            found[str(precision)] = sum(_bytes(weight, precision.quantiser if path in linears else "") for path, weight in drawn.items())
    return found


def _bytes(weight: Tensor, quantiser: str) -> int:
    return packed_bytes(quantiser, weight) if quantiser else weight.numel() * weight.element_size()


def gathered_bytes(model: Any, whole: int) -> int:
    """The bytes of frozen weights that FSDP2 has on a card at once: one layer of the language model, and all that lies in no layer.

    whole: bytes of all frozen weights, the encoder's too.
    """
    anatomy = Anatomy.read(model)
    stack = model.get_submodule(anatomy.stack)
    layers = [sum(weight.numel() * weight.element_size() for weight in stack.get_submodule(layer).parameters()) for layer in anatomy.layers]
    return whole - sum(layers) + max(layers)


def per_card(memory: Mapping[str, int], cards: int, gathered: int, *, can_split: bool) -> dict[str, int]:
    """The memory of a training on each of several cards, in bytes, with DDP and with FSDP2; {} for one card.

    memory     on one card, by what takes it, as `to_train` gives it
    gathered   as `gathered_bytes` gives it
    can_split  False: FSDP2 refuses this training

    DDP has all of it on each card. FSDP2 splits weights, gradients and the optimizer's state, and has the activations of its own rows whole.
    """
    if cards < 2:
        return {}
    whole, split = sum(memory.values()), sum(memory.get(name, 0) for name in _SPLIT)
    return {"DDP": whole, **({"FSDP2": whole - split + -(-split // cards) + gathered} if can_split else {})}
