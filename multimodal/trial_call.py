"""Small calls of a language model without its adapters, to try out whether the model bears being run in another way."""

from __future__ import annotations

import torch
from torch import Tensor

from adalink import ANSWER, BASE_ROW, TEXT, AdaptedModel, TokenMap
from multimodal.batch import Batch, collate
from multimodal.encode import Row
from multimodal.fork import ModelCall, calls_of

__all__ = ["REFUSALS", "agree", "trial_call", "unadapted"]

# What models raise that do not bear it.
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def trial_call(adapted: AdaptedModel) -> ModelCall:
    """Two rows, one padded, that ask for their tokens in no order, and for one of them twice."""
    texts = (((1, 2, 3, 4, 5, 6, 7, 8), (6, 2, 2, 0)), ((1, 5, 3, 7, 8), (3, 4, 1, 0)))
    rows = [Row(ids, (TEXT, *(ANSWER,) * (len(ids) - 1)), source, source) for ids, source in texts]
    batch = collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(next(adapted.base.parameters()).device)
    (call,) = calls_of(adapted, batch, unadapted(batch))
    return call


def unadapted(batch: Batch) -> TokenMap:
    """The batch's tokens, served by no adapter."""
    return TokenMap(batch.domain, torch.full_like(batch.image, BASE_ROW), serving=frozenset())


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether scores are the same but for rounding: of float32 at least, which norms and softmax compute in."""
    near = max(torch.finfo(torch.float32).eps, torch.finfo(wanted.dtype).eps) ** 0.5
    return bool((found - wanted).double().norm() <= near * wanted.double().norm())
