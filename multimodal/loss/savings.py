"""What a training step saves: the last layer runs only where something is predicted, and activations are computed again in place of being stored."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from adalink import AdaptedModel, Port
from adalink.attachment.slots import SERVED, whole_mask
from adalink.tokens import Tokens
from multimodal.batches.prefix_sharing import REFUSALS, ModelCall, agree, trial_call

__all__ = ["Activations", "LastLayer"]


# ----------------------------------------
# The last layer of a language model at the tokens that predict something, and at no other: nothing reads what it makes of the rest.
#
# Keys and values are needed of every token; queries, the feed-forward network and the final norm at the sources of targets alone. For a call
# the layer's forward is replaced: it runs until its cache is given the keys and values, which are stored and end the run, and once more on the
# hidden states at the sources, with a cache that answers with the keys and values of all. So each family is served by its own code. Whether
# that is exact is found out by a trial.


CACHES = ("past_key_values", "layer_past")  # what layers call theirs
WORTH = 0.75  # of the tokens: above it, making queries, keys and values of the sources twice costs what is saved

Form = Literal["short", "filled up"]
"""What follows the layer gets [B, M, D], or the same filled up to [B, T, D] where it counts on as many tokens as came in (GPT-2)."""


class LastLayer:
    """The last layer of an adapted language model, to be run at some of its tokens."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        self.name, self.after = adapted.anatomy.layers[-1], adapted.anatomy.final_norm
        self.layer = adapted.attachment.stack.get_submodule(self.name)

    @contextlib.contextmanager
    def at(self, call: ModelCall) -> Iterator[Tensor]:
        """int64 [B, M]: where the model, run inside the block, gives what the call asks for at `call.source`."""
        rows, n = call.source.shape
        if self.why_whole(call.token_map.serving) is not None or n > WORTH * call.arguments["input_ids"].shape[1]:
            yield call.source
            return
        source = call.source if n else call.source.new_zeros(rows, 1)  # models take no rows without tokens
        assert self._form is not None
        with self._replaced(source, self._form):
            yield torch.arange(n, device=source.device).expand(rows, n)

    def why_whole(self, serving: frozenset[int] | None = None) -> str | None:
        """Why the layer must run on every token for these adapters (None: any that is attached); None where it need not."""
        base: Any = self.adapted.base
        if base.config.is_encoder_decoder or base.config._attn_implementation not in SERVED:
            return "the model has a decoder of its own, or its attention takes no mask for each token"
        after = [] if self.after is None else [self.adapted.attachment.stack.get_submodule(self.after)]
        if any(self._is_watched(part) for module in (self.layer, *after) for part in module.modules()):
            return "something else is hooked to it, or it is checkpointed"
        if self._reads_rows(serving):
            return "the adapter reads whole rows there"
        return None if self._form is not None else "the model was tried so, and gave other scores"

    @cached_property
    def _form(self) -> Form | None:
        """How the model is exact with a short layer. Runs it on thirteen tokens, without its adapters."""
        forms: tuple[Form, ...] = ("short", "filled up")
        return next((form for form in forms if self._is_exact(form)), None)

    @torch.no_grad()
    def _is_exact(self, form: Form) -> bool:
        call = trial_call(self.adapted)
        try:
            with call.bound(self.adapted):
                whole = torch.take_along_dim(self.adapted.base(**call.arguments).logits, call.source[..., None], 1)
                with self._replaced(call.source, form):
                    short = self.adapted.base(**call.arguments).logits[:, : call.source.shape[1]]
            return agree(short, whole)
        except REFUSALS:
            return False

    def _is_watched(self, module: nn.Module) -> bool:
        """Whether anything but the attachment acts on a module: it would see the layer run twice, or be skipped."""
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        is_foreign = any(getattr(hook, "args", ())[:1] != (self.adapted.attachment,) for hook in hooks)
        return is_foreign or module.training or "forward" in vars(module) or bool(module._backward_hooks or module._backward_pre_hooks)

    def _reads_rows(self, serving: frozenset[int] | None) -> bool:
        """Whether an edit there needs tokens that are left out, or runs the layer itself."""
        here = (self.name, self.after)
        return any(
            port.side == "cache"
            or port == Port(self.name, "output")  # it is given the layer's input too
            or placement.whole_call
            or (placement.reads_row and (port.module in here or port.module.startswith(self.name + ".")))
            for port, placed in self.adapted.attachment.at.items()
            for index, placement in placed
            if serving is None or index in serving
        )

    @contextlib.contextmanager
    def _replaced(self, source: Tensor, form: Form) -> Iterator[None]:
        self.layer.forward = partial(self._run, self.layer.forward, source, form)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.forward

    def _run(self, forward: Callable[..., Any], source: Tensor, form: Form, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward: what it gives at `source`, int64 [B, M]. The edits after it see the tokens there."""
        names = tuple(inspect.signature(type(self.layer).forward).parameters)[1:]
        call: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        name = next((name for name in CACHES if name in (*names, *call)), "")
        attachment, hidden, keys = self.adapted.attachment, call["hidden_states"], _Keys(call.get(name))
        tokens = attachment.tokens
        assert tokens is not None
        assert name
        call |= {name: keys}
        with contextlib.suppress(_Found):
            forward(**call)
        assert keys.found is not None
        attachment.tokens = tokens.at(source)
        mask = _queried(call.get("attention_mask"), attachment.tokens, source, hidden.dtype)
        picked = {part: _picked(call[part], source) for part in ("hidden_states", "position_ids", "position_embeddings") if part in call}
        output = forward(**call | picked | {"attention_mask": mask})
        if form == "short":
            return output
        n_more = hidden.shape[1] - source.shape[1]
        attachment.tokens = tokens.at(nn.functional.pad(source, (0, n_more)))
        h, *others = output if isinstance(output, tuple) else (output,)
        h = nn.functional.pad(h, (0, 0, 0, n_more))
        return (h, *others) if isinstance(output, tuple) else h


class _Found(Exception):
    """The keys and values are there."""


class _Keys:
    """A cache for one layer that runs twice: it stores the keys and values of the first run, which it ends, and gives them to the second."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, H, K, D] each, those in the call's own cache before them."""
        if self.found is not None:
            return self.found
        self.found = (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)
        raise _Found

    def __getattr__(self, name: str) -> Any:
        """What else a layer asks of a cache."""
        return getattr(DynamicCache() if self.cache is None else self.cache, name)


def _picked(value: Any, source: Tensor) -> Any:
    """[1 or B, T, ...] at the sources; a tuple of such, or None."""
    if isinstance(value, tuple):
        return tuple(_picked(one, source) for one in value)
    return None if value is None else torch.take_along_dim(value, source.reshape(*source.shape, *(1,) * (value.ndim - 2)), 1)


def _queried(mask: Tensor | None, tokens: Tokens, source: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, M, K]: the rows of a mask [B, H, T, K] for the sources. None stands for causal, which attention would count from the first query."""
    if mask is None:
        may_read = whole_mask(tokens, "causal")
        return torch.zeros_like(may_read, dtype=dtype).masked_fill(~may_read, torch.finfo(dtype).min)
    return mask if mask.shape[2] == 1 else torch.take_along_dim(mask, source[:, None, :, None], 2)


# ----------------------------------------
# Activation functions that save less for the backward pass: results are computed again from inputs that are saved anyway, or are not needed.
#
# The feed-forward network of a Llama saves its gate, its activated gate and what is gated; GPT-2's saves four tensors of its activation function.
# They are the largest that a frozen layer saves, and cost next to nothing to compute: 22 of 121 MiB for at most 1 % of a step
# (tests/benchmarks/RESULTS.md). The same operations are run again, so gradients are the same bit for bit. OPT's ReLU saves its result, of
# which its gradient reads where it is positive: one byte in place of four holds that.


GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Activations:
    """The activation functions of an adapted language model that save more than they need. Runs the model on a few tokens, to try it out."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.layers = [adapted.attachment.stack.get_submodule(name) for name in adapted.anatomy.layers]
        self.forwards = self._found()
        if self.forwards and not self._is_exact(adapted):
            self.forwards = {}

    @contextlib.contextmanager
    def made_again(self) -> Iterator[None]:
        """Inside the block the model saves less for its backward pass. Nothing changes where its layers are checkpointed as they are."""
        # The last layer may be replaced itself. A checkpointed layer that runs again after the block would save more than it did inside.
        runs_again = len(self.layers) == 1 or any(layer.training or "forward" in vars(layer) for layer in self.layers[:-1])
        with contextlib.nullcontext() if runs_again or not torch.is_grad_enabled() else self._replaced():
            yield

    def _found(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        found: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for module in (part for layer in self.layers for part in layer.modules() if "forward" not in vars(part)):
            if {name for name, _ in module.named_children()} == GATED:
                found[module] = partial(_gated, module)
            elif type(module) is NewGELUActivation:
                found[module] = partial(_again, module.forward)
            elif type(module) is nn.ReLU:
                found[module] = _Positive.apply
        return found

    @torch.no_grad()
    def _is_exact(self, adapted: AdaptedModel) -> bool:
        """Whether feed-forward networks with these names do what is done here."""
        call = trial_call(adapted)
        try:
            with call.bound(adapted):
                whole = adapted.base(**call.arguments).logits
                with self._replaced():
                    return torch.equal(whole, adapted.base(**call.arguments).logits)
        except REFUSALS:
            return False

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        for module, forward in self.forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in self.forwards:
                del module.forward


class _Positive(torch.autograd.Function):
    """A ReLU that saves a mask of where its input is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape; NaN stays NaN, as in torch's."""
        ctx.save_for_backward(~(x <= 0))
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """As torch's: the gradient where the result was not 0."""
        (is_cached,) = ctx.saved_tensors
        return torch.where(is_cached, grad, 0.0)


def _gated(module: Any, x: Tensor) -> Tensor:
    """Llama's feed-forward network."""
    result: Tensor = module.down_proj(_again(partial(_product, module.act_fn), module.gate_proj(x), module.up_proj(x)))
    return result


def _product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _again(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """The function's result; for the backward pass only its inputs are saved."""
    result: Tensor = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
    return result
