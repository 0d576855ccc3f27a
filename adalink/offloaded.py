"""Frozen models whose parts lie elsewhere: on several devices, or in memory or on disk until they run (accelerate's `device_map`)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from adalink.errors import AttachError

__all__ = ["execution_device", "tied_names", "weight_of"]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The values of a parameter, by its dotted name: from where the model's own loader keeps them, if the parameter itself is empty.

    Raises AttachError where nothing keeps them.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter.detach()
    path = name.split(".")
    for depth in reversed(range(len(path))):
        inside = ".".join(path[depth:])
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # not of this hook, or a hook without weights
                found: Tensor = hook.weights_map[inside]
                return found.detach()
    raise AttachError(
        f"the weight {name} of {type(model).__name__} is on the meta device and nothing says where its values are: "
        "load the model with from_pretrained (device_map may offload it), or give its weights a device"
    )


def execution_device(model: nn.Module, name: str) -> torch.device:
    """Where a module computes, by its dotted name: where its weights are, or are brought when it runs; that of what is around it where it has none."""
    path = name.split(".") if name else []
    for depth in reversed(range(len(path) + 1)):
        module = model.get_submodule(".".join(path[:depth]))
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return _device(hook.execution_device)
        if (parameter := next((one for one in module.parameters() if not one.is_meta), None)) is not None:
            return parameter.device
    return next((one.device for one in model.parameters()), torch.device("cpu"))  # of a plan: nothing has values


def tied_names(model: nn.Module) -> frozenset[str]:
    """Parameters that are another one under a second name; parameters that lie elsewhere do not show it themselves."""
    return frozenset(getattr(model, "all_tied_weights_keys", None) or {}) if any(parameter.is_meta for parameter in model.parameters()) else frozenset()


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module; several stand in one."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _device(device: int | str | torch.device) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
