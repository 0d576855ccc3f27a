"""Tensors on their way from a process to another, in memory that is used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multimodal.data.workers import Receiver, Sender

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    return bool(first == second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (5, 7)], ids=str)
def test_a_tensor_arrives_bit_for_bit_beside_others(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 9).to(dtype)
    thing = [torch.ones(3), tensor, "text", torch.ones(1, dtype=torch.uint8)]
    found = Receiver(1).open(Sender(0).pack(thing, 0))
    assert all(equal(a, b) for a, b in zip(found, thing, strict=True))


def test_tensors_that_are_not_contiguous_or_stand_twice_arrive() -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    found = Receiver(1).open(Sender(0).pack((turned, turned[1:], turned), 0))
    assert all(equal(a, b) for a, b in zip(found, (turned, turned[1:], turned), strict=True))


def test_what_is_more_than_a_tensor_is_pickled_as_it_is() -> None:
    found = Receiver(1).open(Sender(0).pack([nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)], 0))
    assert isinstance(found[0], nn.Parameter)
    assert found[1].requires_grad


def test_memory_is_used_again_once_it_was_copied_out_and_not_before() -> None:
    sender, receiver = Sender(0), Receiver(1)
    first, second = (sender.pack([torch.full((4,), float(i))], 0) for i in range(2))
    assert first.block != second.block
    (opened,) = receiver.open(first)
    third = sender.pack([torch.full((4,), 2.0)], receiver.n_copied[0])
    assert (third.block, third.memory) == (first.block, None)
    assert [receiver.open(each)[0].tolist() for each in (second, third)] == [[1.0] * 4, [2.0] * 4]
    assert opened.tolist() == [0.0] * 4  # it has memory of its own


def test_memory_that_is_too_small_is_replaced() -> None:
    sender, receiver = Sender(0), Receiver(1)
    for size in (1, 2**16, 3, 2**17, 2**17 + 9):
        thing = torch.arange(size)
        shared_batch = sender.pack([thing], receiver.n_copied[0])
        assert shared_batch.block == 0
        assert (shared_batch.memory is not None) == (size in (1, 2**16, 2**17))  # a quarter of room is left for the last
        assert equal(receiver.open(shared_batch)[0], thing)


def test_several_senders_do_not_meet() -> None:
    senders, receiver = [Sender(0), Sender(1)], Receiver(2)
    parcels = [sender.pack([torch.full((2,), float(i))], 0) for _ in range(2) for i, sender in enumerate(senders)]
    assert [receiver.open(shared_batch)[0].tolist() for shared_batch in parcels] == [[0.0] * 2, [1.0] * 2] * 2
    assert receiver.n_copied == [2, 2]


@pytest.mark.parametrize(
    ("size", "seconds", "together"),
    [(0, 0.0, 8), (2**10, 0.0, 8), (2**20 - 64, 0.0, 3), (2**21, 0.0, 1), (2**23, 0.0, 1), (0, 0.004, 3), (2**10, 0.01, 1), (0, 2.0, 1)],
)
def test_small_things_that_were_made_quickly_travel_together_and_others_alone(size: int, seconds: float, together: int) -> None:
    receiver = Receiver(1)
    assert receiver.worth_sharing == 1
    for things in (1, 2):
        receiver.open(Sender(0).pack([torch.zeros(size, dtype=torch.uint8)] * things, 0, seconds * things))
        assert receiver.worth_sharing == together
