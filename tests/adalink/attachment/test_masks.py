"""Hiding keys of a domain from everyone but themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adalink import ANSWER, BASE_ROW, PAD, PERCEPT, TEXT, TokenMap, Tokens
from adalink.attachment.slots import HideKeys, ReadAll, hide_keys, read_all, whole_mask

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


@pytest.mark.parametrize(("start", "length", "visible"), [(0, 4, 4), (0, 6, 6), (0, 4, 7), (0, 2, 4)])
def test_a_slot_that_reads_all_reads_what_is_after_it_and_written_and_nothing_before(start: int, length: int, visible: int) -> None:
    call, allowed = tokens(start, length, visible), causal(start, length, visible)
    wanted = allowed.clone()
    for b in range(2):  # the third row is served by no adapter
        for t in range(length):
            if call.domain[b, t] == PERCEPT:
                wanted[b, 0, t, t : start + length] = True
    assert torch.equal(read_all(allowed, call, (PERCEPT,), 0), wanted)
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, LOWEST)
    assert torch.equal(read_all(additive, call, (PERCEPT,), 0) == 0, wanted)
    assert torch.equal(read_all(allowed, call, (PERCEPT,), 1), allowed)
    assert not torch.equal(wanted, allowed)  # control


def test_a_slot_looked_at_alone_reads_from_its_own_place_in_each_row() -> None:
    slot = TokenMap(DOMAIN[1:2].repeat(2, 1), torch.tensor([0, 0])).first_of(PERCEPT, 2, 6, 7)
    mask = read_all(torch.zeros(2, 1, 1, 7, dtype=torch.bool), slot, (PERCEPT,), 0)
    assert mask[0, 0, 0].tolist() == [False, True, True, True, True, True, False]
    assert hide_keys(torch.ones(2, 1, 1, 7, dtype=torch.bool), slot, (PERCEPT,), 0).all()  # it sees itself, and there is no other


def test_no_mask_stands_for_causal_in_a_decoder_and_for_everything_in_an_encoder() -> None:
    assert torch.equal(whole_mask(tokens(2, 2, 4), "causal").expand(3, 1, 2, 4), causal(2, 2, 4))
    assert whole_mask(tokens(), "bidirectional").all()


def test_the_edits_at_a_mask_port_hold_no_weights() -> None:
    allowed = causal(0, 4, 4)
    assert torch.equal(HideKeys()(allowed, tokens(), (PERCEPT,), 0), hide_keys(allowed, tokens(), (PERCEPT,), 0))
    assert torch.equal(ReadAll()(allowed, tokens(), (PERCEPT,), 0), read_all(allowed, tokens(), (PERCEPT,), 0))
    assert not [*HideKeys().parameters(), *ReadAll().parameters()]
