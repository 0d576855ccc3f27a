from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import WIDTH, tiny

from adalink import EMBEDDING, PROMPT, TEXT, Anatomy, Prompt, Slots, TokenMap
from adalink.errors import ConfigError

ANATOMY = Anatomy.read(tiny("opt"))


def test_slots_get_their_vectors_in_order_and_other_tokens_stay_finite() -> None:
    (placement,) = Prompt(length=3, init_std=1.0).place(ANATOMY)
    assert (placement.port, placement.domains) == (EMBEDDING, (PROMPT,))
    tokens = TokenMap(torch.tensor([[PROMPT, PROMPT, PROMPT, *[TEXT] * 5]]), torch.tensor([0])).window(1, 0, 8, 8)
    edit: Any = placement.edit
    written = edit(torch.full((1, 8, WIDTH), float("nan")), tokens, None)
    assert torch.equal(written[0, :3], edit.table)
    assert written.isfinite().all()


def test_the_mlp_is_two_linears_around_a_tanh_as_wide_as_the_word_embedding() -> None:
    (placement,) = Prompt(length=3, init_std=1.0, form="mlp").place(ANATOMY)
    tokens = TokenMap(torch.tensor([[PROMPT, PROMPT, PROMPT]]), torch.tensor([0])).window(1, 0, 3, 3)
    edit: Any = placement.edit
    table, (first, _, second) = edit.table, edit.layers
    assert first.weight.shape == second.weight.shape == (WIDTH, WIDTH)
    expected = torch.tanh(table @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(edit(torch.zeros(1, 3, WIDTH), tokens, None)[0], expected)


def test_without_positions_it_is_placed_where_they_are_made_too() -> None:
    sides = [placement.port.side for placement in Prompt(length=3, init_std=1.0, positions="none").place(ANATOMY)]
    assert sides == ["embedding", "position", "vectors"]
    assert [p.port.side for p in Prompt(length=3, init_std=1.0, positions="none").place(Anatomy.read(tiny("llama")))] == ["embedding", "position"]


def test_the_start_has_the_spread_that_was_asked_for() -> None:
    torch.manual_seed(0)
    (placement,) = Prompt(length=200, init_std=0.02).place(ANATOMY)
    table: Any = placement.edit.table
    assert table.shape == (200, WIDTH)
    assert 0.019 < table.std().item() < 0.021


def test_it_reserves_its_slots() -> None:
    assert Prompt(length=3, init_std=0.1).slots(ANATOMY) == (Slots(PROMPT, 3),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "the prompt's length is 0: give 1 or more"),
        ({"init_std": -0.1}, "the prompt's init_std is -0.1: give 0 or more"),
        ({"form": "lstm"}, "the prompt's form is 'lstm': give table or mlp"),
        ({"positions": "own"}, "the prompt's positions are 'own': give counted or none"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompt(**{"length": 2, "init_std": 0.1, **fields})
