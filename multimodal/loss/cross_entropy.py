"""Cross entropy of hidden states through a language model's head, a chunk of targets at a time: no [targets, V] tensor exists.

A frozen linear head gives its gradient in the forward pass, chunk by chunk, so that its logits are made once and never kept. A head that
is trained, or that is more than a linear, is run in chunks whose logits are made again in the backward pass. float16 takes this way too:
a loss scaler acts in the backward pass, and gradients of the forward pass would have underflowed before it.

torch's own `linear_cross_entropy` (2.13) does the first for a head that nothing follows; here it is no faster, and by default 4 to 8 times slower
(tests/benchmarks/RESULTS.md), and it knows no scale, no cap and no weights of single targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from adalink.attachment.existing import NO_LABEL

__all__ = ["Finish", "targets_at_once", "word_loss"]

CHUNK_SCORES = 2**23  # targets x V at a time: 32 MiB in float32, and enough targets for a matrix product at its full rate
LEAST_TARGETS = 64


@dataclass(frozen=True)
class Finish:
    """What a model makes of the scores y of its head: scale * y (Cohere, Granite), then cap * tanh(y / cap) (Gemma 2)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores that the model's probabilities are made of."""
        scores = scores * self.scale if self.scale != 1.0 else scores
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


def word_loss(hidden: Tensor, target: Tensor, head: nn.Module, finish: Finish, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, float [] (float32 at least), and int64 []: how many targets there are.

    hidden  float [..., D]   what the head is given, at the places that predict
    target  int64 [...]      NO_LABEL for none
    weight  float [...]      of each target in the sum; none: 1
    """
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    weight = None if weight is None else weight.reshape(-1)
    count = (target != NO_LABEL).sum()
    if _is_frozen_linear(head) and (dtype := _dtype(hidden)) != torch.float16:
        bias = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the weights are cast once, not for each chunk
            return _FrozenHead.apply(hidden.to(dtype), head.weight.to(dtype), bias, target, weight, finish), count  # type: ignore[no-any-return, operator]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for chunk in _chunks(len(hidden), _vocabulary(head)):
        part = None if weight is None else weight[chunk]
        total = total + checkpoint(_summed, hidden[chunk], target[chunk], head, finish, part, use_reentrant=False)
    return total, count


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is a linear and no more: no subclass (a quantised one), and none of its weights trained."""
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


def _dtype(hidden: Tensor) -> torch.dtype:
    """What a linear computes in here: autocast's dtype where that is on. It leaves float64 alone."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64 else hidden.dtype


def _vocabulary(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 2**17))


def targets_at_once(vocabulary: int) -> int:
    """How many targets a chunk holds."""
    return max(LEAST_TARGETS, CHUNK_SCORES // vocabulary)


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = targets_at_once(vocabulary)
    return [slice(start, start + size) for start in range(0, n, size)]


def _summed(hidden: Tensor, target: Tensor, head: nn.Module, finish: Finish, weight: Tensor | None) -> Tensor:
    """The loss as autograd knows it: every score of these targets at once."""
    scores = finish(head(hidden))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = nn.functional.cross_entropy(scores, target, ignore_index=NO_LABEL, reduction="none")
    return losses.sum() if weight is None else (losses * weight).sum()


class _FrozenHead(torch.autograd.Function):
    """The loss of a frozen linear head; what its backward pass gives is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, finish: Finish) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(len(hidden), len(matrix)):
            scores = nn.functional.linear(hidden[chunk], matrix, bias).to(total.dtype)
            loss, by_score = _gradient(scores, target[chunk], None if weight is None else weight[chunk], finish, gradient is not None)
            total += loss
            if gradient is not None:
                torch.mm(by_score.to(matrix.dtype), matrix, out=gradient[chunk])
            del scores, by_score  # else the next chunk's scores are made beside them
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * by_total).to(gradient.dtype), None, None, None, None, None


def _gradient(scores: Tensor, target: Tensor, weight: Tensor | None, finish: Finish, needed: bool) -> tuple[Tensor, Tensor]:
    """float []: the summed loss of a chunk, and float [n, V]: its gradient by the head's scores, which is written over them."""
    if finish.scale != 1.0:
        scores.mul_(finish.scale)
    capped = None
    if finish.cap is not None:
        capped = scores.div_(finish.cap).tanh_()
        scores = capped * finish.cap
    is_target = target != NO_LABEL
    index = torch.where(is_target, target, 0)[:, None]
    share = is_target.to(scores.dtype) if weight is None else torch.where(is_target, weight.to(scores.dtype), 0.0)
    highest = scores.amax(1, keepdim=True)
    picked = scores.gather(1, index) - highest
    powers = scores.sub_(highest).exp_()
    norm = powers.sum(1, keepdim=True)
    loss = ((norm.log() - picked)[:, 0] * share).sum()
    if needed:
        powers.mul_(share[:, None] / norm).scatter_add_(1, index, -share[:, None])
        if capped is not None:
            powers.mul_(capped.square_().neg_().add_(1.0))
        if finish.scale != 1.0:
            powers.mul_(finish.scale)
    return loss, powers
