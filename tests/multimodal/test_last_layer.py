"""The last layer runs where something is predicted and at no other token, and what is learnt is what the whole layer teaches: in every family, by every method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from sharing import EXACT, FORKED, PACKED, adapted, batch_of, check_equal, in_double, learnt, slots_of
from tiny import tiny
from torch import Tensor, nn

from adalink import (
    ANSWER,
    EPALM,
    IA3,
    TEXT,
    AdaLink,
    AdaptedModel,
    Adapter,
    BitFit,
    Bottleneck,
    Bridge,
    Gated,
    LoRA,
    Method,
    Placement,
    Port,
    Prefix,
    Prompt,
    TokenMap,
    UniPELT,
)
from adalink.attach import attach
from multimodal.batch import Batch, collate
from multimodal.encode import Row
from multimodal.language_loss import LanguageLoss
from multimodal.last_layer import LastLayer
from multimodal.packing import fork_rows, pack_rows, separate_rows

WHOLE = ("gpt_neo", "gpt_neo_local", "mamba")  # GPT-Neo counts a query's place from the last key
ALL = {"all": ("all",)}
BRIDGE = Bridge(kind="mlp")
METHODS: dict[str, dict[str, Method]] = {
    "lora": {"bridge": BRIDGE, "lora": LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, alpha=2.0)},
    "bitfit": {"bridge": BRIDGE, "bitfit": BitFit(groups={"image": ("image",), "answer": ("answer",)}, force_bias=True)},
    "ia3": {"bridge": BRIDGE, "ia3": IA3(groups={"image": ("image",), "text": ("text",)})},
    "bottleneck": {"bridge": BRIDGE, "bottleneck": Bottleneck(width=4)},
    "prefix": {"bridge": BRIDGE, "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6)},
    "prompt and adalink": {"prompt": Prompt(length=2, init_std=0.5), "adalink": AdaLink(rank=4, modalities=("text",))},
    "epalm": {"epalm": EPALM(layers=(0, 2), n_taps=2, connector="per_tap")},
    "epalm in the last layer": {"epalm": EPALM(layers=(1, 2), n_taps=1, connector="shared")},
    "epalm as published": {"epalm": EPALM(layers=(1, 2), n_taps=1, connector="shared", mask="published")},
}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@contextlib.contextmanager
def rows_of_last(model: AdaptedModel) -> Iterator[dict[str, list[int]]]:
    """How many tokens each linear of the last layer was given, run by run. A hook of all modules, which hangs on none."""
    stack, name = model.attachment.stack, model.anatomy.layers[-1]
    names = {module: inner for inner, module in stack.get_submodule(name).named_modules()}
    seen: dict[str, list[int]] = {}

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in names and args and isinstance(args[0], Tensor):
            seen.setdefault(names[module], []).append(args[0].numel() // args[0].shape[-1])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def whole(model: AdaptedModel) -> LanguageLoss:
    """The loss of a model whose last layer is run on every token."""
    loss = LanguageLoss(model)
    loss.call = partial(model.base)
    return loss


def feed_forward(model: AdaptedModel) -> str:
    """The last linear of a layer, after its name."""
    layer = model.anatomy.layers[-1] + "."
    return [linear.name for linear in model.anatomy.linears if linear.name.startswith(layer)][-1].removeprefix(layer)


def check_short(model: AdaptedModel, batch: Batch) -> None:
    """Equal to the whole layer, whose feed-forward network then sees the sources alone."""
    loss = LanguageLoss(model)
    assert loss.told.endswith("; the last layer runs where something is predicted")
    with rows_of_last(model) as short:
        found = learnt(model, batch, loss)
    with rows_of_last(model) as every:
        wanted = learnt(model, batch, whole(model))
    check_equal(found, wanted)
    assert short[feed_forward(model)][-1] == batch.source.numel()
    assert every[feed_forward(model)][-1] == batch.ids.numel()


@pytest.mark.parametrize("name", [name for name in PACKED if name not in WHOLE])
def test_packed_and_separate_rows_learn_the_same_in_every_family(name: str) -> None:
    model = adapted(name)
    for arrange in (pack_rows, separate_rows):
        check_short(model, batch_of(arrange, slots_of(model)))


@pytest.mark.parametrize("name", FORKED)
def test_forked_rows_learn_the_same_in_every_family(name: str) -> None:
    model = adapted(name)
    batch = batch_of(fork_rows, slots_of(model))
    with rows_of_last(model) as seen:
        found = learnt(model, batch)
    check_equal(found, learnt(model, batch, whole(model)))
    assert batch.beginning is not None
    if name not in WHOLE:
        assert batch.beginning.source.numel() in seen[feed_forward(model)]


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_every_method_learns_the_same(family: str, methods: dict[str, Method]) -> None:
    model = adapted(family, methods)
    published = any(isinstance(method, EPALM) and method.mask == "published" for method in methods.values())
    for arrange in (separate_rows,) if published else (pack_rows, separate_rows):
        check_short(model, batch_of(arrange, slots_of(model)))
