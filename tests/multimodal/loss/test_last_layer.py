"""The last layer runs where something is predicted and at no other token, and what is learnt is what the whole layer teaches: in every family, by every method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from shared import covering, every_other
from sharing import EXACT, FORKED, PACKED, adapted, batch_of, check_equal, gradients, in_double, slots_of
from tiny import tiny
from tiny_families import HARD
from torch import Tensor, nn

from adalink import (
    ANSWER,
    EPALM,
    IA3,
    AdaLink,
    AdaptedModel,
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
from adalink.anatomy import Anatomy
from adalink.edit import Slots
from adalink.tokens import Tokens
from multimodal.batches.collate import Batch
from multimodal.batches.packing import fork_rows, pack_rows, separate_rows
from multimodal.loss import savings as last_layer
from multimodal.loss.language_loss import LanguageLoss
from multimodal.loss.savings import LastLayer

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
    assert loss.note == "the last layer runs where something is predicted"
    with rows_of_last(model) as short:
        found = gradients(model, batch, loss)
    with rows_of_last(model) as every:
        wanted = gradients(model, batch, whole(model))
    check_equal(found, wanted)
    assert short[feed_forward(model)][-1] == batch.source.numel()
    assert every[feed_forward(model)][-1] == batch.ids.numel()


@pytest.mark.parametrize("name", every_other([name for name in PACKED if name not in WHOLE], shift=1, hard=HARD))
def test_packed_and_separate_rows_learn_the_same_in_every_family(name: str) -> None:
    model = adapted(name)
    for arrange in (pack_rows, separate_rows):
        check_short(model, batch_of(arrange, slots_of(model)))


@pytest.mark.parametrize("name", every_other(FORKED, hard=HARD))
def test_forked_rows_learn_the_same_in_every_family(name: str) -> None:
    model = adapted(name)
    batch = batch_of(fork_rows, slots_of(model))
    with rows_of_last(model) as seen:
        found = gradients(model, batch)
    check_equal(found, gradients(model, batch, whole(model)))
    assert batch.shared_prefix is not None
    if name not in WHOLE:
        assert batch.shared_prefix.source.numel() in seen[feed_forward(model)]


@pytest.mark.parametrize(("name", "family"), covering(product(METHODS, ("llama", "opt", "gpt2")), each=1))
def test_every_method_learns_the_same(name: str, family: str) -> None:
    methods = METHODS[name]
    model = adapted(family, methods)
    published = any(isinstance(method, EPALM) and method.mask == "published" for method in methods.values())
    for arrange in (separate_rows,) if published else (pack_rows, separate_rows):
        check_short(model, batch_of(arrange, slots_of(model)))


def test_what_is_dropped_of_a_token_is_drawn_once_for_the_whole_layer() -> None:
    """The last layer's own dropout is drawn for all tokens, and a token that is asked for twice has one draw."""
    lora = LoRA(groups=ALL, rank=2, alpha=2.0, targets=("down_proj", "v_proj"), exclude_layers=(0,), dropout=0.5)
    model = adapted("llama", {"bridge": BRIDGE, "lora": lora})
    model.active_adapter().train()
    batch = batch_of(pack_rows, slots_of(model))
    draws = []
    for loss in (LanguageLoss(model), whole(model)):
        assert loss.head
        assert loss.note
        torch.manual_seed(3)
        draws.append(gradients(model, batch, loss))
    check_equal(*draws)


def test_rows_of_several_adapters_learn_the_same() -> None:
    model = adapted("llama", {"lora": LoRA(groups=ALL, rank=2, alpha=2.0, dropout=0.5)})
    other = model.add_adapter("b", {"lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2.0)}).double()
    model.adapters.requires_grad_(True)  # both are trained here, not the active one alone
    batch = batch_of(separate_rows, slots_of(model))
    rows = model.serving(len(batch.ids), [("a", "b")[i % 2] for i in range(len(batch.ids))])
    token_map = TokenMap(batch.domain, rows.row, serving=rows.serving)
    weights = [*model.adapters["a"].train().parameters(), *other.parameters()]
    found = []
    for loss in (LanguageLoss(model), whole(model)):
        assert loss.head
        assert loss.note == "the last layer runs where something is predicted" or loss.call is not model.base
        torch.manual_seed(3)
        total = loss(batch, token_map)
        found.append([total.detach(), *torch.autograd.grad(total, weights)])
    for one, wanted in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted, rtol=EXACT, atol=EXACT)


def why(model: AdaptedModel) -> str:
    """Why the layer is run on every token, which it then is."""
    batch, loss = batch_of(separate_rows, slots_of(model)), LanguageLoss(model)
    stated = loss.note
    with rows_of_last(model) as seen:
        gradients(model, batch, loss)
    assert seen[feed_forward(model)][-1] == batch.ids.numel()
    return stated.removeprefix("the last layer runs on every token: ")


@pytest.mark.parametrize("methods", [{"gated": Gated(inner=Bottleneck(width=4))}, {"unipelt": UniPELT(variant="AP", bottleneck=4, prefix_length=2, prefix_hidden=6)}])
def test_gates_read_whole_rows(methods: dict[str, Method]) -> None:
    assert why(adapted("llama", methods)) == "the adapter reads whole rows there"


def test_gates_below_the_last_layer_are_none_of_its_business() -> None:
    below = Gated(inner=LoRA(groups=ALL, rank=2, alpha=2.0, exclude_layers=(1,)))
    check_short(adapted("llama", {"bridge": BRIDGE, "gated": below}), batch_of(separate_rows))


def test_hooks_of_others_and_checkpointing_need_every_token() -> None:
    stated = "something else is hooked to it, or it is checkpointed"
    for part in ("model.layers.1.mlp.down_proj", "model.norm"):
        model = adapted("llama")
        model.base.get_submodule(part).register_forward_hook(lambda *_: None)
        assert why(model) == stated
    model = adapted("opt")
    model.attachment.checkpoint_layers()
    assert why(model) == stated


def test_a_compiled_model_and_a_family_that_counts_queries_need_every_token() -> None:
    assert why(adapted("gpt_neo")) == "the model was tried so, and gave other scores"
    assert whole(adapted("llama")).note == "the last layer runs on every token: the model is compiled"
    t5 = AdaptedModel(tiny("t5"))
    assert LastLayer(t5).why_whole() == "the model has a decoder of its own, or its attention takes no mask for each token"


def test_a_wrong_short_layer_is_found_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the trial: GPT-Neo without it, and a mask whose rows are those of other tokens."""
    model = adapted("gpt_neo")
    batch, loss = batch_of(pack_rows, slots_of(model), texts=[(2, [4, 6, 2])]), LanguageLoss(model)  # captions: one token predicts three
    vars(loss.last_layer)["_form"] = "filled up"
    assert (gradients(model, batch, loss)[0] - gradients(model, batch)[0]).abs() > 1e-3
    right = last_layer._queried
    monkeypatch.setattr(last_layer, "_queried", lambda mask, tokens, source, dtype: right(mask, tokens, source.roll(1, 1), dtype))
    assert "gave other scores" in LanguageLoss(adapted("llama")).note


class Counted(nn.Module):
    """Adds as many times a vector as tokens of the domain come before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        return h + x * self.step * tokens.ordinal[..., None]


@dataclass(frozen=True)
class CountedAt:
    """An edit of answers at a port: `norm` for the final norm, `layer` for the last layer."""

    side: str

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        name = anatomy.final_norm if self.side == "norm" else anatomy.layers[-1]
        return [Placement("counted", Port(str(name), "output"), Counted(anatomy.width), (ANSWER,))]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_after_the_layer_sees_the_tokens_that_were_asked_for(family: str) -> None:
    model = adapted(family, {"bridge": BRIDGE, "counted": CountedAt("norm")})
    for arrange in (pack_rows, separate_rows):
        check_short(model, batch_of(arrange))
    assert why(adapted(family, {"bridge": BRIDGE, "counted": CountedAt("layer")})) == "the adapter reads whole rows there"


def test_a_call_that_fails_leaves_the_layer_as_it_was() -> None:
    model = adapted("opt")
    loss = LanguageLoss(model)
    assert loss.note
    model.base.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model, batch_of(pack_rows, slots_of(model)), loss)
    assert not any("forward" in vars(module) for module in model.modules())
