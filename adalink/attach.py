"""Attach adapters to a frozen model, and leave without a trace.

    attachment = attach(model, adapter)
    with attachment.bind(token_map):
        model(input_ids=...)            # or model.generate(...)
    attachment.detach()

Outside of `bind` the model is the frozen one, untouched. Each thread binds for itself.

Hooks carry no state of their own: where a call starts is read from its cache, what its tokens are from the bound map. What an edit
keeps of a prompt for the steps after it (a frozen gate) is kept beside the cache of that prompt, and goes with it. Only the
attachment applies `h = where(select, edit(h), h)`, so an edit cannot touch a token that is not its own.

Order: attach, checkpointing, compile, FSDP / DDP. A model compiled before is refused: Dynamo does not guard on hooks, so it would
return the frozen model's output and say nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalink.anatomy import Anatomy
from adalink.bound import Bound
from adalink.edit import EMBEDDING, Adapter, Placement, Port
from adalink.errors import AttachError
from adalink.freezing import freeze, give_back
from adalink.hooks import hook_at
from adalink.ports import by_port
from adalink.tokens import BASE_ROW, TokenMap, Tokens

__all__ = ["Attachment", "attach"]


def attach(model: nn.Module, *adapters: Adapter, anatomy: Anatomy | None = None) -> Attachment:
    """Attach adapters to a frozen model: row index i of a token map means adapters[i].

    Freezes the model (requires_grad False, eval mode). Raises AttachError for a compiled model, or a port that the model lacks.
    """
    return Attachment(model, anatomy or Anatomy.read(model), adapters)


class Attachment:
    """Adapters attached to a frozen model. Made by `attach`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, adapters: tuple[Adapter, ...]) -> None:
        self.model = model
        self.anatomy = anatomy
        self.stack = model.get_submodule(anatomy.stack)
        self._map, self._tokens = Bound[TokenMap](), Bound[Tokens]()
        self.at: Mapping[Port, list[tuple[int, Placement]]] = {}
        self.served: frozenset[int] = frozenset()
        self._ports: dict[Port, torch.utils.hooks.RemovableHandle] = {}
        self.kept: WeakKeyDictionary[Any, dict[nn.Module, Tensor]] = WeakKeyDictionary()  # by cache: what edits keep of its prompt, for each row
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any]] = []  # layers whose forward is wrapped by checkpoint_layers, and one that was there before
        self._may_cache = "use_cache" in inspect.signature(type(self.stack).forward).parameters
        at = by_port(model, self.stack, dict(enumerate(adapters)))
        freeze(model)
        try:
            self._handles += [
                self.stack.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.stack.register_forward_hook(self._leave, always_call=True),
            ]
            self._place(at, frozenset(range(len(adapters))))
        except BaseException:
            self.detach()
            raise

    @property
    def map(self) -> TokenMap | None:
        """What is bound in this thread; None outside of `bind`."""
        return self._map.get()

    @map.setter
    def map(self, token_map: TokenMap | None) -> None:
        self._map.set(token_map)

    @property
    def tokens(self) -> Tokens | None:
        """The tokens of the stack's call that runs in this thread; None outside of one."""
        return self._tokens.get()

    @tokens.setter
    def tokens(self, tokens: Tokens | None) -> None:
        self._tokens.set(tokens)

    def serve(self, adapters: Mapping[int, Adapter]) -> None:
        """From now on these adapters, each by its row index, in place of those before. Modes, flags and checkpointing stay as they are.

        Token maps made earlier stay right as long as an adapter keeps its index. Raises AttachError before anything has changed.
        """
        if not self._handles:
            raise AttachError("this attachment was detached and serves nothing any more: attach the adapters to the model again")
        self._place(by_port(self.model, self.stack, adapters), frozenset(adapters))

    @contextlib.contextmanager
    def bind(self, token_map: TokenMap) -> Iterator[None]:
        """Say what the tokens are for every call of the model inside the block. Raises AttachError where a row's adapter is gone."""
        if token_map.serving is not None and (gone := token_map.serving - self.served):
            raise AttachError(
                f"the token map names adapters by the row indices {sorted(gone)}, which are not attached (attached: {sorted(self.served)}): "
                "an adapter was deleted after the map was made, so make the map again"
            )
        previous, self.map = self.map, token_map
        try:
            yield
        finally:
            self.map = previous

    def checkpoint_layers(self) -> None:
        """Recompute each layer's activations in the backward pass: memory for time, with the same gradients.

        Works on layers in eval mode, as frozen ones are; transformers' own switch acts only in training mode, where dropout is on.
        """
        for name in self.anatomy.layers:
            layer = self.stack.get_submodule(name)
            self._forwards.append((layer, layer.__dict__.get("forward")))
            layer.forward = partial(_checkpointed, self, layer.forward)  # type: ignore[method-assign]

    @property
    def is_checkpointed(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return bool(self._forwards)

    def keep_activations(self) -> None:
        """The reverse of `checkpoint_layers`."""
        for layer, before in self._forwards:
            layer.__dict__.pop("forward", None)
            if before is not None:  # accelerate's, which brings the layer's weights
                layer.forward = before
        self._forwards = []

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        """Give this as `context_fn` to non-reentrant checkpointing: the recompute sees the tokens of its own forward."""
        return contextlib.nullcontext(), self._rebound(self.tokens)

    def detach(self) -> None:
        """Take everything back: hooks, checkpointing, requires_grad flags and modes are as they were. A second time changes nothing."""
        if not self._handles:
            return
        for handle in [*self._handles, *self._ports.values()]:
            handle.remove()
        self._handles, self._ports = [], {}
        self.keep_activations()
        give_back(self.model)

    @contextlib.contextmanager
    def _rebound(self, tokens: Tokens | None) -> Iterator[None]:
        previous, self.tokens = self.tokens, tokens
        try:
            yield
        finally:
            self.tokens = previous

    def _place(self, at: Mapping[Port, list[tuple[int, Placement]]], served: frozenset[int]) -> None:
        """Hooks at these ports and no others; a hook that stays keeps its place among the hooks of its module."""
        new: dict[Port, torch.utils.hooks.RemovableHandle] = {}
        try:
            for port in at:
                if port not in self._ports:
                    new[port] = self._hook(port)
        except BaseException:
            for handle in new.values():
                handle.remove()
            raise
        for port in self._ports.keys() - at.keys():
            self._ports.pop(port).remove()
        self._ports.update(new)
        self.at, self.served = at, served

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        token_map, embeds = self.map, kwargs.get("inputs_embeds")
        ids = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if ids is None and token_map is None:
            return args, kwargs  # the frozen model says itself what it lacks
        if ids is None:
            raise AttachError(f"{type(stack).__name__} was called without input_ids or inputs_embeds: pass one of them")
        cache, length = kwargs.get("past_key_values"), ids.shape[1]
        start = int(cache.get_seq_length()) if cache is not None else 0
        visible = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        if self._forwards and torch.is_grad_enabled() and self._may_cache:  # unasked too, inside an existing vision-language model
            kwargs = {**kwargs, "use_cache": False}  # a recompute would write the cache a second time
        tokens = (token_map or _of_nobody(ids)).window(ids.shape[0], start, length, max(visible, start + length))
        self.tokens = replace(tokens, kept=self.kept.get(cache, {}) if start else None if kwargs.get("use_cache") is False else {})
        if embeds is not None and EMBEDDING in self.at and not self.anatomy.merges_late:
            kwargs = {**kwargs, "inputs_embeds": self._edited(EMBEDDING, embeds, embeds)}
        return args, kwargs

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], output: object) -> None:
        tokens, self.tokens = self.tokens, None
        if tokens is not None and tokens.kept and tokens.has_prompt:
            values = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
            if cache is None:
                tokens.kept.clear()
            else:
                self.kept[cache] = tokens.kept

    def _edited(self, port: Port, h: Tensor, x: Tensor) -> Tensor:
        """h after every edit placed at the port, each on its own tokens only."""
        tokens = self._tokens_at(port).on(h.device)
        for index, placement in self.at[port]:
            if tokens.present.isdisjoint(placement.domains) or (tokens.serving is not None and index not in tokens.serving):
                continue
            if h.shape[:-1].numel() != tokens.domain.numel():
                raise AttachError(_of_other_tokens(port, h, tokens))
            whole, read = (value.reshape(*tokens.domain.shape, -1) for value in (h, x.to(h.device)))  # OPT flattens [B, T] before its feed-forward
            # Of one token a row, picking rows costs more than editing them all.
            rows = None if placement.reads_row or whole.shape[1] == 1 else tokens.rows_of.get(index)
            if rows is None:
                h = _where(placement, index, whole, tokens, read).reshape(h.shape)
            else:
                h = whole.index_copy(0, rows, _where(placement, index, whole[rows], tokens.of(index), read[rows])).reshape(h.shape)
        return h

    def _tokens_at(self, port: Port) -> Tokens:
        if self.tokens is None:
            raise AttachError(
                f"port {port.module}.{port.side} ran outside the stack's forward: with gradient checkpointing, use `checkpoint_layers()`, "
                "or non-reentrant checkpointing with context_fn=attachment.checkpoint_contexts"
            )
        return self.tokens

    def _hook(self, port: Port) -> torch.utils.hooks.RemovableHandle:
        if port.side == "embedding" and self.anatomy.merges_late:
            return hook_at(self, Port(self.anatomy.layers[0], "input"), port)
        if port.side == "embedding":
            return self.stack.get_submodule(self.anatomy.embedding).register_forward_hook(self._embedding)
        return hook_at(self, port)

    def _embedding(self, module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        """Edit the embeddings of the stack's own call; a look-up from outside it is none of ours (existing VLMs merge theirs first).

        Nor is one of something else inside it: BERT-like models look up more than the row.
        """
        return h if self.tokens is None or h.shape[:-1] != self.tokens.domain.shape else self._edited(EMBEDDING, h, h)


def _checkpointed(attachment: Attachment, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=attachment.checkpoint_contexts, **kwargs)


def _of_nobody(ids: Tensor) -> TokenMap:
    """The map of a call that is not bound: no adapter serves its rows. ids [B, T] or [B, T, D]."""
    domain = torch.zeros(len(ids), 1, dtype=torch.int64, device=ids.device)
    return TokenMap(domain, torch.full_like(domain[:, 0], BASE_ROW), present=frozenset(), serving=frozenset())


def _of_other_tokens(port: Port, h: Tensor, tokens: Tokens) -> str:
    """The sentence for a module that ran on more, or fewer, tokens than the row has."""
    ran_on, have = (" x ".join(map(str, shape)) for shape in (h.shape[:-1], tokens.domain.shape))
    return (
        f"{port.module or 'the embedding'} ran on {ran_on} tokens, and the rows of the call have {have}: the model puts an image's features among the words, "
        "and no id says which tokens they are; adapt its word embeddings (AdaLink for text), call it without an image, or choose a model whose image tokens "
        "have an id, such as LLaVA or Qwen2-VL"
    )


def _where(placement: Placement, index: int, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
    """h [B, T, D], edited at the tokens of the placement's domains on rows served by the adapter."""
    return torch.where(tokens.select(placement.domains, index), _as_it_computes(placement, h, tokens, x), h)


def _as_it_computes(placement: Placement, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
    """The edit computed in the dtype of its own weights, and where they (or those that it shares) are; its result as h is."""
    dtype = next(placement.edit.parameters(), h).dtype
    device = next((one.device for module in (placement.edit, *placement.shared.values()) for one in module.parameters()), h.device)
    result: Tensor = placement.edit(h.to(device, dtype), tokens.on(device), x.to(device, dtype))
    return result.to(h.device, h.dtype)
