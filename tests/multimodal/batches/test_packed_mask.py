"""What a packed token may read: the same for every kind of attention."""

from __future__ import annotations

import pytest
import torch
from sharing import N_PATCHES, adapted, batch_of, gradients
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from adalink import AdaLink, AdaptedModel, Bridge, TokenMap
from multimodal.batches import collate
from multimodal.batches.collate import additive, block_mask, packed_attention
from multimodal.batches.packing import pack_rows
from multimodal.batches.prefix_sharing import calls_of, packs_exactly, unadapted
from multimodal.loss.language_loss import LanguageLoss

SEGMENT, POSITION = torch.tensor([[0, 0, 1, 1, 2, 0], [0, 1, 1, 2, 2, 2]]), torch.tensor([[0, 1, 2, 3, 2, 0], [0, 1, 2, 1, 2, 3]])
PADDING = torch.tensor([[False] * 5 + [True], [False] * 6])


def may_read(window: int | None = None, start: int = 0) -> Tensor:
    """bool [B, T - start, T]"""
    mask = additive(SEGMENT, PADDING, torch.float32, position=POSITION, window=window, start=start)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    return mask[:, 0] == 0


def test_a_token_reads_what_is_shared_and_its_own_text_before_it() -> None:
    assert may_read()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],  # padding reads itself: a softmax over nothing is NaN
    ]


def test_a_text_reads_its_own_picture_alone() -> None:
    """Two images, one with two texts and one with one, which nothing else tells apart."""
    segment, position, token_image = torch.tensor([[0, 1, 2, 0, 0]]), torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([[3, 3, 3, 1, 1]])
    padding = torch.zeros(1, 5, dtype=torch.bool)
    mask = additive(segment, padding, torch.float32, token_image=token_image, position=position)[:, 0] == 0
    assert mask[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    for window in (None, 1):
        mask = additive(segment, padding, torch.float32, token_image=token_image, position=position, window=window)[:, 0] == 0
        blocks = block_mask(segment, padding, token_image=token_image, position=position, window=window)
        assert torch.equal(create_mask(blocks.mask_mod, 1, None, 5, 5, device="cpu")[:, 0], mask)


def test_a_window_counts_places_in_the_text() -> None:
    assert may_read(window=2)[0, 2:5].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]]


def test_later_tokens_alone() -> None:
    assert torch.equal(may_read(start=2), may_read()[:, 2:])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("block", [None, torch.tensor([[0, 0, -1, 1, 1, -1], [-1, -1, 2, 2, -1, -1]])])
def test_a_block_mask_says_the_same(window: int | None, start: int, block: Tensor | None) -> None:
    blocks = block_mask(SEGMENT, PADDING, position=POSITION, window=window, start=start, block=block)
    assert blocks.shape == (2, 1, 6 - start, 6)
    dense = additive(SEGMENT, PADDING, torch.float32, position=POSITION, window=window, start=start, block=block)[:, 0] == 0
    assert torch.equal(create_mask(blocks.mask_mod, 2, None, 6 - start, 6, device="cpu")[:, 0], dense)


def test_layers_of_two_kinds_have_two_masks() -> None:
    masks = packed_attention("sdpa", {"full_attention": None, "sliding_attention": 2}, SEGMENT, PADDING, POSITION, torch.float32)
    assert torch.equal(masks["full_attention"][:, 0] == 0, may_read())
    assert torch.equal(masks["sliding_attention"][:, 0] == 0, may_read(window=2))


def with_flex_attention(name: str, device: str) -> list[list[Tensor]]:
    """Loss (and, on a GPU, gradients) with sdpa and with flex attention."""
    found = []
    for attention in ("sdpa", "flex_attention"):
        model = adapted(name, {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=4, modalities=("image", "text"))}, attention).float().to(device)
        batch = batch_of(pack_rows).to(torch.device(device))
        found.append(gradients(model, batch) if device == "cuda" else [loss_of(model, batch)])
    return found


@torch.no_grad()
def loss_of(model: AdaptedModel, batch: object) -> Tensor:
    retained = batch.patches[batch.image].float()  # type: ignore[attr-defined]
    inputs = {"image": retained[:, :N_PATCHES], "image_taps": retained[:, N_PATCHES:]}
    return LanguageLoss(model)(batch, TokenMap(batch.domain, model.rows(len(batch.ids)), inputs))  # type: ignore[arg-type, attr-defined]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention as torch computes it without a compiler, which takes a minute."""
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention", lambda training: lambda: flex_attention)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", lambda _compile, **arguments: create_block_mask(**arguments))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_flex_attention_reads_packed_rows_as_the_dense_mask_does(name: str) -> None:
    plain, flex = with_flex_attention(name, "cpu")
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_a_trial_finds_a_kernel_that_reads_packed_rows_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("opt", {"bridge": Bridge(kind="mlp")}, "flex_attention").float()
    assert packs_exactly(model)
    monkeypatch.setattr(collate, "block_mask", lambda segment, *args, **others: block_mask(torch.zeros_like(segment), *args, **others))
    assert not packs_exactly(model)


def test_rows_of_a_mask_are_aligned_and_in_the_dtype_of_queries() -> None:
    mask = additive(SEGMENT.to("meta"), PADDING.to("meta"), torch.bfloat16)  # a device that is no CPU
    assert mask.shape == (2, 1, 6, 6)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    model = adapted("llama", {"bridge": Bridge(kind="mlp")}).float()
    batch = batch_of(pack_rows)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (call,) = calls_of(model, batch, unadapted(batch))
        assert call.arguments["attention_mask"].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_flex_attention_reads_packed_rows_on_the_cpu(name: str) -> None:
    """Compiles for most of a minute. The backward pass of flex attention raises on a CPU."""
    plain, flex = with_flex_attention(name, "cpu")
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention learns on a GPU alone, and there is none here")
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_flex_attention_learns_from_packed_rows_on_a_gpu(name: str) -> None:
    plain, flex = with_flex_attention(name, "cuda")
    torch.testing.assert_close(flex, plain, rtol=1e-3, atol=1e-3)
