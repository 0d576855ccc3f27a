"""A batch of several adapters: each one's edits are run on its own rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import EXACT, INPUTS, excite, features, rows, run, taps, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adalink import BASE_NAME, AdaLink, AdaptedModel, Adapter, Anatomy, Attachment, Bridge, Gated, LoRA, Method, TokenMap, attach
from adalink.errors import ConfigError

METHODS: dict[str, dict[str, Method]] = {
    "input": {"bridge": Bridge(kind="mlp", hidden=8), "adalink": AdaLink(rank=4, modalities=("text", "image"))},
    "deep": {"bridge": Bridge(kind="linear"), "lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=4)},
}


def attached(model: Any, method: dict[str, Method]) -> tuple[Attachment, list[Adapter]]:
    """Three adapters of a method."""
    anatomy = Anatomy.read(model, INPUTS)
    adapters = [Adapter(method, anatomy).double() for _ in range(3)]
    for seed, adapter in enumerate(adapters):
        excite(adapter, seed)
    return attach(model, *adapters, anatomy=anatomy), adapters


def mapped(domain: Tensor, row: list[int]) -> TokenMap:
    inputs = {"image": features(len(row)), "image_taps": taps(len(row))}
    return TokenMap(domain, torch.tensor(row), inputs, serving=frozenset(row) - {-1})


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_rows_are_what_each_is_alone_and_edits_see_their_own_rows(family: str, method: str) -> None:
    model, row = tiny(family), [2, 0, -1, 2, 0]
    attachment, adapters = attached(model, METHODS[method])
    ids, domain, mask = rows(5)
    sizes: list[int] = []
    edit = next(placement.edit for placement in adapters[2].placements if placement.role.startswith("bridge"))
    handle = edit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with attachment.bind(mapped(domain, row)):
        mixed = run(model, ids, mask)
    assert sizes == [2]
    for index in (2, 0, -1):
        with attachment.bind(mapped(domain, [index] * 5)):
            alone = run(model, ids, mask)
        own = torch.tensor(row) == index
        assert torch.allclose(mixed[own], alone[own], rtol=0, atol=EXACT[family])
        assert not torch.allclose(mixed[~own], alone[~own], rtol=0, atol=1e-3)  # the control
    assert sizes[1:] == [5]  # all rows are its own: none is copied out
    handle.remove()


def test_beams_repeat_the_rows_of_an_adapter() -> None:
    model = tiny("llama")
    _, domain, _ = rows(3)
    tokens = mapped(domain, [1, 0, 1]).window(6, 0, 4, 4)
    assert {adapter: own.tolist() for adapter, own in tokens.rows_of.items()} == {0: [2, 3], 1: [0, 1, 4, 5]}
    assert torch.equal(tokens.of(1).row, torch.ones(4, dtype=torch.int64))
    assert torch.equal(tokens.of(1).inputs["image"], tokens.inputs["image"][[0, 1, 4, 5]])
    assert tokens.of(1) is tokens.of(1)
    assert not mapped(domain, [1, 1, -1]).window(3, 0, 4, 4).rows_of
    assert model.config.num_hidden_layers == 2


def test_rows_that_the_host_knows_are_not_asked_of_the_device() -> None:
    _, domain, _ = rows(5)
    indices = (2, 0, -1, 2, 0)
    with Sought() as sought:
        asked = mapped(domain, list(indices))
    assert sought.n == 2
    with Sought() as sought:
        known = TokenMap(domain, torch.tensor(indices), serving=frozenset({0, 2}), indices=indices)
    assert not sought.n
    assert {adapter: own.tolist() for adapter, own in known.rows_of.items()} == {adapter: own.tolist() for adapter, own in asked.rows_of.items()}
    assert known.cut(torch.tensor([0, 1]), 4, frozenset()).indices is None
    with pytest.raises(ConfigError, match="a token map has 5 rows, and indices for 2: give one for each row, or None"):
        TokenMap(domain, torch.tensor(indices), indices=indices[:2])


@pytest.mark.parametrize("names", [None, ["a", "b", BASE_NAME, "a"], ["b"] * 4, []])
def test_a_models_map_says_which_adapter_serves_each_row(names: list[str] | None) -> None:
    model = AdaptedModel(tiny("llama"))
    for name in ("a", "b"):
        model.add_adapter(name, {"lora": LoRA(rank=1)})
    n = 4 if names is None else len(names)
    found, expected = model.serving(n, names), [model.indices.get(name, -1) for name in names or ["b"] * n]
    assert found.row.tolist() == list(found.indices) == expected
    assert found.row.dtype == torch.int64
    assert found.serving == frozenset(expected) - {-1}


class Sought(TorchDispatchMode):
    """How often, inside the block, a device is asked where something is: the host waits for its answer."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.n += func.__name__.startswith("nonzero")
        return func(*args, **(kwargs or {}))


def test_a_gate_over_the_prompt_keeps_its_value_for_every_row() -> None:
    model = tiny("llama")
    attachment, adapters = attached(model, {"gated": Gated(inner=AdaLink(rank=4, modalities=("text",)))})
    sizes: list[int] = []
    edit = adapters[0].placements[0].edit
    handle = edit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ids, domain, mask = rows(3)
    with attachment.bind(mapped(domain, [0, 1, 0])):
        run(model, ids, mask)
    handle.remove()
    assert sizes == [3]


def test_gradients_of_mixed_rows_are_those_of_each_adapters_own() -> None:
    model = tiny("llama")
    attachment, adapters = attached(model, METHODS["deep"])
    ids, domain, mask = rows(4)
    with attachment.bind(mapped(domain, [0, 1, 0, 1])):
        run(model, ids, mask)[[0, 2]].square().sum().backward()
    mixed = [None if p.grad is None else p.grad.clone() for p in adapters[0].parameters()]
    assert all(p.grad is None or not p.grad.any() for p in adapters[1].parameters())
    adapters[0].zero_grad()
    with attachment.bind(mapped(domain, [0] * 4)):
        run(model, ids, mask)[[0, 2]].square().sum().backward()
    for found, parameter in zip(mixed, adapters[0].parameters(), strict=True):
        assert found is not None
        assert parameter.grad is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-6, atol=1e-8)
