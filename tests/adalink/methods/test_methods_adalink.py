from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import INPUTS, VOCABULARY, WIDTH, excite, tiny
from torch import nn

from adalink import ANSWER, EMBEDDING, IMAGE, TEXT, AdaLink, Adapter, Anatomy, TokenMap
from adalink.errors import ConfigError
from adalink.methods.adalink import Bottleneck

ANATOMY = Anatomy.read(tiny("opt"), INPUTS)
TOKENS = TokenMap(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).window(2, 0, 3, 3)


def test_the_published_count_of_parameters() -> None:
    """1.05 million for two modalities at width 4,096 and rank 64: 2 modules of 2 x 4,096 x 64 (arXiv 2310.12100)."""
    assert 2 * sum(p.numel() for p in Bottleneck(4096, 64, "identity", bias=False).parameters()) == 1_048_576
    assert sum(p.numel() for p in Bottleneck(32, 4, "gelu", bias=True).parameters()) == 2 * 32 * 4 + 32 + 4


@pytest.mark.parametrize("activation", ["identity", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_formula_and_starts_as_the_identity(activation: Any, bias: bool) -> None:
    edit = Bottleneck(WIDTH, 4, activation, bias).double()
    h = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(edit(h, TOKENS, h), h)
    excite(edit)
    inner = h @ edit.down.weight.T + (edit.down.bias if bias else 0)
    inner = {"identity": inner, "gelu": nn.functional.gelu(inner), "relu": inner.clamp(min=0)}[activation]
    torch.testing.assert_close(edit(h, TOKENS, h), h + inner @ edit.up.weight.T + (edit.up.bias if bias else 0))


def test_the_lookup_table_is_the_edit_of_every_word() -> None:
    edit = Bottleneck(WIDTH, 4, "gelu", bias=True).double()
    excite(edit)
    words = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (2, 3))
    torch.testing.assert_close(edit.lookup_table(words)[ids], edit(words[ids], TOKENS, words[ids]), rtol=0, atol=1e-15)


def test_each_modality_has_its_weights_and_the_scope_says_whether_answers_are_edited() -> None:
    def domains(**fields: Any) -> dict[str, tuple[int, ...]]:
        placements = AdaLink(rank=2, **fields).place(ANATOMY)
        assert all(placement.port == EMBEDDING for placement in placements)
        assert len({id(placement.edit) for placement in placements}) == len(placements)
        return {placement.role: placement.domains for placement in placements}

    assert domains(modalities=("text", "image")) == {"text": (TEXT, ANSWER), "image": (IMAGE,)}
    assert domains(modalities=("text", "image"), scope="prompt") == {"text": (TEXT,), "image": (IMAGE,)}
    assert domains(modalities=("image",)) == {"image": (IMAGE,)}


def test_it_reserves_no_slots() -> None:
    assert Adapter({"a": AdaLink(rank=2, modalities=("text",))}, ANATOMY).slots == ()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, r"AdaLink's rank is 0: give 1 or more \(4, 16, 64 and 256 were published\)"),
    ({"modalities": ("text", "sound")}, "AdaLink knows the modalities text and image, got sound"),
    ({"modalities": ()}, r"AdaLink's modalities are \[\]: name text, image or both, each once"),
    ({"modalities": ("text", "text")}, r"AdaLink's modalities are \['text', 'text'\]"),
    ({"activation": "tanh"}, "AdaLink's activation is 'tanh': give one of identity, gelu, relu"),
    ({"scope": "answers"}, "AdaLink's scope is 'answers': give prompt or all"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLink(**{"rank": 4, "modalities": ("text",), **fields})
