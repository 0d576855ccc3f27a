"""What a frozen language model loses on the targets of a batch: its last layer is run, and its head scores, where there are targets alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from adalink import BASE_ROW, AdaptedModel, TokenMap
from adalink.attachment.existing import NO_LABEL
from adalink.errors import ConfigError
from multimodal.batches.collate import FLEX, Batch
from multimodal.batches.prefix_sharing import ModelCall, calls_of, check_packed
from multimodal.loss.hidden_states import LowerStates
from multimodal.loss.savings import Activations, LastLayer
from multimodal.loss.teachers import Followed

__all__ = ["Finish", "LanguageLoss", "WordHead", "read_word_head", "targets_at_once", "word_loss"]


# ----------------------------------------
# Cross entropy of hidden states through a language model's head, a chunk of targets at a time: no [targets, V] tensor exists.
#
# A frozen linear head gives its gradient in the forward pass, chunk by chunk, so that its logits are computed once and never stored. A head that
# is trained, or that is more than a linear, is run in chunks whose logits are made again in the backward pass. float16 takes this way too:
# a loss scaler acts in the backward pass, and gradients of the forward pass would have underflowed before it.
#
# torch's own `linear_cross_entropy` (2.13) does the first for a head that nothing follows; here it is no faster, and by default 4 to 8 times slower
# (tests/benchmarks/RESULTS.md), and it knows no scale, no cap and no weights of single targets.


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


# ----------------------------------------
# The head of a language model, which turns hidden states into a score for each word: left out of the model's run, and given to the loss.
#
# What a model does between its layers and its head (T5's scaling) is done by the model itself: its head is replaced for the call by one that
# keeps what it is given. What it does with the scores (a scale, a cap) is found out once, by a head that gives known numbers.


# Where transformers' models keep what they do with scores; each is believed only where the model itself says the same.
SCALES = (("logit_scale", 1), ("logits_scaling", -1), ("output_multiplier", 1))  # name in the config, and the power it is taken to
CAPS = ("final_logit_softcapping", "logits_soft_cap")


class _Retained:
    """Stands in for a head: keeps what it is given, and gives known scores, or one token's zeros for the model to go on with."""

    def __init__(self, vocabulary: int, scores: Tensor | None = None) -> None:
        self.vocabulary, self.scores = vocabulary, scores
        self.hidden: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden.new_zeros(1, 1, self.vocabulary) if self.scores is None else self.scores


@dataclass(frozen=True)
class WordHead:
    """A head, and what its model makes of its scores. `finish` is None where that was not understood: the model's own logits are used.

    stand_in  the same for every call: a compiled model knows it by what it is
    """

    module: nn.Module
    finish: Finish | None
    stand_in: _Retained

    @property
    def note(self) -> str:
        """A line for the log: how the loss is computed."""
        if self._is_apart():
            return "logits in chunks of targets, none stored"
        why = "something is hooked to the head" if _is_watched(self.module) else "what this model makes of its head's scores is not known"
        return f"logits of every token at once: {why}"

    def loss(self, call: Callable[..., Any], arguments: Mapping[str, Any], source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """float []: cross entropy summed over targets. call: the model, or what runs it; source and target: int64 [B, M], see Batch."""
        hidden, head, finish = self.states(call, arguments, source)
        return word_loss(hidden, target, head, finish, weight)[0]

    def states(self, call: Callable[..., Any], arguments: Mapping[str, Any], source: Tensor) -> tuple[Tensor, nn.Module, Finish]:
        """float [B, M, D]: what a head is given at the sources, and that head: or the model's logits, which need none."""
        if not self._is_apart():
            return torch.take_along_dim(call(**arguments).logits, source[..., None], 1), nn.Identity(), Finish()
        assert self.finish is not None
        return torch.take_along_dim(self.hidden(call, arguments), source[..., None], 1), self.module, self.finish

    def hidden(self, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
        """float [B, T, D]: what the head is given in a call, without the head's work."""
        with _replaced(self.module, self.stand_in):
            call(**arguments)
        hidden, self.stand_in.hidden = self.stand_in.hidden, None
        assert hidden is not None
        return hidden

    def _is_apart(self) -> bool:
        """Whether nothing must see the head at work: hooks and edits at the head read whole rows."""
        return self.finish is not None and not _is_watched(self.module)


def read_word_head(model: AdaptedModel) -> WordHead:
    """The head of an adapted language model. Runs the model on two tokens, without its adapters."""
    module = model.base.get_output_embeddings()  # type: ignore[operator]
    return WordHead(module, None if _is_watched(module) else _finish(model, module), _Retained(len(module.weight)))


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


@contextlib.contextmanager
def _replaced(module: nn.Module, by: _Retained) -> Iterator[_Retained]:
    module.forward = by
    try:
        yield by
    finally:
        del module.forward


@torch.no_grad()
def _finish(model: AdaptedModel, module: nn.Module) -> Finish | None:
    """What the model makes of known scores. None where no config setting describes it, or the head is not run on hidden states."""
    base: Any = model.base
    ids = torch.zeros(1, 2, dtype=torch.int64, device=base.device)
    vocabulary, width = module.weight.shape  # type: ignore[operator, misc]
    sizes = torch.logspace(-3, 4, vocabulary, device=base.device)  # so wide that no cap and no scale looks like another
    scores = torch.stack([sizes, -sizes])[None]
    arguments = {"input_ids": ids, "use_cache": False, **({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})}
    token_map = TokenMap(ids, torch.full((1,), BASE_ROW, device=base.device), serving=frozenset())
    with model.attachment.bind(token_map), _replaced(module, _Retained(vocabulary, scores)) as retained:
        try:
            found = base(**arguments).logits.float()
        except (RuntimeError, ValueError, TypeError):
            return None
    if retained.hidden is None or retained.hidden.shape != (1, 2, width) or found.shape != scores.shape:
        return None
    return next((finish for finish in _candidates(base.config.get_text_config(decoder=True)) if torch.allclose(finish(scores), found, rtol=1e-5, atol=0)), None)


def _candidates(config: Any) -> list[Finish]:
    scales = [getattr(config, name) ** power for name, power in SCALES if getattr(config, name, None)]
    caps = [getattr(config, name) for name in CAPS if getattr(config, name, None)]
    return [Finish(scale, cap) for scale, cap in product([1.0, *scales], [None, *caps])]


class LanguageLoss:
    """Runs an adapted language model on batches.

    call      what runs the model: itself, or a compiled form of it
    lower     the cached states of texts, which replace the layers below them; whole rows are then read at once
    followed  adapters whose words are learnt in the place of the targets' own; None: the targets'
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        self.call: Callable[..., Any] = adapted.base
        self.last_layer = LastLayer(adapted)
        self.lower: LowerStates | None = None
        self.followed: Followed | None = None

    @cached_property
    def head(self) -> WordHead:
        """The model's head, read at the first use: that runs the model on two tokens."""
        return read_word_head(self.adapted)

    @cached_property
    def activations(self) -> Activations:
        """Its activation functions, tried at the first use."""
        return Activations(self.adapted)

    @property
    def note(self) -> str:
        """A line for the log: how much of the last layer is run, and what is cached of the layers below the adapter."""
        why = self.last_layer.why_whole(self.adapted.serving(1).serving) if self._is_eager else "the model is compiled"
        last = "the last layer runs where something is predicted" if why is None else f"the last layer runs on every token: {why}"
        return last if self.lower is None else f"{last}; {self.lower.note}"

    @property
    def attention_note(self) -> str:
        """A line for the log: which attention runs, and how packed rows reach it."""
        kind = self.adapted.base.config.get_text_config()._attn_implementation  # type: ignore[union-attr, operator]
        how = {
            FLEX: "compiled, with a mask of blocks of which it skips those that nothing reads",
            "sdpa": "torch chooses the kernel; rows with several texts have a mask, with which it is not flash",
        }.get(kind, "as transformers runs it")
        return f"attention: {kind}, {how}"

    def __call__(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float []: cross entropy summed over the batch's targets, each times its weight, or the divergence from what is followed.

        Raises ConfigError for packed rows that an adapter would mix, and for weights where something is followed.
        """
        adapted = self.adapted
        if batch.segment is not None and adapted.active:
            check_packed(adapted.active_adapter(), batch.domain, batch.segment, batch.token_image)
        if batch.weight is not None and self.followed is not None:
            raise ConfigError("the batch's texts have weights, and train.teachers follows words in the place of texts: give one of them")
        batch = batch if self.lower is None else replace(batch, shared_prefix=None)
        head = self.head  # before a map is bound: to be read, it runs the model
        if not self._is_eager:
            torch.compiler.cudagraph_mark_step_begin()  # what CUDA graphs gave in the step before may be overwritten
        else:
            _ = self.activations  # likewise, and before the last layer is shortened
        calls = calls_of(adapted, batch, token_map)
        total, taught = torch.zeros((), device=batch.ids.device), self._taught(batch, token_map, len(calls))
        for number, one in enumerate(calls):
            with one.bound(adapted), self._asked(one) as source, self._started(batch, token_map):
                if self.followed is None:
                    total = total + head.loss(self.call, one.arguments, source, one.target, batch.weight)
                else:
                    hidden, own, finish = head.states(self.call, one.arguments, source)
                    total = total + self.followed.loss(hidden, taught[number], one.target, own, finish, targets_at_once(_vocabulary(own)))
        return total

    @torch.no_grad()
    def _taught(self, batch: Batch, token_map: TokenMap, n_calls: int) -> list[Tensor]:
        """float [2 B, M, D] for each of the batch's calls: what the head is given for the rows of both teachers."""
        if self.followed is None:
            return []
        batch = replace(batch, shared_prefix=None) if n_calls == 1 else batch
        rows, own_map = self.followed.rows(self.adapted, batch, token_map)
        found = []
        for one in calls_of(self.adapted, rows, own_map):
            with one.bound(self.adapted), self._asked(one) as source:
                found.append(self.head.states(self.call, one.arguments, source)[0])
        return found

    def of_rows(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B]: cross entropy summed over the targets of each row, which is one text's."""
        return self.of_targets(batch, token_map).sum(1)

    def of_targets(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float [B, M]: the cross entropy of each target, 0 where a row has none."""
        head = self.head
        (one,) = calls_of(self.adapted, replace(batch, shared_prefix=None), token_map)
        with one.bound(self.adapted), self._asked(one) as source:
            hidden, own, finish = head.states(self.call, one.arguments, source)
        scores = finish(own(hidden))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, 1)
        losses = nn.functional.cross_entropy(scores, one.target.flatten(), ignore_index=NO_LABEL, reduction="none")
        return losses.view_as(one.target)

    @property
    def _is_eager(self) -> bool:
        return self.call is self.adapted.base

    @contextlib.contextmanager
    def _asked(self, call: ModelCall) -> Iterator[Tensor]:
        """int64 [B, M]: where the model gives what the call's sources ask for. A compiled model is one graph, and stays as it is."""
        if not self._is_eager:
            yield call.source
            return
        with self.last_layer.at(call) as source, self.activations.made_again():
            yield source

    def _started(self, batch: Batch, token_map: TokenMap) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model starts above the cached states."""
        return contextlib.nullcontext() if self.lower is None else self.lower.left_out(batch, token_map)
