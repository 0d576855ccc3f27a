"""Adapters that serve a row together: one weight of 1 is that adapter to the last bit, and a row's weights are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import fixtures
from tiny import INPUTS, excite, features, rows, tiny
from torch import Tensor

from adalink import AdaLink, AdaptedModel, Bottleneck, Bridge, Gated, LoRA, Method, Prefix, Prompt, TokenMap
from adalink.attachment.inputs import Route
from adalink.attachment.mixture import Mixed
from adalink.edit import EMBEDDING, Placement
from adalink.errors import AttachError, ConfigError
from adalink.methods.adalink import Bottleneck as LowRank
from adalink.tokens import AUTO, TEXT

BOTH = AdaLink(rank=4, modalities=("image", "text"))
KINDS: dict[str, dict[str, Method]] = {
    "adalink": {"adalink": AdaLink(rank=4, modalities=("text",))},
    "lora": {"lora": LoRA(groups={"text": ("text",), "answer": ("answer",)}, rank=2, alpha=4)},
    "bridged": {"bridge": Bridge(kind="linear"), "adalink": BOTH, "bottleneck": Bottleneck(width=4)},
}
NAMES = ("a", "b", "c")


def mixed_model(family: str, kind: str) -> AdaptedModel:
    """Three adapters of a kind, and their mixture."""
    model = AdaptedModel(tiny(family), inputs=INPUTS)
    for seed, name in enumerate(NAMES):
        excite(model.add_adapter(name, KINDS[kind]).double(), seed + 1)
    model.add_mixture(NAMES)
    return model.eval()


def route(*weights: float) -> Route:
    return Route(AUTO, dict(zip(NAMES, weights, strict=True)))


def mapped(model: AdaptedModel, names: list[Any], n_prompt: int | None = None) -> tuple[Tensor, Tensor, TokenMap]:
    """ids, mask, and the map of as many rows as names."""
    ids, domain, mask = rows(len(names))
    domain = torch.where((domain >= 3) & (domain != 2), 0, domain)  # slots of no adapter here are text
    served = model.serving(len(names), names)
    token_map = TokenMap(domain[:, :n_prompt], served.row, {"image": features(len(names))}, serving=served.serving, weights=served.weights)
    return ids[:, :n_prompt], mask[:, :n_prompt], token_map


@torch.no_grad()
def logits(model: AdaptedModel, names: list[Any]) -> Tensor:
    ids, mask, token_map = mapped(model, names)
    config: Any = model.base.config
    extra = {"decoder_input_ids": ids[:, :3]} if config.is_encoder_decoder else {}
    return model(ids, token_map=token_map, attention_mask=mask, **extra).logits  # type: ignore[no-any-return]


# ----------------------------------------
# One adapter, and several.


@pytest.mark.parametrize("family", ["llama", "opt", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_weight_of_one_is_that_adapter_alone_bit_for_bit(family: str, kind: str) -> None:
    model = mixed_model(family, kind)
    for k, name in enumerate(NAMES):
        alone = logits(model, [name] * 3)
        assert torch.equal(logits(model, [route(*(float(i == k) for i in range(3)))] * 3), alone)
    assert not torch.equal(logits(model, [route(0.5, 0.25, 0.25)] * 3), alone)  # the control


@pytest.mark.parametrize(("kind", "beams"), [("adalink", 1), ("bridged", 3), pytest.param("bridged", 1, marks=pytest.mark.slow)])
def test_generation_is_the_same_with_a_cache_and_without_one_and_for_one_adapter_that_adapters(kind: str, beams: int) -> None:
    model = mixed_model("opt", kind)
    ids, mask, token_map = mapped(model, [route(0.6, 0.3, 0.1), route(0.1, 0.1, 0.8), "b"])
    settings: Any = {"attention_mask": mask, "max_new_tokens": 20, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, token_map=token_map, **settings)
    assert torch.equal(cached, model.generate(ids, token_map=token_map, use_cache=False, **settings))
    one = model.generate(ids, token_map=mapped(model, [route(0, 1, 0)] * 3)[2], **settings)
    assert torch.equal(one, model.generate(ids, token_map=mapped(model, ["b"] * 3)[2], **settings))
    assert torch.equal(one[2], cached[2])


def test_a_rows_mixture_is_the_same_in_any_company_and_averaged_weights_are_not() -> None:
    model = mixed_model("opt", "bridged")
    routes = [route(0.7, 0.2, 0.1), route(0.05, 0.9, 0.05), route(0.2, 0.2, 0.6)]
    together = logits(model, routes)
    for i in range(3):
        others: list[Any] = [None, "b", "c"]
        others[i] = routes[i]
        torch.testing.assert_close(logits(model, others)[i], together[i], atol=1e-12, rtol=0)
        others = [route(0.0, 0.0, 1.0)] * 3
        others[i] = routes[i]
        assert torch.equal(logits(model, others)[i], together[i])
    mean = [sum(one.weights[name] for one in routes) / 3 for name in NAMES]
    assert (logits(model, [route(*mean)] * 3) - together).abs().amax((1, 2)).min() > 1e-3  # as the shipped configs of WEMoE have it


def test_linear_edits_mixed_are_the_edit_of_mixed_weights() -> None:
    """AdaLink with one down for all: the mixture is the adapter whose up is the weighted sum, as task arithmetic and WEMoE have it."""
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    for seed, name in enumerate(("a", "b", "sum")):
        excite(model.add_adapter(name, {"adalink": AdaLink(rank=4, modalities=("text",))}).double(), seed + 1)
    a, b, total = (dict(model._adapter(name).named_parameters()) for name in ("a", "b", "sum"))
    up, down = "adalink.text.up.weight", "adalink.text.down.weight"
    with torch.no_grad():
        for other in (b, total):
            other[down].copy_(a[down])
        total[up].copy_(0.3 * a[up] + 0.5 * b[up])
    model.add_mixture(["a", "b"])
    mixed = logits(model, [Route(AUTO, {"a": 0.3, "b": 0.5})] * 3)
    torch.testing.assert_close(mixed, logits(model, ["sum"] * 3), atol=1e-10, rtol=0)
    assert (mixed - logits(model, ["a"] * 3)).abs().max() > 1e-2  # the control


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in sorted(fixtures("wemoe").glob("*.safetensors")) if "gate.out" in load_file(path)])
def test_gated_adapters_give_the_numbers_of_the_reference(path: Path) -> None:
    t = load_file(path)
    hidden, weights = t["gate.hidden"], (t["gate.features"] @ t["gate.weight"].T + t["gate.bias"]).softmax(-1)
    torch.testing.assert_close(weights, t["gate.w"], atol=1e-12, rtol=0)
    edits = []
    for k in range(weights.shape[1]):
        edit = LowRank(hidden.shape[-1], len(t[f"adapter{k}.down"]), "identity", False).double()
        with torch.no_grad():
            edit.down.weight.copy_(t[f"adapter{k}.down"])
            edit.up.weight.copy_(t[f"adapter{k}.up"])
        edits.append(edit)
    from adalink.attachment.attachment import runs_of

    mixed = Mixed([runs_of([(0, Placement("text", EMBEDDING, edit, (TEXT,)))]) for edit in edits])
    token_map = TokenMap(torch.zeros(hidden.shape[:2], dtype=torch.int64), torch.zeros(len(hidden), dtype=torch.int64), serving=frozenset({0}), weights=weights)
    tokens = token_map.window(len(hidden), 0, hidden.shape[1], hidden.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(mixed(hidden, tokens, hidden), t["gate.out"], atol=1e-12, rtol=0)


# ----------------------------------------
# What a mixture is to the model, and what is refused.


def test_a_mixture_is_no_adapter_of_its_own() -> None:
    model = mixed_model("opt", "adalink")
    assert model.adapter_names == list(NAMES)
    assert model.active == "c"
    assert not [name for name in model.state_dict() if AUTO in name]
    with pytest.raises(ConfigError, match="the adapter b is one of a mixture, which would serve without it: delete 'auto' first"):
        model.delete_adapter("b")
    with pytest.raises(ConfigError, match="this model has a mixture of a, b, c already"):
        model.add_mixture(["a", "b"])
    with pytest.raises(ConfigError, match="there is no adapter 'd'"):
        AdaptedModel(tiny("opt")).add_mixture(["d"])
    before = logits(model, ["b"] * 3)
    model.delete_adapter(AUTO)
    assert torch.equal(logits(model, ["b"] * 3), before)
    model.delete_adapter("b")
    frozen = tiny("opt").state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in model.unload().state_dict().items())


def test_a_mixed_row_needs_weights_of_its_adapters_that_sum_to_one_where_they_write() -> None:
    model = mixed_model("opt", "bridged")
    with pytest.raises(AttachError, match="the token map has no weights: name its route"):
        logits(model, [AUTO] * 3)
    with pytest.raises(ConfigError, match="a route has a weight for d, and the mixture is of a, b, c"):
        logits(model, [Route(AUTO, {"d": 1.0})] * 3)
    with pytest.raises(ConfigError, match=r"sum to 0\.8, and adapters that fill slots need shares of one"):
        logits(model, [Route(AUTO, {"a": 0.3, "b": 0.5})] * 3)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"prefix": Prefix(length=2, form="table")}, "the adapter odd changes the"),
        ({"gated": Gated(inner=Bottleneck(width=4))}, "the adapter odd has a gate over its row"),
        ({"prompt": Prompt(length=2)}, "the adapter odd reserves other slots than the first"),
    ],
)
def test_adapters_that_cannot_be_mixed_are_refused(method: dict[str, Method], sentence: str) -> None:
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    model.add_adapter("plain", KINDS["adalink"])
    model.add_adapter("odd", method)
    with pytest.raises(ConfigError, match=sentence + ".*let one adapter serve each row"):
        model.add_mixture(["plain", "odd"])
    assert model.adapter_names == ["plain", "odd"]
