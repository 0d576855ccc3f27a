"""What a frozen language model loses on the targets of a batch: its last layer is run, and its head scores, where there are targets alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adalink import AdaptedModel, TokenMap
from multimodal.activations import Activations
from multimodal.batch import Batch
from multimodal.fork import ModelCall, calls_of
from multimodal.last_layer import LastLayer
from multimodal.lower_states import LowerStates
from multimodal.packing import check_packed
from multimodal.word_head import WordHead, read_word_head

__all__ = ["LanguageLoss"]


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
