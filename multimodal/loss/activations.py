"""Activation functions that keep less for the backward pass: results are made again from inputs that are kept anyway, or are not needed.

The feed-forward network of a Llama keeps its gate, its activated gate and what is gated; GPT-2's keeps four tensors of its activation function.
They are the largest that a frozen layer keeps, and cost next to nothing to make: 22 of 121 MiB for at most 1 % of a step
(tests/benchmarks/RESULTS.md). The same operations are run again, so gradients are the same bit for bit. OPT's ReLU keeps its result, of
which its gradient reads where it is positive: one byte of each four tells that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from adalink import AdaptedModel
from multimodal.batches.prefix_sharing import REFUSALS, trial_call

__all__ = ["Activations"]

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Activations:
    """The activation functions of an adapted language model that keep more than they need. Runs the model on a few tokens, to try it out."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.layers = [adapted.attachment.stack.get_submodule(name) for name in adapted.anatomy.layers]
        self.forwards = self._found()
        if self.forwards and not self._is_exact(adapted):
            self.forwards = {}

    @contextlib.contextmanager
    def made_again(self) -> Iterator[None]:
        """Inside the block the model keeps less for its backward pass. Nothing changes where its layers are checkpointed as they are."""
        # The last layer may be replaced itself. A checkpointed layer that runs again after the block would keep more than it did inside.
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
    """A ReLU that keeps where its input is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape; NaN stays NaN, as in torch's."""
        ctx.save_for_backward(~(x <= 0))
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """As torch's: the gradient where the result was not 0."""
        (is_kept,) = ctx.saved_tensors
        return torch.where(is_kept, grad, 0.0)


def _gated(module: Any, x: Tensor) -> Tensor:
    """Llama's feed-forward network."""
    result: Tensor = module.down_proj(_again(partial(_product, module.act_fn), module.gate_proj(x), module.up_proj(x)))
    return result


def _product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _again(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """What the function gives; for the backward pass only its inputs are kept."""
    result: Tensor = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
    return result
