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

from adalink import BASE_ROW, AdaptedModel, TokenMap
from multimodal.batches.collate import Batch
from multimodal.batches.packing import check_packed
from multimodal.batches.prefix_sharing import ModelCall, calls_of
from multimodal.loss.activations import Activations
from multimodal.loss.cross_entropy import Finish, word_loss
from multimodal.loss.hidden_states import LowerStates
from multimodal.loss.last_layer import LastLayer

__all__ = ["LanguageLoss", "WordHead", "read_word_head"]


# ----------------------------------------
# The head of a language model, which turns hidden states into a score for each word: left out of the model's run, and given to the loss.
#
# What a model does between its layers and its head (T5's scaling) is done by the model itself: its head is replaced for the call by one that
# keeps what it is given. What it does with the scores (a scale, a cap) is found out once, by a head that gives known numbers.


# Where transformers' models keep what they do with scores; each is believed only where the model itself says the same.
SCALES = (("logit_scale", 1), ("logits_scaling", -1), ("output_multiplier", 1))  # name in the config, and the power it is taken to
CAPS = ("final_logit_softcapping", "logits_soft_cap")


class _Kept:
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
    stand_in: _Kept

    @property
    def told(self) -> str:
        """A line for the log: how the loss is computed."""
        if self._is_apart():
            return "logits in chunks of targets, none kept"
        why = "something is hooked to the head" if _is_watched(self.module) else "what this model makes of its head's scores is not known"
        return f"logits of every token at once: {why}"

    def loss(self, call: Callable[..., Any], arguments: Mapping[str, Any], source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """float []: cross entropy summed over targets. call: the model, or what runs it; source and target: int64 [B, M], see Batch."""
        if not self._is_apart():
            logits = torch.take_along_dim(call(**arguments).logits, source[..., None], 1)
            return word_loss(logits, target, nn.Identity(), Finish(), weight)[0]
        assert self.finish is not None
        hidden = torch.take_along_dim(self.hidden(call, arguments), source[..., None], 1)
        return word_loss(hidden, target, self.module, self.finish, weight)[0]

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
    return WordHead(module, None if _is_watched(module) else _finish(model, module), _Kept(len(module.weight)))


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


@contextlib.contextmanager
def _replaced(module: nn.Module, by: _Kept) -> Iterator[_Kept]:
    module.forward = by
    try:
        yield by
    finally:
        del module.forward


@torch.no_grad()
def _finish(model: AdaptedModel, module: nn.Module) -> Finish | None:
    """What the model makes of known scores. None where it is none of what configs tell of, or the head is not run on hidden states."""
    base: Any = model.base
    ids = torch.zeros(1, 2, dtype=torch.int64, device=base.device)
    vocabulary, width = module.weight.shape  # type: ignore[operator, misc]
    sizes = torch.logspace(-3, 4, vocabulary, device=base.device)  # so wide that no cap and no scale looks like another
    scores = torch.stack([sizes, -sizes])[None]
    arguments = {"input_ids": ids, "use_cache": False, **({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})}
    token_map = TokenMap(ids, torch.full((1,), BASE_ROW, device=base.device), serving=frozenset())
    with model.attachment.bind(token_map), _replaced(module, _Kept(vocabulary, scores)) as kept:
        try:
            found = base(**arguments).logits.float()
        except (RuntimeError, ValueError, TypeError):
            return None
    if kept.hidden is None or kept.hidden.shape != (1, 2, width) or found.shape != scores.shape:
        return None
    return next((finish for finish in _candidates(base.config.get_text_config(decoder=True)) if torch.allclose(finish(scores), found, rtol=1e-5, atol=0)), None)


def _candidates(config: Any) -> list[Finish]:
    scales = [getattr(config, name) ** power for name, power in SCALES if getattr(config, name, None)]
    caps = [getattr(config, name) for name in CAPS if getattr(config, name, None)]
    return [Finish(scale, cap) for scale, cap in product([1.0, *scales], [None, *caps])]


class LanguageLoss:
    """Runs an adapted language model on batches.

    call   what runs the model: itself, or a compiled form of it
    lower  what is kept of texts, and leaves the layers below it out; whole rows are then read at once
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        self.call: Callable[..., Any] = adapted.base
        self.last_layer = LastLayer(adapted)
        self.lower: LowerStates | None = None

    @cached_property
    def head(self) -> WordHead:
        """The model's head, read at the first use: that runs the model on two tokens."""
        return read_word_head(self.adapted)

    @cached_property
    def activations(self) -> Activations:
        """Its activation functions, tried at the first use."""
        return Activations(self.adapted)

    @property
    def told(self) -> str:
        """A line for the log: how much of the last layer is run, and what is kept of the layers below the adapter."""
        why = self.last_layer.why_whole(self.adapted.serving(1).serving) if self._is_eager else "the model is compiled"
        last = "the last layer runs where something is predicted" if why is None else f"the last layer runs on every token: {why}"
        return last if self.lower is None else f"{last}; {self.lower.told}"

    def __call__(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float []: cross entropy summed over the batch's targets. Raises ConfigError for packed rows that an adapter would mix."""
        adapted = self.adapted
        if batch.segment is not None and adapted.active:
            check_packed(adapted.active_adapter(), batch.domain, batch.segment, batch.picture)
        batch = batch if self.lower is None else replace(batch, beginning=None)
        head = self.head  # before a map is bound: to be read, it runs the model
        if self._is_eager:
            _ = self.activations  # likewise, and before the last layer is shortened
        total = torch.zeros((), device=batch.ids.device)
        for one in calls_of(adapted, batch, token_map):
            with one.bound(adapted), self._asked(one) as source, self._started(batch, token_map):
                total = total + head.loss(self.call, one.arguments, source, one.target)
        return total

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
        """Where the model starts above what is kept."""
        return contextlib.nullcontext() if self.lower is None else self.lower.left_out(batch, token_map)
