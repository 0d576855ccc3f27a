"""Texts with weights: the loss of a batch is the weighted sum of its texts' losses, however they are arranged, and of each row by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sharing import N_PATCHES, adapted, batch_of, gradients, in_double, slots_of
from torch import Tensor

from adalink import AdaptedModel, TokenMap
from adalink.errors import ConfigError
from multimodal.batches.collate import Batch
from multimodal.batches.packing import fork_rows, pack_rows, separate_rows
from multimodal.batches.tokenize import Row
from multimodal.loss.language_loss import LanguageLoss
from multimodal.loss.teachers import Followed

WAYS = {"apart": (separate_rows, 0), "forked": (fork_rows, 0), "packed": (pack_rows, 0), "joined": (pack_rows, 60)}
WEIGHTS = (0.5, 1.0, 3.0)  # of the texts of an image, in their order


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def weighted(rows: list[Row]) -> list[Row]:
    return [row if weight == 1 else replace(row, weight=(weight,) * len(row.target)) for row, weight in zip(rows, WEIGHTS, strict=False)]


def token_map(model: AdaptedModel, batch: Batch) -> TokenMap:
    assert batch.patches is not None
    retained = batch.patches[batch.image]
    return TokenMap(batch.domain, model.rows(len(batch.ids)), {"image": retained[:, :N_PATCHES], "image_taps": retained[:, N_PATCHES:]})


def rowwise(model: AdaptedModel) -> tuple[Batch, Tensor]:
    batch = batch_of(separate_rows, slots_of(model))
    return batch, LanguageLoss(model).of_rows(batch, token_map(model, batch))


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way == "packed" else pytest.mark.slow) for way in WAYS])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_batch_is_the_weighted_sum_of_its_texts(family: str, way: str) -> None:
    model = adapted(family)
    arrange, row_tokens = WAYS[way]
    batch = batch_of(lambda rows: arrange(weighted(list(rows))), slots_of(model), row_tokens=row_tokens)
    plain, losses = rowwise(model)
    weights = torch.tensor([WEIGHTS[(plain.image[:i] == plain.image[i]).sum()] for i in range(len(plain.ids))])
    lengths = (plain.target >= 0).sum(1)
    total = (losses * weights).sum()
    wanted = [total.detach(), *torch.autograd.grad(total, [one for one in model.active_adapter().parameters() if one.requires_grad])]
    assert batch.n_targets == pytest.approx(float((weights * lengths).sum()))
    for one, other in zip(gradients(model, batch), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # weights are float32
    unweighted = gradients(model, batch_of(arrange, slots_of(model), row_tokens=row_tokens))
    torch.testing.assert_close(unweighted[0], losses.sum().detach(), rtol=1e-10, atol=1e-10)
    assert abs(float(unweighted[0] - wanted[0])) > 1e-3  # control


def test_weights_and_teachers_do_not_go_together() -> None:
    model = adapted("llama")
    batch = batch_of(lambda rows: weighted(list(rows)), slots_of(model))
    loss = LanguageLoss(model)
    loss.followed = Followed(names=("a", "a"), digests=("", ""))
    with pytest.raises(ConfigError, match=r"texts have weights, and train.teachers follows words in the place of texts"):
        loss(batch, token_map(model, batch))
