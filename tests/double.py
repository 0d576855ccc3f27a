"""Models that compute in float64 throughout: their norms, rotary positions and generated logits are otherwise cast to float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["InDouble", "arithmetic"]


class InDouble(TorchFunctionMode):
    """Inside the block a cast to float32 is one to float64. Make the model in it too, so that its rotary frequencies are exact."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def arithmetic(difference: Callable[[], Tensor]) -> Any:
    """What a file was computed in: float64 throughout, or transformers' own with its casts to float32 in norms, rotations and softmax.

    difference: what is computed now, less what the file holds. Where float64 throughout is off by no more than float32 rounds, casts were left.
    """
    with torch.no_grad(), InDouble():
        off = difference().abs().max()
    return nullcontext if 1e-10 < off < 1e-5 else InDouble
