"""Context-PEFT's two connectors as settings of the bridge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FEATURE_WIDTH, INPUTS, N_PATCHES, WIDTH, excite, features, tiny
from torch import nn

from adalink import IMAGE, TEXT, Anatomy, Bridge, Slots, TokenMap
from adalink.errors import ConfigError

ANATOMY = Anatomy.read(tiny("llama"), INPUTS)
RELEASED = Bridge(kind="mlp", bias=False, boundary="learned", dropout=0.1)
PAPER = Bridge(kind="linear", norm="none", dropout=0.1)


def test_the_released_connector_puts_a_learned_vector_before_and_one_after_the_projected_features() -> None:
    (placement,) = RELEASED.place(ANATOMY)
    edit: Any = placement.edit.double().eval()
    excite(edit)
    assert RELEASED.slots(ANATOMY) == (Slots(IMAGE, N_PATCHES + 2),)
    domain = torch.tensor([[TEXT] + [IMAGE] * (N_PATCHES + 2) + [TEXT]] * 2)
    tokens = TokenMap(domain, torch.zeros(2, dtype=torch.int64), {"image": features(2)}).window(2, 0, domain.shape[1], domain.shape[1])
    written = edit(torch.zeros(*domain.shape, WIDTH, dtype=torch.float64), tokens, None)[:, 1:-1]
    weights = dict(edit.layers.named_parameters())
    assert list(weights) == ["0.weight", "0.bias", "1.weight", "3.weight"]
    normed = nn.functional.layer_norm(features(2), (FEATURE_WIDTH,), weights["0.weight"], weights["0.bias"], 1e-5)
    expected = nn.functional.gelu(normed @ weights["1.weight"].T) @ weights["3.weight"].T
    torch.testing.assert_close(written[:, 1:-1], expected)
    assert torch.equal(written[:, 0], edit.boundary[:1].expand(2, -1))
    assert torch.equal(written[:, -1], edit.boundary[1:].expand(2, -1))


def test_the_papers_connector_is_dropout_and_one_linear() -> None:
    (placement,) = PAPER.place(ANATOMY)
    edit: Any = placement.edit
    assert [type(layer) for layer in edit.layers] == [nn.Dropout, nn.Linear]
    assert list(dict(edit.named_parameters())) == ["layers.1.weight", "layers.1.bias"]
    ones = torch.ones(1000, FEATURE_WIDTH)
    assert not torch.equal(edit.layers(ones), edit.layers(ones))
    edit.eval()
    assert torch.equal(edit.layers(ones), ones @ edit.layers[-1].weight.T + edit.layers[-1].bias)


def test_names_of_tensors_do_not_depend_on_what_has_no_weights() -> None:
    plain, dropping = (dict(Bridge(kind="mlp", dropout=p).place(ANATOMY)[0].edit.named_parameters()) for p in (0.0, 0.5))
    assert plain.keys() == dropping.keys()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"norm": "batch"}, "the bridge's norm is 'batch' with eps 1e-05: give layer or none, and an eps above 0"),
    ({"norm_eps": 0.0}, "the bridge's norm is 'layer' with eps 0.0"),
    ({"activation": "tanh"}, "the bridge's activation is 'tanh': give one of gelu, relu, silu"),
    ({"dropout": 1.0}, "the bridge's dropout is 1.0: give 0 or more and less than 1"),
    ({"boundary": "fixed"}, "the bridge's boundary is 'fixed': give none or learned"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bridge(**{"kind": "mlp", **fields})
