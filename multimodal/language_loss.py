"""What a frozen language model loses on the targets of a batch: the model is run to its head, and the head scores the targets alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adalink import AdaptedModel, TokenMap
from multimodal.batch import Batch
from multimodal.fork import calls_of
from multimodal.packing import check_packed
from multimodal.word_head import WordHead, read_word_head

__all__ = ["LanguageLoss"]


class LanguageLoss:
    """Runs an adapted language model on batches.

    call  what runs the model: itself, or a compiled form of it
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        self.call: Callable[..., Any] = adapted.base

    @cached_property
    def head(self) -> WordHead:
        """The model's head, read at the first use: that runs the model on two tokens."""
        return read_word_head(self.adapted)

    def __call__(self, batch: Batch, token_map: TokenMap) -> Tensor:
        """float []: cross entropy summed over the batch's targets. Raises ConfigError for packed rows that an adapter would mix."""
        adapted = self.adapted
        if batch.segment is not None and adapted.active:
            check_packed(adapted.active_adapter(), batch.domain, batch.segment, batch.picture)
        head = self.head  # before the map is bound: it binds one of its own
        total = torch.zeros((), device=batch.ids.device)
        for one in calls_of(adapted, batch, token_map):
            with one.bound(adapted):
                total = total + head.loss(self.call, one.arguments, one.source, one.target)
        return total
