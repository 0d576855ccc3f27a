"""A trial of a language model that nobody tested: does it read a text after a cache as it reads the whole row?"""

from __future__ import annotations

import torch
from torch import Tensor

from adalink import ANSWER, TEXT, AdaptedModel
from multimodal.batch import Batch, collate
from multimodal.encode import Row
from multimodal.fork import calls_of
from multimodal.trial_call import REFUSALS, unadapted

__all__ = ["forks_exactly"]

SHARED = 3
NEAR = 0.05  # of the scores' norm: bfloat16 rounds by 0.01, what is wrong is off by 1


@torch.no_grad()
def forks_exactly(adapted: AdaptedModel) -> bool:
    """Whether two short texts get the same scores forked and apart. Runs the model on twenty tokens, without its adapters."""
    whole, forked = (_batch(beginning).to(next(adapted.base.parameters()).device) for beginning in (0, SHARED))
    is_text = whole.attention_mask[:, SHARED:] == 1
    try:
        apart, after = (_scores(adapted, batch)[:, -is_text.shape[1] :][is_text].float() for batch in (whole, forked))
    except REFUSALS:  # a cache of another kind
        return False
    return bool((after - apart).norm() <= NEAR * apart.norm())


def _batch(beginning: int) -> Batch:
    texts = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7, 8))
    rows = [Row(ids, (TEXT,) * SHARED + (ANSWER,) * (len(ids) - SHARED), beginning=beginning) for ids in texts]
    return collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0)


def _scores(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """[B, T, V]: of the last call."""
    for one in calls_of(adapted, batch, unadapted(batch)):
        with one.bound(adapted):
            scores: Tensor = adapted.base(**one.arguments).logits
    return scores
