"""Attach adapters to a frozen model, and leave without a trace.

    attachment = attach(model, adapter)
    with attachment.bind(token_map):
        model(input_ids=...)            # or model.generate(...)
    attachment.detach()

Outside of `bind` the model is the frozen one, untouched. Each thread binds for itself.

Hooks carry no state of their own: where a call starts is read from its cache, what its tokens are from the bound map. What an edit
stores of a prompt for the steps after it (a frozen gate) lies beside the KV cache of that prompt, and goes with it. Only the
attachment applies `h = where(select, edit(h), h)`, so an edit cannot touch a token that is not its own. Edits that can be made at
once (`adalink.edit.Joint`) are, with 0 as their share of other tokens: the same numbers without that pass over h for each.

Order: attach, checkpointing, compile, FSDP / DDP. A model compiled before is refused: Dynamo does not guard on hooks, so it would
return the frozen model's output without an error.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalink.anatomy import Anatomy
from adalink.attachment.slots import HideKeys, check_alone, check_attention, check_reach
from adalink.edit import EMBEDDING, Adapter, Joint, Placement, Port, joins, read_frozen
from adalink.errors import AttachError
from adalink.tokens import BASE_ROW, PREFIX, TokenMap, Tokens

__all__ = ["Attachment", "Bound", "Run", "by_port", "freeze", "give_back", "of_nobody", "place_of", "runs_of", "without_dropout"]


# ----------------------------------------
# A model frozen for as long as anything is attached to it: several attachments come and go in any order, the last gives everything back.


_HELD = "_adalink_frozen"  # in the model's __dict__ while it is frozen


class _Before:
    """What the model was like before the first attachment."""

    def __init__(self, model: nn.Module) -> None:
        # By module and name: where weights are brought when a module runs, the parameter itself is another one each time.
        self.flags = [(module, name, one.requires_grad) for module in model.modules() for name, one in module.named_parameters(recurse=False)]
        self.modes = [(module, module.training) for module in model.modules()]
        self.n_attached = 0


def freeze(model: nn.Module) -> None:
    """requires_grad False and eval mode; the flags from before are saved."""
    before = model.__dict__.setdefault(_HELD, _Before(model))
    before.n_attached += 1
    model.requires_grad_(False).eval()


def give_back(model: nn.Module) -> None:
    """One attachment fewer; with the last one flags and modes are as they were."""
    before: _Before = model.__dict__[_HELD]
    before.n_attached -= 1
    if before.n_attached:
        return
    del model.__dict__[_HELD]
    for module, name, flag in before.flags:
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad_(flag)
    for module, mode in before.modes:
        module.training = mode


# ----------------------------------------
# A value that holds for the calls of one thread (or task), and that a compiled model can read.


T = TypeVar("T")
_VALUES: ContextVar[Mapping[int, Any]] = ContextVar("adalink_bound", default={})  # noqa: B039  # never changed, only replaced; one variable for all, so that models can be copied


class Bound(Generic[T]):
    """None, until it is set, in each thread for itself: two that serve different adapters of one model do not meet.

    Dynamo cannot trace a ContextVar: compiled code reads and writes an attribute, which all threads share. So bind a compiled model in one thread.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._by_compiled = False  # set by compiled code, and to be read by code that is not (after a graph break)

    def get(self) -> T | None:
        """What was set last in this thread."""
        if torch.compiler.is_compiling():
            return self._value
        found: T | None = _VALUES.get().get(id(self))
        return self._value if found is None and self._by_compiled else found

    def set(self, value: T | None) -> None:
        """From now on this value, in this thread."""
        if torch.compiler.is_compiling():
            self._value, self._by_compiled = value, value is not None
            return
        self._value, self._by_compiled = value, False
        others = {key: held for key, held in _VALUES.get().items() if key != id(self)}
        _VALUES.set(others if value is None else {**others, id(self): value})


HookAt = Callable[["Attachment", Port, Port | None], torch.utils.hooks.RemovableHandle]  # as `adalink.attachment.attach.hook_at`


class Attachment:
    """Adapters attached to a frozen model. Made by `attach`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, adapters: tuple[Adapter, ...], hook_at: HookAt) -> None:
        self._hook_at = hook_at
        self.model = model
        self.anatomy = anatomy
        self.stack = model.get_submodule(anatomy.stack)
        self._map, self._tokens = Bound[TokenMap](), Bound[Tokens]()
        # Of the decoder's call that runs in this thread; and what edits of the encoder's call left for it (adalink.attachment.beside).
        self.written, self.encoded = Bound[Tokens](), Bound[dict[nn.Module, Any]]()
        self.at: Mapping[Port, list[tuple[int, Placement]]] = {}
        self._runs: dict[Port, tuple[Run, ...]] = {}
        self.served: frozenset[int] = frozenset()
        self._ports: dict[Port, torch.utils.hooks.RemovableHandle] = {}
        self.retained: WeakKeyDictionary[Any, dict[nn.Module, Tensor]] = WeakKeyDictionary()  # by cache: what edits keep of its prompt, for each row
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
            self.encoded.set(None)

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
            for port in sorted(at, key=lambda port: port.side == "detached"):  # which comes after all that is written there
                if port not in self._ports or port.side == "detached":
                    new[port] = self._hook(port)
        except BaseException:
            for handle in new.values():
                handle.remove()
            raise
        for port in self._ports.keys() - (at.keys() - new.keys()):
            self._ports.pop(port).remove()
        self._ports.update(new)
        self.at, self.served = at, served
        self._runs = {port: runs_of(placed) for port, placed in at.items()}

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
        tokens = (token_map or of_nobody(ids)).window(ids.shape[0], start, length, max(visible, start + length))
        self.tokens = replace(tokens, retained=self.retained.get(cache, {}) if start else None if kwargs.get("use_cache") is False else {})
        if embeds is not None and EMBEDDING in self.at and not self.anatomy.merges_late:
            kwargs = {**kwargs, "inputs_embeds": self._edited(EMBEDDING, embeds, embeds)}
        return args, kwargs

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], output: object) -> None:
        tokens, self.tokens = self.tokens, None
        if tokens is not None and self.anatomy.reader is not None:
            self.encoded.set(tokens.drawn)
        if tokens is not None and tokens.retained and tokens.has_prompt:
            values = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
            if cache is None:
                tokens.retained.clear()
            else:
                self.retained[cache] = tokens.retained

    def _edited(self, port: Port, h: Tensor, x: Tensor) -> Tensor:
        """h after every edit placed at the port, each on its own tokens only."""
        tokens = self._tokens_at(port).on(h.device)
        for run in self._runs[port]:
            if not run.edits_any(tokens):
                continue
            if h.shape[:-1].numel() != tokens.domain.numel():
                raise AttachError(_of_other_tokens(port, h, tokens))
            whole, read = (value.reshape(*tokens.domain.shape, -1) for value in (h, x.to(h.device)))  # OPT flattens [B, T] before its feed-forward
            # Of one token a row, picking rows costs more than editing them all.
            first = run.placements[0]
            rows = None if first.reads_row or first.whole_call or whole.shape[1] == 1 else tokens.rows_of.get(run.index)
            if rows is None:
                h = run(whole, tokens, read).reshape(h.shape)
            else:
                h = whole.index_copy(0, rows, run(whole[rows], tokens.of(run.index), read[rows])).reshape(h.shape)
        return h

    def _tokens_at(self, port: Port) -> Tokens:
        tokens = self.written.get() if port.of == "reader" else self.tokens
        if tokens is None:
            raise AttachError(
                f"port {port.module}.{port.side} ran outside the stack's forward: with gradient checkpointing, use `checkpoint_layers()`, "
                "or non-reentrant checkpointing with context_fn=attachment.checkpoint_contexts"
            )
        return tokens

    def _hook(self, port: Port) -> torch.utils.hooks.RemovableHandle:
        if port.side == "embedding" and self.anatomy.merges_late:
            return self._hook_at(self, Port(self.anatomy.layers[0], "input"), port)
        if port.side == "embedding":
            return self.stack.get_submodule(self.anatomy.embedding).register_forward_hook(self._embedding)
        return self._hook_at(self, port, None)

    def _embedding(self, module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        """Edit the embeddings of the stack's own call; a look-up from outside it is none of ours (existing VLMs merge theirs first).

        Nor is one of something else inside it: BERT-like models look up more than the row.
        """
        return h if self.tokens is None or h.shape[:-1] != self.tokens.domain.shape else self._edited(EMBEDDING, h, h)


def _checkpointed(attachment: Attachment, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=attachment.checkpoint_contexts, **kwargs)


def of_nobody(ids: Tensor) -> TokenMap:
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


# ----------------------------------------
# Edits of one adapter at one port: one after the other, or at once where each is for tokens of its own (LoRA by domain).


@dataclass(frozen=True)
class Run:
    """Placements of one adapter at one port that are made at once, or one that is made alone."""

    index: int
    placements: tuple[Placement, ...]
    modules: tuple[nn.Module, ...]  # all that is called where each edit is made by itself; empty for an edit that is always made so

    def edits_any(self, tokens: Tokens) -> bool:
        """Whether a token of the call can be one of the run's, known without reading a tensor."""
        is_served = tokens.serving is None or self.index in tokens.serving
        return is_served and not all(tokens.present.isdisjoint(placement.domains) for placement in self.placements)

    def __call__(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        """h [B, T, D], edited at the tokens of each placement's domains on rows served by the adapter."""
        placed = [placement for placement in self.placements if not tokens.present.isdisjoint(placement.domains)]
        # Hooks on an edit (a watcher's, FSDP's) see it called.
        if not self.modules or any(module._forward_pre_hooks or module._forward_hooks for module in self.modules):
            for placement in placed:
                h = torch.where(tokens.select(placement.domains, self.index), _as_it_computes(placement, h, tokens, x), h)
            return h
        dtype, device = place_of(placed[0], h)
        there, edits = tokens.on(device), [placement.edit for placement in placed]
        shares = [there.share(placement.domains, self.index, dtype) for placement in placed]
        assert isinstance(edits[0], Joint)
        return edits[0].joint(edits, h.to(device), there, x.to(device, dtype), shares).to(h.device, h.dtype)


def runs_of(placed: Sequence[tuple[int, Placement]]) -> tuple[Run, ...]:
    """The placements of a port in their order. Those of one run follow each other, are of one adapter, join, and have no domain in common."""
    runs: list[tuple[int, list[Placement]]] = []
    for index, placement in placed:
        before, others = runs[-1] if runs else (None, [])
        if before == index and all(joins(other.edit, placement.edit) and set(other.domains).isdisjoint(placement.domains) for other in others):
            others.append(placement)
        else:
            runs.append((index, [placement]))
    return tuple(
        Run(index, tuple(run), tuple(module for one in run for module in one.edit.modules()) if joins(run[0].edit, run[0].edit) else ()) for index, run in runs
    )


def _as_it_computes(placement: Placement, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
    """The edit computed in the dtype of its own weights, and where they (or those that it shares) are; its result as h is."""
    dtype, device = place_of(placement, h)
    result: Tensor = placement.edit(h.to(device, dtype), tokens.on(device), x.to(device, dtype))
    return result.to(h.device, h.dtype)


def place_of(placement: Placement, h: Tensor) -> tuple[torch.dtype, torch.device]:
    """The dtype of an edit's own weights, or of those that it shares, and where they are; those of h where it has none."""
    weight = next((one for module in (placement.edit, *placement.shared.values()) for one in module.parameters()), h)
    return weight.dtype, weight.device


# ----------------------------------------
# Modules without their dropout, for as long as something is generated.


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; afterwards every part of it is in the mode that it was in.

    A new adapter is in training mode, and one that generates while it is trained would drop features at every token.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


# ----------------------------------------
# The placements of attached adapters by their ports, checked against the model before anything is hooked.


def by_port(model: nn.Module, stack: nn.Module, adapters: Mapping[int, Adapter]) -> dict[Port, list[tuple[int, Placement]]]:
    """The placements at each port, with the row index of their adapter. Raises AttachError; changes nothing.

    What hides keys comes last, so that it stays hidden whatever another method opens; and what writes a prefix, which others would edit.
    """
    _refuse_compiled(model)
    _refuse_checkpointed(stack)
    at: dict[Port, list[tuple[int, Placement]]] = defaultdict(list)
    for index, adapter in adapters.items():
        check_alone(adapter)
        for placement in adapter.placements:
            module = _module_at(model.get_submodule(adapter.anatomy.reader or "") if placement.port.of == "reader" else stack, placement.port)
            if placement.domains == (PREFIX,) and placement.port.side == "output":
                check_reach(stack)
            if placement.port.side == "mask":
                check_attention(stack)
            _check_whole(module, placement)
            read_frozen(placement, module)
            at[placement.port].append((index, placement))
    return {port: sorted(placed, key=lambda item: isinstance(item[1].edit, HideKeys) or item[1].domains == (PREFIX,)) for port, placed in at.items()}


def _module_at(stack: nn.Module, port: Port) -> nn.Module:
    with contextlib.suppress(AttributeError):
        return stack.get_submodule(port.module)
    last = port.module.rsplit(".", 1)[-1]
    near = [name for name, _ in stack.named_modules() if name.endswith(last)]
    raise AttachError(
        f"port '{port.module}' is not in this model; names ending in {last}: {', '.join(near[:4]) or 'none'}"
        + (f" and {len(near) - 4} more" if len(near) > 4 else "")
    )


def _check_whole(module: nn.Module, placement: Placement) -> None:
    """Of a linear that tensor parallelism splits, each process has a part of the inputs or of the outputs."""
    weight: Any = module.weight if isinstance(module, nn.Linear) else None
    if type(weight).__name__ == "DTensor" and any(part.is_shard() for part in weight.placements):
        raise AttachError(
            f"{placement.port.module} is split over processes by tensor parallelism, and {placement.role} edits it whole: choose methods at the embedding "
            "or after layers (AdaLink, prompts, bridges, bottleneck, eP-ALM), or load the model without tp_plan"
        )


def _refuse_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise AttachError("the model is already compiled, and a compiled model never sees edits attached later: attach first, then compile")


def _refuse_checkpointed(stack: nn.Module) -> None:
    """transformers' own checkpointing: a layer that runs again knows its tokens from `context_fn` alone, which reentrant checkpointing has not."""
    for module in stack.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        settings = getattr(run, "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and run is not None and (settings.get("use_reentrant", True) or "context_fn" not in settings):
            kind = "reentrant" if settings.get("use_reentrant", True) else "without the context_fn of an attachment"
            raise AttachError(
                f"the model's gradient checkpointing is {kind}, and layers that run again would not know their tokens: call "
                "model.gradient_checkpointing_disable() before attaching, and attachment.checkpoint_layers() after it"
            )
