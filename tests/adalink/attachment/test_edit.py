"""Adapters: which edits they hold, in which order, under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tiny import FEATURE_WIDTH, INPUTS, N_PATCHES, WIDTH, tiny
from torch import nn

from adalink import IMAGE, PROMPT, TEXT, AdaLink, Adapter, Anatomy, Bridge, Method, Placement, Port, Prompt, Slots, attach
from adalink.errors import AttachError, ConfigError

ANATOMY = Anatomy.read(tiny("opt"), INPUTS)
METHODS: dict[str, Method] = {"adalink": AdaLink(rank=4, modalities=("text", "image")), "bridge": Bridge(kind="linear"), "soft": Prompt(length=2, init_std=0.1)}


@dataclass(frozen=True)
class Placed:
    """A method that is nothing but its placements."""

    placements: tuple[Placement, ...]

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        return self.placements


def at(role: str, edit: nn.Module, module: str = "", side: str = "embedding") -> Placement:
    return Placement(role, Port(module, side), edit, (TEXT,))  # type: ignore[arg-type]


def test_methods_that_fill_slots_come_first_whatever_their_order() -> None:
    adapter = Adapter(METHODS, ANATOMY)
    assert [placement.role for placement in adapter.placements] == ["bridge.image", "soft.soft", "adalink.text", "adalink.image"]
    assert adapter.slots == (Slots(IMAGE, N_PATCHES), Slots(PROMPT, 2))


def test_tensors_are_named_by_their_role_and_not_by_the_host() -> None:
    names = set(Adapter(METHODS, ANATOMY).state_dict())
    assert names == {
        *(f"adalink.{kind}.{part}.weight" for kind in ("text", "image") for part in ("down", "up")),
        *(f"bridge.image.layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
        "soft.soft.table",
    }
    assert names == set(Adapter(METHODS, Anatomy.read(tiny("llama"), INPUTS)).state_dict())


def test_parameters_are_counted_for_each_method() -> None:
    assert Adapter(METHODS, ANATOMY).n_parameters() == {
        "adalink": 2 * 2 * WIDTH * 4, "bridge": 2 * FEATURE_WIDTH + FEATURE_WIDTH * WIDTH + WIDTH, "soft": 2 * WIDTH,
    }  # fmt: skip


def test_an_edit_shared_by_two_ports_is_counted_once() -> None:
    shared = nn.Linear(3, 3)
    adapter = Adapter({"one": Placed((at("a", shared), at("b", shared)))}, ANATOMY)
    assert adapter.n_parameters() == {"one": 12}


def test_an_adapter_without_a_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="an adapter needs at least one method, got none: give for instance AdaLink"):
        Adapter({}, ANATOMY)


def test_two_methods_that_reserve_the_same_domain_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a and b reserve slots of the same domain, 3 \(prompt\): keep one of them"):
        Adapter({"a": Prompt(length=1, init_std=0.1), "b": Prompt(length=2, init_std=0.1)}, ANATOMY)


def test_two_edits_of_one_role_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"two edits of one adapter are called one.a: give each its own role"):
        Adapter({"one": Placed((at("a", nn.Linear(2, 2)), at("a", nn.Linear(2, 2))))}, ANATOMY)


def test_a_bridge_without_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bridge needs an encoder's features, and this model has none: compose it with a vision tower, or leave"):
        Adapter({"bridge": Bridge(kind="linear")}, Anatomy.read(tiny("opt")))


def test_a_port_that_the_model_lacks_is_refused_with_those_that_are_near() -> None:
    model = tiny("opt")
    adapter = Adapter({"one": Placed((at("a", nn.Identity(), "layers.9.self_attn.q_proj", "output"),))}, ANATOMY)
    message = r"port 'layers.9.self_attn.q_proj' is not in this model; names ending in q_proj: layers.0.self_attn.q_proj, layers.1.self_attn.q_proj"
    with pytest.raises(AttachError, match=message):
        attach(model, adapter)
    nowhere = Adapter({"one": Placed((at("a", nn.Identity(), "no_such_thing", "output"),))}, ANATOMY)
    with pytest.raises(AttachError, match="names ending in no_such_thing: none"):
        attach(model, nowhere)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_state_dict_is_the_whole_adapter() -> None:
    first, second = Adapter(METHODS, ANATOMY), Adapter(METHODS, ANATOMY)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
