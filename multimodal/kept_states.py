"""A model that learns with the states of its texts kept: what is below the lowest edit is run once for each text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from adalink import ANSWER, BASE_ROW, TEXT, AdaptedModel, Adapter, Anatomy, TokenMap
from adalink.errors import ConfigError
from adalink.lowest import lowest_edit
from adalink.masks import ReadAll
from multimodal.batch import Batch, collate
from multimodal.classify import AnswerHead
from multimodal.encode import Row
from multimodal.fork import calls_of
from multimodal.layers_below import LayersBelow
from multimodal.lower_states import LowerStates
from multimodal.model import VisionLanguageModel
from multimodal.trial_call import REFUSALS, agree, unadapted

__all__ = ["first_layer", "kept_states", "starts_exactly"]

ADVICE = "give train.states_gib: 0"


@contextlib.contextmanager
def kept_states(model: VisionLanguageModel, gib: float, n_pictures: int) -> Iterator[None]:
    """Inside the block the model learns from kept states, of at most `gib` GiB in each process; 0: nothing changes.

    n_pictures: of the data, so that the first batch can tell whether its texts can be kept; 0 where that is not asked.
    Raises ConfigError where nothing can be kept, and says what is in the way.
    """
    if not gib:
        yield
        return
    adapted, loss = model.adapted, model.language_loss
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError(f"train.states_gib runs texts in each process apart, and FSDP2 splits the model over them: train with DDP, or {ADVICE}")
    first = first_layer(adapted.anatomy, adapted.active_adapter(), model.head)
    if trained := next((name for name, parameter in adapted.base.named_parameters() if parameter.requires_grad), None):
        raise ConfigError(f"train.states_gib keeps what a frozen language model makes of its texts, and {trained} is trained: {ADVICE}")
    if not starts_exactly(adapted, first):
        kind = model.language.model.config.model_type
        raise ConfigError(f"{kind} was tried without its first {first} layers, given what they make of a text, and says something else then: {ADVICE}")
    below, positions = LayersBelow(adapted, first), model.row_encoder().max_positions
    loss.lower = LowerStates(below, int(adapted.rows(1)), most=gib * 2**30, n_pictures=n_pictures, positions=positions)
    try:
        yield
    finally:
        loss.lower = None


def first_layer(anatomy: Anatomy, adapter: Adapter, head: AnswerHead | None) -> int:
    """The layer below which everything can be kept. Raises ConfigError where there is none."""
    if head is not None:
        raise ConfigError(f"train.states_gib acts on models that write, and this one chooses among answers: {ADVICE}")
    lowest, placement = lowest_edit(anatomy, adapter)
    if lowest < 1:
        where = "the first layer" if lowest == 0 else "what enters the layers"
        raise ConfigError(
            f"train.states_gib keeps what the layers below an adapter's lowest edit make of a text, and {placement.role} acts on {where}: "
            f"{ADVICE}, or methods in deeper layers alone, as eP-ALM without a prompt"
        )
    if any(isinstance(placed.edit, ReadAll) for placed in adapter.placements):
        raise ConfigError(f"train.states_gib keeps nothing of padding, and a slot of this adapter reads it: train eP-ALM with mask: causal, or {ADVICE}")
    return min(lowest, len(anatomy.layers) - 1)


@torch.no_grad()
def starts_exactly(adapted: AdaptedModel, first: int) -> bool:
    """Whether the model says the same of two short texts when it is started at a layer. Runs it on twenty tokens, without its adapters."""
    batch = _two_texts(adapted.base)
    token_map = unadapted(batch)
    below = LayersBelow(adapted, first)
    try:
        whole = _scores(adapted, batch, token_map)
        with LowerStates(below, BASE_ROW, most=0).left_out(batch, token_map):
            started = _scores(adapted, batch, token_map)
    except REFUSALS:  # layers of another kind
        return False
    return agree(started, whole)


def _two_texts(model: Any) -> Batch:
    texts = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7))
    has_decoder = model.config.is_encoder_decoder
    rows = [Row(ids, (TEXT,) * 3 + (ANSWER,) * (len(ids) - 3), decoder_ids=ids[:4] if has_decoder else ()) for ids in texts]
    return collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(next(model.parameters()).device)


def _scores(adapted: AdaptedModel, batch: Batch, token_map: TokenMap) -> Tensor:
    """[N, V]: of every token that is none of the padding."""
    (call,) = calls_of(adapted, batch, token_map)
    with call.bound(adapted):
        scores: Tensor = adapted.base(**call.arguments).logits
    return scores.flatten(0, 1) if batch.decoder_ids is not None else scores[batch.attention_mask == 1]
