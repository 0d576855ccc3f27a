"""Slots of each row's own adapter in a batch of plain ids: where they go, and how the caller's own tokens come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adalink import IMAGE, PERCEPT, PROMPT, Slots
from adalink.attachment.inputs import Reserved
from adalink.errors import ConfigError
from adalink.tokens import PREFIX

MASK = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]])
IDS = torch.tensor([[0, 11, 12], [21, 22, 23], [31, 32, 0]])
SLOTS = ((Slots(PROMPT, 1),), (Slots(PREFIX, 1), Slots(PROMPT, 1)), ())


def test_rows_that_are_continued_end_together() -> None:
    reserved = Reserved(MASK, SLOTS, "left")
    assert reserved.widened(IDS, 7, 0).tolist() == [[0, 0, 7, 11, 12], [7, 7, 21, 22, 23], [0, 0, 31, 32, 0]]
    assert reserved.widened(MASK, 1, 0).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]


def test_rows_that_are_read_begin_together() -> None:
    reserved = Reserved(MASK, SLOTS, "right")
    assert reserved.widened(IDS, 7, 0).tolist() == [[0, 7, 11, 12, 0], [7, 7, 21, 22, 23], [31, 32, 0, 0, 0]]
    assert reserved.widened_domains(torch.zeros_like(IDS)).tolist() == [[0, PROMPT, 0, 0, -1], [PREFIX, PROMPT, 0, 0, 0], [0, 0, 0, -1, -1]]


def test_positions_count_slots() -> None:
    positions = torch.tensor([[0, 0, 1], [0, 1, 2], [0, 1, 2]])
    assert Reserved(MASK, SLOTS, "left").widened_positions(positions).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def test_without_slots_nothing_moves() -> None:
    reserved = Reserved(MASK, ((), (), ()), "left")
    assert torch.equal(reserved.widened(IDS, 7, 0), IDS)
    assert torch.equal(reserved.widened_domains(IDS), IDS)


def test_a_bridges_slots_have_no_place_among_plain_ids() -> None:
    with pytest.raises(ConfigError, match="an adapter with a bridge or with percepts needs images, and plain ids bring none"):
        Reserved(MASK, ((Slots(IMAGE, 4),), (), ()), "left")
    with pytest.raises(ConfigError, match="with percepts needs images"):
        Reserved(MASK, ((), (Slots(PERCEPT, 1),), ()), "right")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(1, 3))
def test_own_tokens_come_back_whatever_was_reserved(rows: list[tuple[int, int, int]], side: str, beams: int) -> None:
    """(padding before, padding after, slots) of each row; real tokens in between."""
    length = 8
    mask = torch.tensor([[int(before <= t < length - after) for t in range(length)] for before, after, _ in rows])
    values = torch.arange(len(rows) * length).view(len(rows), length) + 1
    reserved = Reserved(mask, [(Slots(PROMPT, n),) for _, _, n in rows], side)  # type: ignore[arg-type]
    wide = reserved.widened(values, -7, -9)
    assert wide.shape == (len(rows), length + max(n for *_, n in rows))
    assert (wide == -7).sum(1).tolist() == [n for *_, n in rows]
    real = mask.bool()
    again = reserved.own(wide.repeat_interleave(beams, 0))
    assert torch.equal(again[::beams][real], values[real])
    for row, own, is_real, (_, _, n) in zip(wide.tolist(), values, real, rows, strict=True):
        if n and is_real.any():  # slots come right before the first real token
            first = row.index(int(own[is_real][0]))
            assert row[first - n : first] == [-7] * n
        assert [v for v in row if v > 0] == own.tolist()
