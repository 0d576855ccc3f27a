"""Adding a method is one file and one name: a method that is written here passes what every method passes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_invariants
import torch
from _pytest.mark.structures import ParameterSet
from test_invariants import METHODS_UNDER_TEST
from torch import Tensor, nn

from adalink import ANSWER, IMAGE, TEXT, Anatomy, Placement, Port, Slots, Tokens
from adalink.methods import METHODS

COMPILES = "test_the_model_compiles_to_one_graph_after_attach"  # takes seconds: on one family


class Turned(nn.Module):
    """h + x R, with R a trained matrix: 0 at the start, so that nothing turns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(width, width))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + x @ self.turn


@pytest.mark.parametrize(  # the methods of the package meet the others in test_invariants.py
    "family", [pytest.param(family, marks=() if family in ("llama", "t5") else pytest.mark.slow) for family in test_invariants.FAMILIES]
)
def test_a_method_written_here_passes_every_invariant(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Turn:
        """The state between layers, turned."""

        every: int

        def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
            return ()

        def place(self, anatomy: Anatomy) -> Sequence[Placement]:
            layers = anatomy.layers[:: self.every]
            return [Placement(f"{i}", Port(layer, "returned"), Turned(anatomy.layer_width), (TEXT, ANSWER, IMAGE)) for i, layer in enumerate(layers)]

    monkeypatch.setitem(METHODS, "turn", Turn)
    monkeypatch.setitem(METHODS_UNDER_TEST, "turn", {"turn": Turn(every=1)})
    ran = set()
    for name, test in vars(test_invariants).items():
        takes = inspect.signature(test).parameters if name.startswith("test_") and (name != COMPILES or family == "llama") else {}
        if {"family", "name"} <= set(takes) and (family in test_invariants.DECODERS or not _is_for_decoders(test)):
            given = {"family": family, "name": "turn", "tmp_path": tmp_path, "backend": "aot_eager"}
            test(**{key: value for key, value in given.items() if key in takes})
            ran.add(name)
    assert {"test_saved_and_loaded_gives_the_same_logits", "test_detach_restores_every_bit", "test_a_new_adapter_leaves_the_model_as_it_was"} < ran
    assert len(ran) >= (10 if family in test_invariants.DECODERS else 7)


def _is_for_decoders(test: object) -> bool:
    """Whether its cases are of decoders alone."""
    cases = [case for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize" and mark.args[0] == ("family", "name") for case in mark.args[1]]
    families = {(case.values if isinstance(case, ParameterSet) else case)[0] for case in cases}
    return bool(families) and families <= set(test_invariants.DECODERS)
