"""The loss that keeps no logits, against the one that does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multimodal.loss import language_loss as made
from multimodal.loss.language_loss import Finish, word_loss

NONE = -100
WIDTH, VOCABULARY = 12, 40
FINISHES = [Finish(), Finish(scale=0.25), Finish(cap=3.0), Finish(scale=2.0, cap=1.5)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them not full."""
    monkeypatch.setattr(made, "CHUNK_SCORES", 4 * VOCABULARY)
    monkeypatch.setattr(made, "LEAST_TARGETS", 1)


def case(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(3)
    hidden = torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=True)
    target = torch.randint(0, VOCABULARY, (3, 5))
    target[1, 2:] = NONE
    return hidden, target, nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)


def plain(hidden: Tensor, target: Tensor, head: nn.Module, finish: Finish, weight: Tensor | None = None) -> Tensor:
    scores = finish(head(hidden))
    losses = nn.functional.cross_entropy(scores.flatten(0, 1).float() if scores.dtype != torch.float64 else scores.flatten(0, 1), target.flatten(), reduction="none")
    return losses.sum() if weight is None else (losses * weight.flatten()).sum()


def gradient(loss: Tensor, hidden: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss * 1.7, hidden)  # not 1: what comes from above must reach it
    return result


@pytest.mark.parametrize("finish", FINISHES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_loss_and_gradients_equal_the_plain_ones(finish: Finish, weighted: bool, bias: bool, trained: bool) -> None:
    hidden, target, head = case(bias=bias)
    head.requires_grad_(trained)
    weight = torch.rand(3, 5, dtype=torch.float64) if weighted else None
    expected, (found, count) = plain(hidden, target, head, finish, weight), word_loss(hidden, target, head, finish, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert int(count) == 12
    at = [hidden, *head.parameters()] if trained else [hidden]
    for ours, theirs in zip(torch.autograd.grad(found * 1.7, at), torch.autograd.grad(expected * 1.7, at), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_weight_moves_its_own_target_alone() -> None:
    hidden, target, head = case()
    weight = torch.ones(3, 5, dtype=torch.float64)
    weight[0, 1] = 5.0
    one = word_loss(hidden[0, 1], target[0, 1:2], head, Finish())[0]
    difference = word_loss(hidden, target, head, Finish(), weight)[0] - word_loss(hidden, target, head, Finish())[0]
    torch.testing.assert_close(difference, 4 * one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_tensor_of_all_targets_and_words_is_made(trained: bool) -> None:
    hidden, target, head = case()
    head.requires_grad_(trained)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.extend(value.numel() for value in (result if isinstance(result, tuple) else [result]) if isinstance(value, Tensor))
            return result

    with Sizes():
        loss, _ = word_loss(hidden, target, head, Finish(cap=2.0))
        loss.backward()
    assert VOCABULARY * 4 <= max(sizes) <= VOCABULARY * WIDTH < VOCABULARY * target.numel()  # a chunk, or the head's weights
    with Sizes():
        plain(hidden, target, head, Finish(cap=2.0))
    assert max(sizes) == VOCABULARY * target.numel()  # the control


def test_a_frozen_head_keeps_the_gradient_alone_for_the_backward_pass() -> None:
    hidden, target, head = case()
    retained: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (retained.append(tuple(t.shape)), t)[1], lambda t: t):
        word_loss(hidden, target, head, Finish())
    assert retained == [(15, WIDTH)]


def test_without_gradients_none_is_made() -> None:
    hidden, target, head = case()
    with torch.no_grad():
        loss, _ = word_loss(hidden, target, head, Finish())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, target, head, Finish()).detach(), rtol=0, atol=1e-10)


def test_a_gradient_of_the_gradient_is_refused_and_never_wrong() -> None:
    hidden, target, head = case()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(word_loss(hidden, target, head, Finish())[0] * scale, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_rows_without_a_target_lose_nothing_whatever_they_hold() -> None:
    hidden, target, head = case()
    target[:] = NONE
    loss, count = word_loss(hidden, target, head, Finish())
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    assert not gradient(loss, hidden).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_near_to_exact_as_that_of_the_plain_loss(dtype: torch.dtype) -> None:
    hidden, target, head = case(torch.float32)
    exact = gradient(plain(hidden, target, head, Finish()), hidden)
    with torch.autocast("cpu", dtype=dtype):
        expected, (found, _) = plain(hidden, target, head, Finish()), word_loss(hidden, target, head, Finish())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the same rounded scores
    ours, theirs = gradient(found, hidden), gradient(expected, hidden)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6


def test_float16_keeps_what_a_loss_scaler_saves_from_underflow() -> None:
    """A probability of 1e-9 is nothing in float16 until the scaler's factor is on it, which it is in the backward pass alone."""
    hidden, head = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True), nn.Linear(1, 2, bias=True).half().requires_grad_(False)
    head.weight.data = torch.tensor([[0.0], [1.0]]).half()
    head.bias.data = torch.tensor([20.0, 0.0]).half()
    loss, _ = word_loss(hidden, torch.tensor([0]), head, Finish())
    (scaled,) = torch.autograd.grad(loss * 2.0**16, hidden)
    assert float(scaled) == pytest.approx(2.0**16 * 2.06e-9, rel=0.05)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_it_compiles_and_gives_the_same(trained: bool) -> None:
    torch._dynamo.reset()
    hidden, target, head = case()
    head.requires_grad_(trained)
    expected = word_loss(hidden, target, head, Finish(cap=3.0))[0]
    found = torch.compile(word_loss, backend="aot_eager")(hidden, target, head, Finish(cap=3.0))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(found, hidden), gradient(expected, hidden), rtol=0, atol=1e-10)
