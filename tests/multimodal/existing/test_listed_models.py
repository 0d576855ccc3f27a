"""The docs' table of all image-text classes says what is found out on a tiny model of each."""

from __future__ import annotations

import pytest
from listed_models import LISTED, row, rows_of_page

# Of each kind: by its class alone, by what its vectors depend on, with a stand-in for its processor and with its own.
# Vectors that the call projects, and chunks (Llama 4), scores that are never written (Chameleon), and no vector for each token (Granite 4 Vision).
SAMPLE = ("git", "instructblip", "cohere2_vision", "lfm3_vl", "blip-2", "llama4", "chameleon", "granite4_vision")


def test_each_listed_class_has_a_row() -> None:
    assert [line.split(" | ")[:2] for line in rows_of_page()] == [[f"| `{name}`", kind] for kind, name in LISTED.items()]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in SAMPLE else pytest.mark.slow) for kind in LISTED])
def test_the_row_is_what_is_found_out(kind: str) -> None:
    assert row(kind) in rows_of_page()
