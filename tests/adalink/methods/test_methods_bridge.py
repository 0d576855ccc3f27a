from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import FEATURE_WIDTH, INPUTS, N_PATCHES, WIDTH, features, tiny
from torch import nn

from adalink import EMBEDDING, IMAGE, TEXT, Anatomy, Bridge, InputSpec, Slots, TokenMap
from adalink.errors import ConfigError

ANATOMY = Anatomy.read(tiny("opt"), INPUTS)


def placed(**fields: Any) -> Any:
    (placement,) = Bridge(**fields).place(ANATOMY)
    assert (placement.port, placement.domains) == (EMBEDDING, (IMAGE,))
    return placement.edit.double()


def test_each_slot_gets_the_projected_feature_of_its_ordinal_whatever_it_held() -> None:
    domain = torch.tensor([[IMAGE, IMAGE, IMAGE, TEXT], [TEXT, IMAGE, IMAGE, IMAGE]])
    tokens = TokenMap(domain, torch.zeros(2, dtype=torch.int64), {"image": features(2)}).window(2, 0, 4, 4)
    edit = placed(kind="linear")
    written = edit(torch.full((2, 4, WIDTH), float("nan"), dtype=torch.float64), tokens, None)
    expected = edit.layers(features(2))
    assert torch.equal(written[0, :3], expected[0])
    assert torch.equal(written[1, 1:], expected[1])
    assert written.isfinite().all()  # outside its own tokens too: `where` passes 0 * inf in the backward pass


def test_a_picture_in_two_parts_is_one_picture() -> None:
    domain = torch.tensor([[IMAGE, TEXT, IMAGE, IMAGE]])
    token_map = TokenMap(domain, torch.zeros(1, dtype=torch.int64), {"image": features(1)})
    edit = placed(kind="mlp")
    h = torch.zeros(1, 4, WIDTH, dtype=torch.float64)
    whole = edit(h, token_map.window(1, 0, 4, 4), None)
    parts = [edit(h[:, :2], token_map.window(1, 0, 2, 2), None), edit(h[:, 2:], token_map.window(1, 2, 2, 4), None)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_its_two_kinds_and_their_parameters() -> None:
    linear, mlp, narrow = placed(kind="linear"), placed(kind="mlp"), placed(kind="mlp", hidden=7)
    assert [type(layer) for layer in linear.layers] == [nn.LayerNorm, nn.Linear]
    assert [type(layer) for layer in mlp.layers] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert mlp.layers[1].out_features == WIDTH
    assert (narrow.layers[1].out_features, narrow.layers[3].in_features, narrow.layers[3].out_features) == (7, 7, WIDTH)
    assert linear.layers[1].weight.shape == (WIDTH, FEATURE_WIDTH)


def test_the_last_linear_starts_smaller_where_that_is_asked() -> None:
    torch.manual_seed(1)
    plain = placed(kind="mlp")
    torch.manual_seed(1)
    small = placed(kind="mlp", init_scale=0.25)
    torch.testing.assert_close(small.layers[3].weight, 0.25 * plain.layers[3].weight)
    torch.testing.assert_close(small.layers[3].bias, 0.25 * plain.layers[3].bias)
    assert torch.equal(small.layers[1].weight, plain.layers[1].weight)


def test_encoders_of_any_scale_start_alike() -> None:
    edit = placed(kind="linear")
    torch.testing.assert_close(edit.layers(1000 * features(2)), edit.layers(features(2)), rtol=1e-4, atol=1e-4)


def test_a_pooled_slot_holds_the_projected_mean_of_its_region() -> None:
    anatomy = dataclasses.replace(ANATOMY, inputs={"image": InputSpec(16, FEATURE_WIDTH)})
    bridge = Bridge(kind="linear", norm="none", pool=2)
    assert bridge.slots(anatomy) == (Slots(IMAGE, 4),)
    edit: Any = bridge.place(anatomy)[0].edit.double()
    patches = torch.randn(2, 16, FEATURE_WIDTH, dtype=torch.float64)
    tokens = TokenMap(torch.full((2, 4), IMAGE), torch.zeros(2, dtype=torch.int64), {"image": patches}).window(2, 0, 4, 4)
    upper_right = edit.layers[-1](patches[:, [2, 3, 6, 7]].mean(1))  # rows of four patches
    torch.testing.assert_close(edit(torch.zeros(2, 4, WIDTH, dtype=torch.float64), tokens, None)[:, 1], upper_right)


def test_features_are_dropped_in_training_alone() -> None:
    edit = placed(kind="mlp", norm="none", feature_dropout=0.5)
    first = edit.layers[:1]
    ones = torch.ones(1000, FEATURE_WIDTH, dtype=torch.float64)
    assert set(first(ones).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(first.eval()(ones), ones)


@pytest.mark.parametrize(("count", "pool"), [(15, 2), (16, 5)])
def test_a_grid_that_cannot_be_pooled_is_refused(count: int, pool: int) -> None:
    anatomy = dataclasses.replace(ANATOMY, inputs={"image": InputSpec(count, FEATURE_WIDTH)})
    with pytest.raises(ConfigError, match=f"pool is {pool}, and this encoder gives {count} patches: only a square grid of more rows"):
        Bridge(kind="linear", pool=pool).place(anatomy)


def test_one_slot_for_each_patch() -> None:
    assert Bridge(kind="linear").slots(ANATOMY) == (Slots(IMAGE, N_PATCHES),)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "conv"}, "the bridge's kind is 'conv': give linear or mlp"),
    ({"kind": "mlp", "hidden": -1}, "the bridge's hidden width is -1 with kind mlp"),
    ({"kind": "linear", "hidden": 8}, "the bridge's hidden width is 8 with kind linear: only an mlp has one"),
    ({"kind": "mlp", "init_scale": 0.0}, "the bridge's init_scale is 0.0: give a positive number"),
    ({"kind": "mlp", "feature_dropout": 1.0}, "the bridge's feature_dropout is 1.0: give 0 or more and less than 1"),
    ({"kind": "mlp", "pool": -1}, "the bridge's pool is -1: give the rows and columns to keep, or 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bridge(**fields)
