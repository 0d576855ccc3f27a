"""How the texts about an image may share it in an existing model: found out by running it on short texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from adalink import BASE_ROW, IMAGE, TEXT, AdaptedModel, TokenMap
from adalink.attachment.existing import NO_LABEL
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import Arrange, Ways, fork_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import REFUSALS, calls_of, has_row_cache, reads_in_chunks
from multimodal.batches.prepared import ImageBatch, Prepared
from multimodal.batches.tokenize import Row
from multimodal.existing.rows import Blocks, ConversationRows
from multimodal.existing.tower import ModelTower
from multimodal.existing.words import first_line
from multimodal.template import Template, Text

__all__ = ["tried_ways"]

# Of the scores' norm: rounding, and less than what any token changes that is read and should not be, or the reverse.
NEAR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
APART = 0.05  # of the scores' norm: two calls of unlike shapes round more; where an image does not reach the model, they are off by 1
TEXTS = (Text("what is the color of it?", "a red one"), Text("how many of them are there in it?", "two, or three"))
ANSWERS = (Text("what is it?", "a red one"), Text("what is it?", "two, or three"))


@torch.no_grad()
def tried_ways(adapted: AdaptedModel, tower: ModelTower) -> tuple[Ways, Blocks]:
    """What is exact for this model, and which tokens read later ones. Runs it on a few rows about an image, without adapters.

    Raises ConfigError where the model is not the same with an image that was encoded before as with the image itself.
    """
    image = tower.encode(ImageBatch(samples=(tower.small,)))[0]
    rows = tower.row_encoder(Template(prompt="<image>{question}"), ())
    trial = _Trial(adapted, tower, rows, image)
    trial.check_vectors(tower.small)
    blocks = rows.blocks = trial.blocks()
    packs: Literal["texts", "answers", ""] = ""
    forks: Literal["texts", "answers", ""] = ""
    if not reads_in_chunks(adapted.base.config) and trial.is_exact(ANSWERS, pack_rows):  # these rows are shorter than a chunk
        packs = "texts" if trial.is_exact(TEXTS, pack_rows) else "answers"
    if has_row_cache(adapted.base) and trial.is_exact(ANSWERS, fork_rows):
        forks = "texts" if trial.is_exact(TEXTS, fork_rows) else "answers"
    return Ways(packs=packs, forks=forks, reads_prompts=blocks == "prompts"), blocks


class _Trial:
    def __init__(self, adapted: AdaptedModel, tower: ModelTower, rows: ConversationRows, image: Prepared) -> None:
        self.adapted, self.tower, self.rows, self.image = adapted, tower, rows, image
        self.prompt = rows.prompt("what is it?", image)

    def check_vectors(self, pixels: Prepared) -> None:
        """Raise ConfigError where the model's scores with its image's vectors are not those of its own call with the image."""
        base: Any = self.adapted.base
        device, name = self.adapted.device, f"'{self.tower.name}', a {type(base).__name__}"
        try:
            given = self._logits(self.prompt, self.image)
            own = base(**self._own_arguments(device, pixels)).logits[0]
        except REFUSALS as error:
            raise ConfigError(
                f"{name}, cannot be called with an image that was encoded before ({type(error).__name__}: {first_line(error)}): adapt it with "
                "adalink.get_adalink_model and a loop of your own"
            ) from error
        if given.shape != own.shape or not _near(given, own, APART):
            raise ConfigError(
                f"{name}, gives other scores with an image that was encoded before than with the image itself: adapt it with "
                "adalink.get_adalink_model and a loop of your own"
            )

    def _own_arguments(self, device: torch.device, pixels: Prepared) -> Mapping[str, Any]:
        """Of the model's own call with the image."""
        ids = torch.tensor([self.prompt.ids], device=device)
        kinds = {self.tower.form.kind: torch.tensor([self.prompt.kind], device=device)} if self.tower.form.kind else {}
        dtype = next(self.adapted.base.parameters()).dtype
        inputs = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in pixels.inputs[0].items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **kinds, **inputs}

    def blocks(self) -> Blocks:
        """Which tokens read later ones: the first changes with a prompt's last, or an image's first with its last."""
        before = self._logits(self.prompt, self.image)
        words = [i for i, domain in enumerate(self.prompt.domain) if domain == TEXT]
        ids = list(self.prompt.ids)
        ids[words[-1]] = next((self.prompt.ids[i] for i in words if self.prompt.ids[i] != ids[words[-1]]), self.rows.end_ids[0])
        if not self._same(before[0], self._logits(replace(self.prompt, ids=tuple(ids)), self.image)[0]):
            return "prompts"
        first = self.prompt.domain.index(IMAGE)
        last = next((i for i in range(first, len(ids)) if self.prompt.domain[i] != IMAGE), len(ids)) - 1
        if last == first:
            return ""
        assert self.image.vectors is not None
        vectors = self.image.vectors.clone()
        vectors[self.prompt.vector[last]] *= -1
        return "" if self._same(before[first], self._logits(self.prompt, self.image.encoded(vectors))[first]) else "images"

    def is_exact(self, texts: Sequence[Text], arrange: Arrange) -> bool:
        """Whether the scores of the targets are those of one row for each text."""
        rows = [self.rows.row(text, self.image) for text in texts]
        shared = self._batch(rows, arrange, self.image)
        if shared.segment is None and shared.shared_prefix is None:
            return False  # nothing is shared
        try:
            return self._same(self._scores(self._batch(rows, separate_rows, self.image)), self._scores(shared))
        except REFUSALS:
            return False

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return _near(other, one, NEAR.get(one.dtype, 0.03))

    def _logits(self, row: Row, image: Prepared) -> Tensor:
        """float [T, V]: of a row in a call of its own."""
        batch = self._batch([row], separate_rows, image)
        (call,) = calls_of(self.adapted, batch, self._token_map(batch))
        with call.bound(self.adapted):
            logits: Tensor = self.adapted.base(**call.arguments).logits
        return logits[0]

    def _scores(self, batch: Batch) -> Tensor:
        """float [V]: the logits at the targets, summed over them."""
        total: Tensor | None = None
        for call in calls_of(self.adapted, batch, self._token_map(batch)):
            with call.bound(self.adapted):
                logits = self.adapted.base(**call.arguments).logits
            scores = (torch.take_along_dim(logits, call.source[..., None], 1) * (call.target != NO_LABEL)[..., None]).sum((0, 1))
            total = scores if total is None else total + scores
        assert total is not None
        return total

    def _batch(self, rows: Sequence[Row], arrange: Arrange, image: Prepared) -> Batch:
        arranged = list(arrange(rows))
        batch = collate(
            arranged, [0] * len(arranged), ImageBatch(samples=(image,)), kind="patches", side="right", pad_id=self.rows.placeholder,
        )  # fmt: skip
        return batch.to(self.adapted.device)

    def _token_map(self, batch: Batch) -> TokenMap:
        token_map = TokenMap(batch.domain, torch.full_like(batch.image, BASE_ROW), serving=frozenset(), entry=batch.token_image)
        return self.tower.token_map(batch, token_map)


def _near(found: Tensor, wanted: Tensor, near: float) -> bool:
    found, wanted = _written(found), _written(wanted)
    return bool((found - wanted).norm() <= near * wanted.norm())


def _written(scores: Tensor) -> Tensor:
    """The scores without those of tokens that the model never writes: it sets them to the least number (Chameleon's image tokens)."""
    never = scores.abs() >= torch.finfo(scores.dtype).max / 2
    return scores.masked_fill(never, 0).to(torch.promote_types(scores.dtype, torch.float32))
