"""Modules above the stack that an adapter has a trained copy of: a new classifier's head (peft's modules_to_save)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adalink.anatomy import Anatomy
from adalink.attachment.attachment import Attachment
from adalink.edit import Adapter
from adalink.errors import ConfigError
from adalink.tokens import TokenMap

__all__ = ["ServedCopies", "copied", "heads_of", "write_copies"]


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The modules beside the model inside (transformers' base_model) that have weights: `classifier`, `score`, `qa_outputs`, `lm_head`."""
    inner = getattr(model, "base_model", model)
    if inner is model:
        return ()
    return tuple(name for name, child in model.named_children() if child is not inner and any(True for _ in child.parameters()))


def copied(model: nn.Module, anatomy: Anatomy, names: Sequence[str]) -> dict[str, nn.Module]:
    """Dotted name -> a trainable copy of the module, in float32 where the model is in less.

    names: of modules, or the end of their names, as peft has it. Raises ConfigError for a name that no module has, and for the embedding and
    modules around or inside the layers, where methods are for.
    """
    found: dict[str, nn.Module] = {}
    stack = f"{anatomy.stack}." if anatomy.stack else ""
    edited = (f"{stack}{anatomy.embedding}", *(f"{stack}{layer}" for layer in anatomy.layers))
    for name in names:
        paths = [path for path, _ in model.named_modules() if path and (path == name or path.endswith(f".{name}"))]
        if not paths:
            there = ", ".join(heads_of(model)) or "none"
            raise ConfigError(f"modules_to_save names {name!r}, and {type(model).__name__} has no such module: its heads are {there}")
        for path in paths:
            if any(f"{path}.".startswith(f"{part}.") or f"{part}.".startswith(f"{path}.") for part in edited):
                raise ConfigError(f"modules_to_save names {path}, which is where an adapter's methods edit: name a head, such as {', '.join(heads_of(model))}")
            if any(one.is_meta for one in model.get_submodule(path).parameters()) and not _is_plan(model):
                raise ConfigError(f"modules_to_save names {path}, whose weights are offloaded: give it a device in device_map")
            found[path] = _copy(model.get_submodule(path))
    return found


def _is_plan(model: nn.Module) -> bool:
    """Whether the model is one without any weights, and not one whose weights lie elsewhere."""
    return all(one.is_meta for one in model.parameters()) and not any(hasattr(module, "_hf_hook") for module in model.modules())


def _copy(module: nn.Module) -> nn.Module:
    if packed := next((name for name, value in module.named_parameters() if type(value.data) is not torch.Tensor), None):
        raise ConfigError(f"a trained copy of {type(module).__name__} cannot be made of quantised weights ({packed}): load the model without quantise")
    made = copy.deepcopy(module)
    for part in made.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    for name, parameter in list(made.named_parameters()):
        owner = made.get_submodule(name.rpartition(".")[0])
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.detach().clone().to(dtype), requires_grad=True))
    return made.train()


def write_copies(model: nn.Module, adapter: Adapter) -> None:
    """Write an adapter's copies over the modules of a model that no adapter is attached to."""
    for path, module in adapter.copies.items():
        model.get_submodule(path).load_state_dict(module.state_dict())


class ServedCopies:
    """What the model's own modules give, replaced by what the copies of each row's adapter give; outside a bound call the modules' own."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._copies: dict[str, dict[int, nn.Module]] = {}
        self._handles: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def serve(self, adapters: Mapping[int, Adapter]) -> None:
        """From now on those of these adapters, each by its row index, in place of those before."""
        paths = {path for adapter in adapters.values() for path in adapter.copies}
        self._copies = {path: {index: adapter.copies[path] for index, adapter in adapters.items() if path in adapter.copies} for path in paths}
        for path in self._handles.keys() - paths:
            self._handles.pop(path).remove()
        for path in paths - self._handles.keys():
            self._handles[path] = self._attachment.model.get_submodule(path).register_forward_hook(self._hook(path), with_kwargs=True)

    def _hook(self, path: str) -> Any:
        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            token_map = self._attachment.map
            if token_map is None:
                return output
            for index, one in self._copies[path].items():
                if token_map.serving is not None and index not in token_map.serving:
                    continue
                if len(token_map.row) == 1 and token_map.serving == frozenset({index}):  # all of it is the row's
                    return tree_map(_as, output, _called(one, args, kwargs))
                if not isinstance(output, Tensor):
                    raise ConfigError(f"modules_to_save names {path}, which gives {type(output).__name__} and no tensor: name a module inside it")
                output = _where(token_map, index, _called(one, args, kwargs), output)
            return output

        return replaced


def _where(token_map: TokenMap, index: int, value: Tensor, output: Tensor) -> Tensor:
    """The copy's result on the rows that its adapter serves; with beams a row is repeated."""
    is_served = (token_map.row == index).repeat_interleave(len(output) // len(token_map.row), 0)
    return torch.where(is_served.view(-1, *[1] * (output.ndim - 1)).to(output.device), value.to(output.dtype), output)


def _as(before: Any, value: Any) -> Any:
    """A tensor of numbers in the dtype of what it takes the place of."""
    return value.to(before.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The module on these arguments, computed in the dtype of its own weights."""
    dtype = next((parameter.dtype for parameter in module.parameters()), None)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return module(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
