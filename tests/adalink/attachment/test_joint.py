"""Edits that are made at once (LoRA by domain) give what they give one after the other, and run where that is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from double import InDouble
from tiny import INPUTS, excite, rows, run, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adalink import (
    IA3,
    AdaLink,
    Adapter,
    Anatomy,
    Attachment,
    BitFit,
    Bottleneck,
    Gated,
    LoRA,
    Method,
    TokenMap,
    UniPELT,
    attach,
)
from adalink.attachment.attachment import Run, runs_of
from adalink.edit import Joint

TWO = {"image": ("image",), "text": ("text",)}
OVERLAP = {**TWO, "shared": ("image", "text")}
METHODS: dict[str, dict[str, Method]] = {
    "lora": {"lora": LoRA(groups=TWO, rank=2, alpha=4)},
    "lora of ranks, biases and dropout": {"lora": LoRA(groups=OVERLAP, rank={"image": 4, "text": 2, "shared": 1}, alpha=4, bias="all", dropout=0.4)},
    "lora of queries and values": {"lora": LoRA(groups=TWO, rank=2, alpha=2, targets=("query", "value"))},
    "bitfit": {"bitfit": BitFit(groups=TWO, force_bias=True, dropout={"image": 0.5, "text": 0.0})},
    "ia3": {"ia3": IA3(groups=OVERLAP, dropout=0.3)},
    "several": {"lora": LoRA(groups=TWO, rank=2, alpha=4), "more": LoRA(groups={"all": ("all",)}, rank=1, alpha=1), "ia3": IA3(groups=TWO), "bitfit": BitFit(groups=TWO, force_bias=True)},
    "gated": {"lora": Gated(inner=LoRA(groups=TWO, rank=2, alpha=2)), "ia3": Gated(inner=IA3(groups=TWO))},
    "unipelt": {"unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)},
    "bottleneck": {"one": Bottleneck(width=4), "image": Bottleneck(width=3, domains=(2,))},
}  # fmt: skip
FAMILIES = ("llama", "opt", "gpt2", "t5")


def model_of(family: str) -> Any:
    with InDouble():  # norms and rotations are rounded to float32 otherwise
        return tiny(family)


def attached(model: Any, name: str, n: int = 1) -> tuple[Attachment, list[Adapter]]:
    anatomy = Anatomy.read(model, INPUTS)
    adapters = [Adapter(METHODS[name], anatomy).double() for _ in range(n)]
    for seed, adapter in enumerate(adapters):
        excite(adapter, seed)
    return attach(model, *adapters, anatomy=anatomy), adapters


def joint_edits(adapters: list[Adapter]) -> list[nn.Module]:
    return [placement.edit for adapter in adapters for placement in adapter.placements if isinstance(placement.edit, Joint) and placement.edit.joins(placement.edit)]


@contextmanager
def one_by_one(adapters: list[Adapter]) -> Iterator[list[int]]:
    """Inside the block each edit is called by itself, since something watches it; what comes back counts the calls."""
    calls: list[int] = []
    handles = [edit.register_forward_hook(lambda *_: calls.append(1)) for edit in joint_edits(adapters)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def learned(model: Any, attachment: Attachment, adapters: list[Adapter], served: list[int]) -> list[Tensor]:
    """Logits, loss, and the gradient of every parameter."""
    ids, domain, mask = rows(len(served))
    torch.manual_seed(7)  # of dropout
    with attachment.bind(TokenMap(domain, torch.tensor(served), serving=frozenset(served) - {-1})), InDouble():
        logits = run(model, ids, mask)
        loss = logits.square().mean()
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [logits, loss, *(gradient for gradient in gradients if gradient is not None)]


def check_same(model: Any, attachment: Attachment, adapters: list[Adapter], served: list[int]) -> None:
    with one_by_one(adapters) as calls:
        expected = learned(model, attachment, adapters, served)
        n_calls = len(calls)
    found = learned(model, attachment, adapters, served)
    assert n_calls
    assert len(calls) == n_calls
    assert len(found) == len(expected) > 3
    assert any(gradient.abs().max() > 0 for gradient in expected[2:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "family"), [(name, FAMILIES[(i + j) % 4]) for i, name in enumerate(METHODS) for j in (0, 1)])
def test_loss_and_every_gradient_are_those_of_one_edit_after_the_other(name: str, family: str) -> None:
    model = model_of(family)
    check_same(model, *attached(model, name), [0, 0, -1])


@pytest.mark.parametrize("name", ["lora of ranks, biases and dropout", "gated", "several"])
def test_rows_of_several_adapters_too(name: str) -> None:
    model = model_of("llama")
    check_same(model, *attached(model, name, 2), [1, 0, -1, 1])


@pytest.mark.parametrize("name", ["lora of ranks, biases and dropout", "unipelt", "several"])
def test_layers_that_run_again_give_the_same_gradients_bit_for_bit(name: str) -> None:
    model = model_of("opt")  # which casts nothing: a backward pass does not run in double
    attachment, adapters = attached(model, name)
    plain = learned(model, attachment, adapters, [0, 0, 0])
    attachment.checkpoint_layers()
    for one, other in zip(learned(model, attachment, adapters, [0, 0, 0]), plain, strict=True):
        assert torch.equal(one, other)
    check_same(model, attachment, adapters, [0, 0, -1])


@pytest.mark.parametrize("name", ["lora", "several", "unipelt"])
def test_generation_with_a_cache_writes_what_one_edit_after_the_other_writes(name: str) -> None:
    model = model_of("llama")
    attachment, adapters = attached(model, name, 2)
    ids, domain, mask = rows(3)
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def written(use_cache: bool) -> Any:
        with attachment.bind(TokenMap(domain, torch.tensor([0, 1, -1]), serving=frozenset({0, 1}))), InDouble():
            for adapter in adapters:
                adapter.eval()
            return model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings)

    with one_by_one(adapters):
        expected = written(True)
    for found in (written(True), written(False)):
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_of_other_domains_and_rows_are_untouched_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = model_of("gpt2")
    attachment, _ = attached(model, name)
    _, domain, _ = rows(3)
    tokens = TokenMap(domain, torch.tensor([0, -1, 0])).window(3, 0, domain.shape[1], domain.shape[1])
    seen = 0
    for port, placed in attachment.at.items():
        if port.side not in ("output", "input", "returned"):
            continue
        linear = next((one for one in attachment.anatomy.linears if one.name == port.module), None)
        wide, read = (attachment.anatomy.layer_width,) * 2 if linear is None else (linear.n_out, linear.n_in)
        h, x = (torch.randn(*domain.shape, read if port.side == "input" else width).to(dtype) for width in (wide, read))
        for one in (one for one in runs_of(placed) if one.modules):
            after = one(h, tokens, h if port.side == "input" else x)
            own = torch.stack([tokens.select(placement.domains, 0) for placement in one.placements]).any(0)[..., 0]
            assert after.dtype == dtype
            assert torch.equal(after[~own], h[~own])
            assert not torch.equal(after[own], h[own])
            seen += 1
    assert seen


def runs(method: Method, family: str = "llama") -> dict[str, list[tuple[str, ...]]]:
    """The roles of each run, at the ports of the first layer."""
    adapter = Adapter({"m": method}, Anatomy.read(tiny(family)))
    at: dict[str, list[tuple[int, Any]]] = {}
    for placement in adapter.placements:
        at.setdefault(f"{placement.port.module}.{placement.port.side}", []).append((0, placement))
    return {port: [tuple(one.role.split(".")[1] for one in found.placements) for found in runs_of(placed)] for port, placed in at.items()}


def test_groups_with_a_token_in_common_are_made_one_after_the_other() -> None:
    assert set(map(tuple, runs(LoRA(groups=OVERLAP, rank=1)).values())) == {(("image", "text"), ("shared",))}
    assert set(map(tuple, runs(LoRA(groups=TWO, rank=1)).values())) == {(("image", "text"),)}


def test_adapters_are_made_apart_and_only_edits_of_a_kind_together() -> None:
    anatomy = Anatomy.read(tiny("llama"))
    one, other = (Adapter({"lora": LoRA(groups=TWO, rank=1), "bitfit": BitFit(groups=TWO, force_bias=True)}, anatomy) for _ in range(2))
    port = one.placements[0].port
    placed = [(index, placement) for index, adapter in enumerate((one, other)) for placement in adapter.placements if placement.port == port]
    found: tuple[Run, ...] = runs_of(placed)
    assert [(each.index, [placement.role.split(".")[0] for placement in each.placements]) for each in found] == [
        (index, [kind, kind]) for index in (0, 1) for kind in ("lora", "bitfit")
    ]


def test_an_edit_that_knows_nothing_of_others_is_made_alone() -> None:
    adapter = Adapter({"gated": Gated(inner=AdaLink(rank=2, modalities=("text", "image")))}, Anatomy.read(tiny("llama"), INPUTS))
    found = runs_of([(0, placement) for placement in adapter.placements])
    assert [len(one.placements) for one in found] == [1, 1]
    assert not any(one.modules for one in found)


@pytest.mark.parametrize("name", ["lora", "bitfit", "ia3", "bottleneck"])
def test_under_autocast_edits_round_as_they_do_one_after_the_other(name: str) -> None:
    model: Any = tiny("llama").float()
    attachment, adapters = attached(model, name)
    for adapter in adapters:
        adapter.float().eval()
    ids, domain, mask = rows(3)

    def logits(autocast: bool) -> Tensor:
        with attachment.bind(TokenMap(domain, torch.zeros(3, dtype=torch.int64))), torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            found: Tensor = run(model, ids, mask)
        return found.float()

    exact = logits(False)
    with one_by_one(adapters):
        apart = (logits(True) - exact).norm()
    assert (logits(True) - exact).norm() < 1.5 * apart


class Counted(TorchDispatchMode):
    """How often each operation runs inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.n[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_two_groups_cost_a_product_down_and_one_up_and_no_pass_over_the_hidden_state() -> None:
    model: Any = tiny("llama")
    ids, domain, mask = rows(3)
    with Counted() as plain:
        run(model, ids, mask)
    attachment, _ = attached(model, "lora")
    token_map = TokenMap(domain, torch.zeros(3, dtype=torch.int64))
    with attachment.bind(token_map), Counted() as adapted:
        run(model, ids, mask)
    with Counted() as window:
        token_map.window(3, 0, ids.shape[1], ids.shape[1])
    n = len(attachment.anatomy.linears)
    assert {name: adapted.n[name] - plain.n[name] - window.n[name] for name in ("where", "add", "addmm", "mm")} == {"where": 0, "add": 0, "addmm": n, "mm": n}
