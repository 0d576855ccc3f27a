"""What runs beside a frozen model: networks that read its layers, change nothing in it, and pass no gradient into it (adalink.methods.ladder).

A layer's hook hands its own call on, with mask, positions and cache, so that what runs beside is padded, causal and packed as the layer is. The keys
and values of a network beside are further layers of the host's own cache, each with the mark of who made it: beams, copies and crops treat them as
all others.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalink.attachment.attachment import Attachment, of_nobody, place_of
from adalink.edit import Placement, Port
from adalink.errors import AttachError
from adalink.tokens import ANSWER, Tokens

__all__ = ["beside_hook", "detached_hook", "further_cache", "set_states", "states_of"]

MARK = "beside"  # in the __dict__ of a cache's layer: who made it
CACHES = ("past_key_values", "layer_past")  # what layers call theirs


# ----------------------------------------
# Hooks.


def detached_hook(
    attachment: Attachment, port: Port, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Show the edits what the layer is about to be given, and give it that without a gradient: then the layers store nothing for a backward pass.

    Where rows of other adapters are in the call, theirs stays.
    """
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    h: Tensor = call[names[0]]
    if port.of == "reader":
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        attachment.written.set(_written(attachment, h, 0 if cache is None else int(cache.get_seq_length())))
    tokens, placed = _served(attachment, port)
    for _, placement in placed:
        _run(placement, h, tokens, call)
    if not placed or not h.requires_grad:
        return args, kwargs
    h = _without_gradient(attachment, h, tokens, [index for index, _ in placed])
    return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, names[0]: h})


def _without_gradient(attachment: Attachment, h: Tensor, tokens: Tokens, indices: Sequence[int]) -> Tensor:
    """h [B, T, D], which passes no gradient back from the rows that these adapters serve, nor from those that none does."""
    if (attachment.served if tokens.serving is None else tokens.serving) <= set(indices):
        return h.detach()
    is_one = torch.stack([tokens.row == index for index in indices]).any(0).to(h.device)
    return torch.where(is_one[:, None, None], h.detach(), h)


def beside_hook(
    attachment: Attachment, port: Port, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Show the edits what the module was called with, and what it returned."""
    tokens, placed = _served(attachment, port)
    for _, placement in placed:
        h = output[0] if isinstance(output, tuple) else output
        _run(placement, h, tokens, {**dict(zip(names, args, strict=False)), **kwargs})


def _written(attachment: Attachment, h: Tensor, start: int) -> Tokens:
    """The tokens of a decoder's call, h [B, T, D], after `start` of earlier calls. They are of one domain: methods at a decoder edit all or none."""
    token_map = attachment.map or of_nobody(h)
    n, end = len(h), start + h.shape[1]
    domain = torch.full(h.shape[:2], ANSWER, device=h.device)
    return Tokens(
        domain=domain,
        ordinal=torch.zeros_like(domain),
        row=token_map.row.to(h.device).repeat_interleave(n // len(token_map.row)),
        position=torch.arange(start, end, device=h.device),
        keys=domain.new_full((n, end), ANSWER),
        present=frozenset({ANSWER}),
        inputs={},
        serving=token_map.serving,
        n_before=start,
        end=end,
        drawn=dict(attachment.encoded.get() or {}),
    )


def _served(attachment: Attachment, port: Port) -> tuple[Tokens, list[tuple[int, Placement]]]:
    """The tokens of the call, and the placements whose adapter serves a row of it; none where a slot alone is read a second time."""
    tokens = attachment._tokens_at(port)
    if tokens.end != tokens.n_before + tokens.domain.shape[1]:
        return tokens, []
    return tokens, [(index, placement) for index, placement in attachment.at[port] if tokens.serving is None or index in tokens.serving]


def _run(placement: Placement, h: Tensor, tokens: Tokens, call: Mapping[str, Any]) -> None:
    """The edit in the dtype of its own weights and where they are; of the call, masks and positions follow."""
    dtype, device = place_of(placement, h)
    placement.edit(h.to(device, dtype), tokens.on(device), {name: _moved(value, dtype, device) for name, value in call.items()})


def _moved(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, dtype, device) for one in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


# ----------------------------------------
# Further layers of a cache.


def further_cache(cache: Any, mark: Hashable, like: int, n_layers: int, n_before: int | None) -> Any:
    """A view of the host's cache that has one layer, at 0, with the keys and values that belong to the mark: a new one, until there are some.

    like      number of the host's layer that the new one is to be like (a window)
    n_layers  of the host
    n_before  tokens of earlier calls, which it must hold; None for any number

    Raises AttachError for a cache that does not grow, and for one that was filled without the network beside.
    """
    if hasattr(cache, "self_attention_cache"):  # an encoder-decoder model's: what is read of the encoder is there after the first call
        view = copy.copy(cache)
        view.self_attention_cache = further_cache(cache.self_attention_cache, mark, like, n_layers, n_before)
        view.cross_attention_cache = further_cache(cache.cross_attention_cache, mark, like, n_layers, None)
        view.is_updated = {0: view.cross_attention_cache.get_seq_length() > 0}
        return view
    layers = getattr(cache, "layers", None)
    if layers is None or any(not _grows(layer) for layer in layers):
        kind = type(cache).__name__
        raise AttachError(
            f"the cache is a {kind} whose layers are of a fixed size or kind, expected a DynamicCache or none: static caches have no layers for a network "
            "that runs beside the model, so generate with the default cache, or with use_cache=False"
        )
    while len(layers) < n_layers:  # a cache that was made without the model's config grows as it is used
        layers.append(cache.layer_class_to_replicate())
    own = next((layer for layer in layers if vars(layer).get(MARK) == mark), None)
    if own is None:
        own = _empty(layers[like], mark)
        layers.append(own)
    if n_before is not None and own.get_seq_length() != n_before:
        raise AttachError(
            f"the cache holds {n_before} tokens, and {own.get_seq_length()} of them were read by the network beside the model: "
            "read the prompt with this adapter in its row before going on with its cache"
        )
    view = copy.copy(cache)
    view.layers = [own]
    return view


def _grows(layer: Any) -> bool:
    names = [kind.__name__ for kind in type(layer).__mro__]
    return "DynamicLayer" in names and not any("Quant" in name for name in names)


def _empty(layer: Any, mark: Hashable) -> Any:
    """A layer of the same kind without keys and values."""
    if hasattr(layer, "further"):  # one that reads another cache's
        made = layer.further(mark)
    else:
        made = copy.copy(layer)
        made.keys = made.values = None
        made.is_initialized = False
        if hasattr(made, "cumulative_length"):
            made.cumulative_length = 0
    setattr(made, MARK, mark)
    return made


def states_of(cache: Any) -> dict[Hashable, tuple[Tensor, Tensor]]:
    """Keys and values [B, H, T, Dh] of each layer of a cache: by its number, and by its mark where it runs beside the host.

    Not of one that does not hold all tokens: no row needs it any more.
    """
    length, found = cache.get_seq_length(), {}
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized and layer.get_seq_length() == length:
            found[vars(layer).get(MARK, number)] = (layer.keys, layer.values)
    return found


def set_states(cache: Any, states: Mapping[Hashable, tuple[Tensor, Tensor]]) -> None:
    """Make these the cache's keys and values, and drop layers beside the host that have none. The host's come first. An empty cache is filled."""
    by_mark = {vars(layer).get(MARK, number): layer for number, layer in enumerate(cache.layers)}
    made: list[Any] = []
    for mark, (keys, values) in states.items():
        layer = by_mark.get(mark)
        if layer is None:
            layer = _empty(made[0], mark) if isinstance(mark, tuple) else cache.layer_class_to_replicate()
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        made.append(layer)
    cache.layers[:] = made
