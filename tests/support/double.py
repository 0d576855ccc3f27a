"""Models that compute in float64 throughout: their norms, rotary positions and generated logits are otherwise cast to float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["FREQUENCIES", "InDouble", "arithmetic", "rounded_frequencies", "set_frequencies"]

FREQUENCIES = "inv_freq"  # the end of their name in a file


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


def set_frequencies(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give a model the rotary frequencies that a file holds, under whatever name: all its layers have the same."""
    found = next((value for name, value in stored.items() if name.endswith(FREQUENCIES)), None)
    for module in model.modules():
        if found is not None and FREQUENCIES in dict(module.named_buffers(recurse=False)):
            module.inv_freq = found.double()


def rounded_frequencies(model: nn.Module) -> None:
    """Round a model's rotary frequencies to float32, as `model.double()` leaves those that transformers makes; the rest stays as it is."""
    for module in model.modules():
        if FREQUENCIES in dict(module.named_buffers(recurse=False)):
            exact: Any = module.inv_freq
            module.inv_freq = torch.from_numpy(exact.detach().numpy().astype(np.float32).astype(np.float64))  # the mode above would undo a cast
