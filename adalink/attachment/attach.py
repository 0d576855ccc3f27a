"""Attach adapters to a frozen model, and the hooks at each kind of port: they hand the attachment what is there, and put back what its edits make."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.attachment.attachment import Attachment
from adalink.attachment.beside import beside_hook, detached_hook
from adalink.attachment.recompute import recompute
from adalink.attachment.slots import check_attention, whole_mask
from adalink.edit import Adapter, Port
from adalink.errors import AttachError
from adalink.tokens import PAD

__all__ = ["Attachment", "attach", "hook_at"]


MASKS = ("attention_mask", "mask")  # what layers call theirs


def attach(model: nn.Module, *adapters: Adapter, anatomy: Anatomy | None = None) -> Attachment:
    """Attach adapters to a frozen model: row index i of a token map means adapters[i].

    Freezes the model (requires_grad False, eval mode). Raises AttachError for a compiled model, or a port that the model lacks.
    """
    return Attachment(model, anatomy or Anatomy.read(model), adapters, hook_at)


def hook_at(attachment: Attachment, port: Port, served: Port | None = None) -> torch.utils.hooks.RemovableHandle:
    """Register the hook of a port other than the embedding. served: the port whose edits it makes, where that is another one."""
    module = attachment.model.get_submodule(port.path(attachment.anatomy))
    if port.side == "reader":
        return module.register_forward_pre_hook(partial(_reader_hook, attachment, port), with_kwargs=True)
    if port.side == "returned":
        return module.register_forward_hook(partial(_returned_hook, attachment, port))
    if port.side == "output":
        return module.register_forward_hook(partial(_output_hook, attachment, port), with_kwargs=True)
    if port.side == "vectors":
        return module.register_forward_hook(partial(_vectors_hook, attachment, port))
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if port.side == "beside":
        return module.register_forward_hook(partial(beside_hook, attachment, port, names), with_kwargs=True)
    before = {
        "detached": partial(detached_hook, attachment, port, names),
        "input": partial(_input_hook, attachment, served or port),
        "foreseen": partial(_foreseen_hook, attachment, port),
        "distances": partial(_distances_hook, attachment, port),
        "position": partial(_position_hook, attachment, port),
        "mask": partial(_mask_hook, attachment, port, next((names.index(name) for name in MASKS if name in names), len(names))),
        "cache": partial(recompute, attachment, port, names),
    }
    return module.register_forward_pre_hook(before[port.side], with_kwargs=True)


def _output_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, tuple):
        return (attachment._edited(port, output[0], x), *output[1:])
    return attachment._edited(port, output, x)


def _input_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    h = args[0] if args else kwargs["hidden_states"]
    h = attachment._edited(port, h, h)
    return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})


def _returned_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    h = output[0] if isinstance(output, tuple) else output
    h = attachment._edited(port, h, h)
    return (h, *output[1:]) if isinstance(output, tuple) else h


def _foreseen_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    h = args[0]
    return (attachment._edited(port, h, module.forward(h)), *args[1:]), kwargs  # forward: without the hooks, this one among them


def _distances_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Edit the biases where they are made; layers after the first are handed those that it used."""
    if kwargs.get("position_bias") is not None:
        return args, kwargs
    h = args[0]
    tokens = attachment._tokens_at(port).on(h.device)
    bias: Tensor = module.compute_bias(h.shape[1], tokens.keys.shape[1], device=h.device)  # type: ignore[operator]
    for index, placement in attachment.at[port]:
        if tokens.serving is None or index in tokens.serving:
            bias = placement.edit(bias, tokens, placement.domains, index)
    return args, {**kwargs, "position_bias": bias.to(h.dtype)}


def _reader_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Edit the mask of what the stack gave. The stack has run, so its tokens are made again from the map."""
    encoded, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    token_map = attachment.map
    if encoded is None or token_map is None:
        return args, kwargs
    length = encoded.shape[1]
    tokens = token_map.window(len(encoded), 0, length, length).on(encoded.device if mask is None else mask.device)
    mask = torch.ones_like(tokens.domain) if mask is None else mask
    for index, placement in attachment.at[port]:
        if tokens.serving is None or index in tokens.serving:
            mask = placement.edit(mask, tokens, placement.domains, index)
    return args, {**kwargs, "encoder_attention_mask": mask}


def _mask_hook(attachment: Attachment, port: Port, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Edit the mask that reaches a layer, by name or at its place among the arguments (GPT-2 and T5)."""
    tokens = attachment._tokens_at(port)
    placed = [(index, placement) for index, placement in attachment.at[port] if tokens.serving is None or index in tokens.serving]
    if not placed:
        return args, kwargs
    name = next((name for name in MASKS if name in kwargs), MASKS[0])
    mask = args[place] if place < len(args) else kwargs.get(name)
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        found = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise AttachError(f"the mask at {port.module} is {found}, expected None or [B, 1, T, K]: use sdpa or eager attention")
    if mask is None:
        check_attention(attachment.stack)  # it may have been changed since
    n_keys = tokens.keys.shape[1]
    if mask is not None and mask.shape[3] != n_keys:
        raise AttachError(
            f"the mask at {port.module} covers {mask.shape[3]} of {n_keys} keys, and this method hides or opens keys of the whole sequence "
            "(a cache with a sliding window drops some): generate with use_cache=False"
        )
    tokens = tokens if mask is None else tokens.on(mask.device)
    mask = whole_mask(tokens, attachment.anatomy.attention) if mask is None else mask
    for index, placement in placed:
        mask = placement.edit(mask, tokens, placement.domains, index)
    if place < len(args):
        return (*args[:place], mask, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: mask}


def _position_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Edit the position ids [1 or B, T] on their way into the module that turns them into vectors, or rotations."""
    tokens = attachment._tokens_at(port)
    by_name = kwargs.get("position_ids")
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor) and not value.is_floating_point()]
    if by_name is None and not places:
        raise AttachError(
            f"{port.module} was given no position ids and counts tokens itself, expected ids that slots can be left out of: choose methods whose slots "
            "are counted (a prompt with positions='counted'), or a model like OPT, GPT-2, Llama or Qwen2"
        )
    place = None if by_name is not None else places[-1]
    position: Any = by_name if place is None else args[place]
    tokens = tokens.on(position.device)
    for index, placement in attachment.at[port]:
        if tokens.serving is None or index in tokens.serving:
            position = placement.edit(position, tokens, placement.domains, index)
            if hasattr(module, "offset"):  # OPT gives padding the row before the first; transformers' generate() asks for position 0
                position = torch.where((tokens.domain == PAD) & (tokens.row == index)[:, None], -1, position)
    if place is None:
        return args, {**kwargs, "position_ids": position}
    return (*args[:place], position, *args[place + 1 :]), kwargs


def _vectors_hook(attachment: Attachment, port: Port, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Edit position vectors; there is one row of them where all rows are alike."""
    h = output.expand(len(attachment._tokens_at(port).row), -1, -1)
    return attachment._edited(port, h, h)
