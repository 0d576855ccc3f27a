"""Attach an adapter to a frozen vision transformer: the same methods, edits and ports as in a language model.

    attachment = attach_vision(encoder, Adapter({"adalink": AdaLink(rank=16, modalities=("image",))}, read_vision(encoder)))
    encoder(pixel_values)               # every call is edited: all tokens are a picture's
    attachment.detach()

AdaLink edits the patches where the patch embedding gives them, before class token and positions. Inside the layers every token is
IMAGE, class and register tokens too. Prompts are visual prompt tokens (VPT, arXiv 2203.12119, its shallow form): they follow the
encoder's own tokens through the layers, and what a layer gives comes without them, so whoever reads the encoder's features, of any
layer, reads its own tokens alone. That takes a state during a call; so the layers of an encoder with slots are not checkpointed.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adalink.edit import EMBEDDING, Adapter, Placement, Port
from adalink.errors import AttachError, ConfigError
from adalink.freezing import freeze, give_back
from adalink.ports import by_port
from adalink.tokens import DOMAIN_NAMES, IMAGE, TokenMap, Tokens
from adalink.vision_anatomy import read_vision

__all__ = ["VisionAttachment", "attach_vision"]


def attach_vision(model: nn.Module, adapter: Adapter) -> VisionAttachment:
    """Attach an adapter, made with `read_vision(model)`, to a frozen vision transformer, and freeze the model.

    Raises AttachError for a compiled model or a port that it lacks, ConfigError for edits of tokens that a picture does not have.
    """
    return VisionAttachment(model, adapter)


class VisionAttachment:
    """An adapter attached to a frozen vision transformer. Made by `attach_vision`."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.anatomy = read_vision(model)
        self.model = model
        self.slots = [slot.domain for slot in adapter.slots for _ in range(slot.count)]
        _check(adapter)
        self.at: dict[Port, list[Placement]] = defaultdict(list)
        for port, placed in by_port(model, model, {0: adapter}).items():
            self.at[port] = [placement for _, placement in placed]
        self._tokens: Tokens | None = None
        self._carried: Tensor | None = None  # the slots between two layers [B, S, D]
        self._handles: list[Any] = []
        freeze(model)
        try:
            for i, name in enumerate(self.anatomy.layers):
                layer = model.get_submodule(name)
                self._handles.append(layer.register_forward_pre_hook(partial(self._into_layer, i == 0), with_kwargs=True))
                # Before every other hook: transformers collects what layers give with hooks of its own.
                self._handles.append(layer.register_forward_hook(self._out_of_layer, prepend=True))
            self._handles += [self._hook(port) for port in self.at]
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything back: hooks, requires_grad flags and modes are as they were. A second time changes nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        give_back(self.model)

    def _hook(self, port: Port) -> torch.utils.hooks.RemovableHandle:
        if port == EMBEDDING:
            return self.model.get_submodule(self.anatomy.embedding).register_forward_hook(self._patches)
        module = self.model.get_submodule(port.module)
        if port.side == "output":
            return module.register_forward_hook(partial(self._output, port), prepend=True)
        return module.register_forward_pre_hook(partial(self._input, port))

    def _patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Edit the feature map [B, D, h, w] of the patch embedding as tokens [B, h * w, D]."""
        h = output.flatten(2).transpose(1, 2)
        h = self._edited(EMBEDDING, h, h, _tokens(h, [IMAGE] * h.shape[1]))
        return h.transpose(1, 2).reshape(output.shape)

    def _into_layer(self, is_first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        if is_first:
            self._tokens = _tokens(h, [IMAGE] * h.shape[1] + self.slots)
            self._carried = None
        if not self.slots:
            return args, kwargs
        if self._carried is None:
            _refuse_shaped(layer, args, kwargs)
            empty = h.new_zeros(len(h), len(self.slots), h.shape[2])
            self._carried = self._edited(EMBEDDING, empty, empty, _tokens(h, self.slots))
        h = torch.cat([h, self._carried], 1)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def _out_of_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.slots:
            return None
        h = output[0] if isinstance(output, tuple) else output
        n_own = h.shape[1] - len(self.slots)
        self._carried, own = h[:, n_own:], h[:, :n_own]
        return (own, *output[1:]) if isinstance(output, tuple) else own

    def _output(self, port: Port, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = self._edited(port, h, args[0], self._tokens)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _input(self, port: Port, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._edited(port, args[0], args[0], self._tokens), *args[1:])

    def _edited(self, port: Port, h: Tensor, x: Tensor, tokens: Tokens | None) -> Tensor:
        """h after every edit placed at the port, each on its own tokens only."""
        assert tokens is not None
        for placement in self.at[port]:
            if tokens.present.isdisjoint(placement.domains):
                continue
            dtype = next((parameter.dtype for parameter in placement.edit.parameters()), h.dtype)
            edited: Tensor = placement.edit(h.to(dtype), tokens, x.to(dtype))
            h = torch.where(tokens.select(placement.domains, 0), edited.to(h.dtype), h)
        return h


def _tokens(h: Tensor, domains: list[int]) -> Tokens:
    """Every row has the same tokens, and one adapter serves all."""
    domain = torch.tensor(domains, device=h.device).expand(len(h), -1)
    row = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    return TokenMap(domain, row, present=frozenset(domains)).window(len(h), 0, len(domains), len(domains))


def _check(adapter: Adapter) -> None:
    possible = {IMAGE, *(slot.domain for slot in adapter.slots)}
    names = {domain: name for name, domain in DOMAIN_NAMES.items()}
    for placement in adapter.placements:
        if placement.port.side not in ("embedding", "input", "output"):
            raise ConfigError(f"the edit {placement.role} changes the {placement.port.side} of a language model, which a vision encoder does not have")
        if possible.isdisjoint(placement.domains):
            wanted = ", ".join(names.get(domain, f"domain {domain}") for domain in placement.domains)
            raise ConfigError(f"the edit {placement.role} is for {wanted} tokens, and a vision encoder has image tokens: name the image modality")


def _refuse_shaped(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise AttachError where a layer is told something of each token: it would not know of the slots."""
    if any(isinstance(value, Tensor | tuple | list) for value in (*args[1:], *kwargs.values()) if value is not None):
        raise AttachError(
            f"{type(layer).__name__} is given masks or positions for its tokens, and slots have none: "
            "use an edit without slots (AdaLink, LoRA, BitFit, IA3)"
        )
