"""How the texts about an image may share it in an existing model: found out by running it on two short texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adalink import BASE_ROW, AdaptedModel, TokenMap
from adalink.attachment.existing import NO_LABEL
from multimodal.batches.collate import collate
from multimodal.batches.packing import Arrange, Ways, fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import REFUSALS, calls_of, has_row_cache
from multimodal.batches.prepared import ImageBatch, Prepared
from multimodal.batches.tokenize import Row
from multimodal.encoders.bound_parts import test_image
from multimodal.existing.rows import Blocks, ConversationRows
from multimodal.existing.tower import ModelTower
from multimodal.template import Template, Text

__all__ = ["tried_ways"]

# Of the scores' norm: rounding, and less than what any token changes that is read and should not be, or the reverse.
NEAR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
TEXTS = (Text("what is the color of it?", "a red one"), Text("how many of them are there in it?", "two, or three"))
ANSWERS = (Text("what is it?", "a red one"), Text("what is it?", "two, or three"))


@torch.no_grad()
def tried_ways(adapted: AdaptedModel, tower: ModelTower) -> tuple[Ways, Blocks]:
    """What is exact for this model, and which tokens read later ones. Runs it on a few rows about an image, without adapters."""
    small = tower.preprocess(test_image().resize((64, 40)))  # of few tokens, where their number follows the image's size
    image = tower.encode(ImageBatch(samples=(small,)))[0]
    rows = tower.row_encoder(Template(prompt="<image>{question}"), ())
    trial = _Trial(adapted, tower, rows, image)
    packs: Literal["texts", "answers", ""] = ""
    forks: Literal["texts", "answers", ""] = ""
    every: tuple[Blocks, ...] = ("", "images", "prompts")
    blocks = next((one for one in every if trial.is_exact(ANSWERS, pack_rows, one)), None)
    if blocks is not None:
        packs = "texts" if trial.is_exact(TEXTS, pack_rows, blocks) else "answers"
    blocks = blocks or ""
    if has_row_cache(adapted.base) and trial.is_exact(ANSWERS, fork_rows, blocks):
        forks = "texts" if trial.is_exact(TEXTS, fork_rows, blocks) else "answers"
    return Ways(packs=packs, forks=forks, reads_prompts=forks != "texts"), blocks


class _Trial:
    def __init__(self, adapted: AdaptedModel, tower: ModelTower, rows: ConversationRows, image: Prepared) -> None:
        self.adapted, self.tower, self.rows, self.image = adapted, tower, rows, image

    def is_exact(self, texts: Sequence[Text], arrange: Arrange, blocks: Blocks) -> bool:
        """Whether the scores of the targets are those of one row for each text."""
        self.rows.blocks = blocks
        try:
            apart, shared = (self._scores([self.rows.row(text, self.image) for text in texts], how) for how in (separate_rows, arrange))
        except REFUSALS:
            return False
        near = NEAR.get(apart.dtype, 0.03)
        return bool((shared - apart).double().norm() <= near * apart.double().norm())

    def _scores(self, rows: Sequence[Row], arrange: Arrange) -> Tensor:
        """float [V]: what is said at the targets, summed over them."""
        arranged = list(arrange(rows))
        pad_id = self.rows.placeholder
        batch = collate(arranged, [0] * len(arranged), ImageBatch(samples=(self.image,)), kind="patches", side="right", pad_id=pad_id)
        batch = batch.to(next(self.adapted.base.parameters()).device)
        token_map = TokenMap(batch.domain, torch.full_like(batch.image, BASE_ROW), serving=frozenset(), entry=batch.token_image)
        token_map = self.tower.token_map(batch, token_map)
        total: Tensor | None = None
        for call in calls_of(self.adapted, batch, token_map):
            with call.bound(self.adapted):
                logits = self.adapted.base(**call.arguments).logits
            scores = (torch.take_along_dim(logits, call.source[..., None], 1) * (call.target != NO_LABEL)[..., None]).sum((0, 1))
            total = scores if total is None else total + scores
        assert total is not None
        return total
