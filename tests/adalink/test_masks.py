"""Hiding keys of a domain from everyone but themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adalink import ANSWER, BASE_ROW, PAD, PERCEPT, TEXT, TokenMap, Tokens
from adalink.masks import hide_keys

DOMAIN = torch.tensor([[PERCEPT, TEXT, TEXT, PERCEPT], [PAD, PERCEPT, TEXT, TEXT], [PERCEPT, TEXT, TEXT, TEXT]])
LOWEST = torch.finfo(torch.float64).min


def tokens(start: int = 0, length: int = 4, visible: int = 4) -> Tokens:
    """The third row is served by no adapter."""
    return TokenMap(DOMAIN, torch.tensor([0, 0, BASE_ROW])).window(3, start, length, visible)


def expected(start: int, length: int, visible: int, allowed: Tensor) -> Tensor:
    """bool [B, 1, T, K], one question at a time."""
    domain = torch.cat([DOMAIN, torch.full((3, visible), ANSWER)], 1)
    result = allowed.clone()
    for b in range(3):
        for t in range(length):
            for k in range(visible):
                if b < 2 and domain[b, k] == PERCEPT and k != start + t:
                    result[b, 0, t, k] = False
    return result


def causal(start: int, length: int, visible: int) -> Tensor:
    return (torch.arange(start, start + length)[:, None] >= torch.arange(visible)).expand(3, 1, length, visible)


@pytest.mark.parametrize(("start", "length", "visible"), [(0, 4, 4), (0, 6, 6), (2, 2, 4), (4, 1, 5), (0, 4, 7)])
def test_hidden_keys_are_seen_by_themselves_alone_in_every_form_of_mask(start: int, length: int, visible: int) -> None:
    call, allowed = tokens(start, length, visible), causal(start, length, visible)
    wanted = expected(start, length, visible, allowed)
    assert torch.equal(hide_keys(allowed, call, (PERCEPT,), 0), wanted)
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, LOWEST)
    assert torch.equal(hide_keys(additive, call, (PERCEPT,), 0) == 0, wanted)
    assert torch.equal(hide_keys(None, call, (PERCEPT,), 0), wanted)
    assert torch.equal(hide_keys(allowed[:1], call, (PERCEPT,), 0), wanted)  # one mask for all rows


def test_the_mask_that_came_in_is_not_written_on() -> None:
    allowed = causal(0, 4, 4).clone()
    before = allowed.clone()
    hide_keys(allowed, tokens(), (PERCEPT,), 0)
    assert torch.equal(allowed, before)


def test_no_row_of_a_softmax_is_empty() -> None:
    mask = hide_keys(None, tokens(), (PERCEPT, TEXT, PAD), 0)
    assert mask.any(-1).all()
    scores = torch.zeros(3, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert scores.softmax(-1).isfinite().all()


def test_other_adapters_rows_are_left_alone() -> None:
    allowed = causal(0, 4, 4)
    assert torch.equal(hide_keys(allowed, tokens(), (PERCEPT,), 1), allowed)
    assert not torch.equal(hide_keys(allowed, tokens(), (PERCEPT,), 0), allowed)
