"""Packed rows are the same mathematics as separate ones."""

from __future__ import annotations

import torch
from tiny import FEATURE_WIDTH, N_PATCHES, tiny

from adalink import IMAGE, AdaptedModel, Bridge, InputSpec, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import pack_rows
from multimodal.batches.tokenize import Row


def rows(prefix: int, lengths: list[int], seed: int) -> list[Row]:
    """Rows of one image: two prompt slots, its image slots, `prefix` shared tokens, then a text of its own each, all of it learnt."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 64, (n,), generator=generator).tolist())

    head, domain = (0,) * (2 + N_PATCHES) + ids(prefix), (3, 3) + (IMAGE,) * N_PATCHES + (0,) * prefix
    made = []
    for length in lengths:
        text = ids(length)
        first = len(head) - 1
        made.append(Row(head + text[:-1], domain + (1,) * (length - 1), tuple(range(first, first + length)), text))
    return made


def batch_of(samples: list[list[Row]], arrange: object) -> Batch:
    arranged = [list(arrange(sample)) for sample in samples]  # type: ignore[operator]
    image = [i for i, sample in enumerate(arranged) for _ in sample]
    images = torch.randn(len(samples), N_PATCHES, FEATURE_WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return collate([row for sample in arranged for row in sample], image, images, kind="patches", side="right", pad_id=0)


def test_a_text_does_not_see_another_text_of_its_row() -> None:
    model = AdaptedModel(tiny("opt"), inputs={"image": InputSpec(N_PATCHES, FEATURE_WIDTH)})
    model.add_adapter("a", {"bridge": Bridge(kind="linear")}).double()
    first, second = rows(2, [4, 6], seed=1)
    other = rows(2, [4, 6], seed=5)[0]
    changed = Row(first.ids[:-3] + other.ids[-3:], first.domain, first.source, first.target)
    with torch.no_grad():
        losses = [per_text(model, batch_of([[text, second]], pack_rows), split=4) for text in (first, changed)]
    assert losses[0][0] != losses[1][0]  # control: the changed text itself is scored differently
    assert losses[0][1] == losses[1][1]


def per_text(model: AdaptedModel, batch: Batch, split: int) -> tuple[float, float]:
    assert batch.patches is not None
    with model.attachment.bind(TokenMap(batch.domain, model.rows(1), {"image": batch.patches[batch.image]})):
        logits = model.base(
            input_ids=batch.ids, attention_mask=batch.attention(torch.float64), position_ids=batch.position, logits_to_keep=batch.source, use_cache=False
        ).logits
    losses = torch.nn.functional.cross_entropy(logits[0], batch.target[0], reduction="none")
    return float(losses[:split].sum()), float(losses[split:].sum())


def test_pack_rows_keeps_what_is_shared_once() -> None:
    a = Row((7, 8, 9), (0, 0, 1), (1, 2), (9, 2))
    b = Row((7, 8, 5, 6), (0, 0, 1, 1), (1, 2, 3), (5, 6, 2))
    (packed,) = pack_rows([a, b])
    assert packed.ids == (7, 8, 9, 5, 6)
    assert packed.segment == (0, 0, 1, 2, 2)
    assert packed.position == (0, 1, 2, 2, 3)
    assert packed.source == (1, 2, 1, 3, 4)
    assert packed.target == (9, 2, 5, 6, 2)
