"""Packed rows are the same mathematics as separate ones."""

from __future__ import annotations

import pytest
import torch
from tiny import EXACT, FEATURE_WIDTH, N_PATCHES, WIDTH, excite, tiny
from torch import Tensor

from adalink import IMAGE, AdaLink, AdaptedModel, Bridge, InputSpec, Prompt, TokenMap
from multimodal.batch import NO_TARGET, Batch, collate
from multimodal.encode import Row
from multimodal.packing import PACKING_FAMILIES, arrangement, pack_rows, separate_rows


def rows(prefix: int, lengths: list[int], seed: int) -> list[Row]:
    """Rows of one picture: two prompt slots, its image slots, `prefix` shared tokens, then a text of its own each, all of it learnt."""
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
    pictures = torch.randn(len(samples), N_PATCHES, FEATURE_WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return collate([row for sample in arranged for row in sample], image, pictures, kind="patches", side="right", pad_id=0)


def loss_of(model: AdaptedModel, batch: Batch) -> Tensor:
    assert batch.patches is not None
    token_map = TokenMap(batch.domain, model.rows(len(batch.ids)), {"image": batch.patches[batch.image]})
    with model.attachment.bind(token_map):
        logits = model.base(
            input_ids=batch.ids, attention_mask=batch.attention(torch.float64), position_ids=batch.position, logits_to_keep=batch.source, use_cache=False
        ).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=NO_TARGET, reduction="sum")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(PACKING_FAMILIES))
def test_loss_and_gradients_of_packed_rows_equal_those_of_separate_rows(family: str, attention: str) -> None:
    frozen = tiny(family)
    frozen.set_attn_implementation(attention)
    model = AdaptedModel(frozen, inputs={"image": InputSpec(N_PATCHES, FEATURE_WIDTH)})
    methods = {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=4, modalities=("image", "text"), activation="gelu"), "prompt": Prompt(length=2, init_std=0.5)}
    adapter = model.add_adapter("a", methods).double()
    excite(adapter)
    samples = [rows(2, [4, 6, 1], seed=1), rows(2, [5], seed=2), rows(3, [3, 3], seed=3)]
    results = []
    for arrange in (separate_rows, pack_rows):
        batch = batch_of(samples, arrange)
        loss = loss_of(model, batch)
        results.append([loss, *torch.autograd.grad(loss, list(adapter.parameters()))])
    assert batch.ids.shape[0] == 3
    exact = EXACT[family] if attention == "sdpa" else 1e-6  # eager attention computes its softmax in float32
    for plain, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, rtol=exact, atol=exact)
    assert adapter.get_parameter("adalink.image.up.weight").shape == (WIDTH, 4)


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


def test_families_that_are_not_proven_are_not_packed() -> None:
    arrange, told = arrangement(tiny("t5"))
    assert arrange is separate_rows
    assert "t5" in told
    assert arrangement(tiny("opt"))[0] is pack_rows
