"""Running an adapted model up to a layer, and starting it there: the layers below hand on what they are given, and hidden states are put in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adalink import AdaptedModel, TokenMap
from multimodal.batch import Batch
from multimodal.fork import calls_of

__all__ = ["LayersBelow"]


class _Arrived(Exception):
    """What enters the layer; nothing after it is needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class LayersBelow:
    """The layers before number `first` of an adapted model's stack, counted from 0; there is at least one."""

    def __init__(self, adapted: AdaptedModel, first: int) -> None:
        stack, names = adapted.attachment.stack, adapted.anatomy.layers
        self.adapted, self.first = adapted, first
        self._below, self._layer = [stack.get_submodule(name) for name in names[:first]], stack.get_submodule(names[first])
        self._n_beside: int | None = None  # values that a layer returns beside the hidden states; None where it returns those alone

    @torch.no_grad()
    def run(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B, T, D]: what the layers below make of whole rows."""
        handles = [
            self._below[-1].register_forward_hook(self._look),
            self._layer.register_forward_pre_hook(_arrived, prepend=True, with_kwargs=True),  # before the adapter's own edits
        ]
        (call,) = calls_of(self.adapted, batch, token_map)
        try:
            with call.bound(self.adapted):
                self.adapted.base(**call.arguments)
        except _Arrived as found:
            return found.states
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError("the stack ran without the layer")

    @contextlib.contextmanager
    def left_out(self, states: Tensor) -> Iterator[None]:
        """Where the model is called on rows whose states are these. `run` was called before."""

        def put(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        own = [vars(layer).get("forward") for layer in self._below]  # where layers are checkpointed
        handle = self._layer.register_forward_pre_hook(put, prepend=True, with_kwargs=True)
        for layer in self._below:
            layer.forward = self._hand_on
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(self._below, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _look(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._n_beside = len(output) - 1 if isinstance(output, tuple) else None

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        return h if self._n_beside is None else (h, *[None] * self._n_beside)


def _arrived(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Arrived(args[0] if args else kwargs["hidden_states"])
