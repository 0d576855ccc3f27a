"""Changed bases: linears of low rank, shares of feed-forward units, steered gates; equal to recorded runs, and refused where they cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_file import FixtureFile
from hosts import host
from shared import fixtures
from tiny import EXACT, FAMILIES, tiny
from torch import Tensor, nn

from adalink import ANSWER, TEXT, Adapter, Anatomy, TokenMap, attach, fingerprint
from adalink.errors import ConfigError
from adalink.lifecycle.base import (
    closest_rows,
    feature_loss,
    fitted_probe,
    norm_loss,
    rank_of,
    set_units,
    slice_units,
    slim_linears,
    steered,
    units_of,
)

FILES = sorted(fixtures("slim").glob("*.safetensors"))
files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def close(found: Any, expected: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(torch.as_tensor(found).detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def of(path: Path) -> tuple[FixtureFile, Any]:
    case = FixtureFile.read(path)
    model = host({"model_type": "llama", **case.spec["config"]}, case.under("base."))
    model.set_attn_implementation("sdpa")  # eager attention has its softmax in float32
    return case, model


def logits(model: Any, case: FixtureFile) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=case.tensors["in.ids"]).logits
    return found


def blocks(model: Any, case: FixtureFile) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(model(input_ids=case.tensors["in.ids"], output_hidden_states=True).hidden_states[1:-1])


@files
def test_linears_of_low_rank_equal_the_authors_module(path: Path) -> None:
    case, base = of(path)
    close(logits(base, case), case.tensors["out.base"])
    weights = {name: module.weight.detach().clone() for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    wanted = blocks(base, case)
    for ratio, recorded in case.spec["low_rank"].items():
        model = copy.deepcopy(base)
        before = sum(parameter.numel() for parameter in model.parameters())
        made = slim_linears(model, float(ratio))
        assert (before, sum(p.numel() for p in model.parameters())) == (recorded["parameters_before"], recorded["parameters_after"])
        assert made.keys() == recorded["linears"].keys()
        for name, one in made.items():
            product, known = one.second @ one.first, recorded["linears"][name]
            assert len(one.first) == known["rank"]
            close(product, case.tensors[f"low_rank.{ratio}.{name}"])
            close((product - weights[name]).square().mean(), known["mse"])
            close((product - weights[name]).abs().max(), known["max_abs"])
            values = torch.linalg.svdvals(weights[name])  # Eckart-Young: the error is what was dropped
            close((product - weights[name]).square().sum(), values[known["rank"] :].square().sum())
        close(logits(model, case), case.tensors[f"out.low_rank.{ratio}"])
        close(norm_loss(made, weights), recorded["loss_norm"])
        close(feature_loss(blocks(model, case), wanted), recorded["loss_features"])


@files
def test_slices_equal_the_recorded_ones_and_a_whole_one_is_the_base(path: Path) -> None:
    case, base = of(path)
    for name, recorded in case.spec["slices"].items():
        model = copy.deepcopy(base)
        slice_units(model, recorded["share_of_units"])
        assert sum(parameter.numel() for parameter in model.parameters()) == recorded["parameters"]
        close(logits(model, case), case.tensors[f"out.slice.{name}"])
    whole = copy.deepcopy(base)
    slice_units(whole, [1.0])
    assert torch.equal(logits(whole, case), logits(base, case))


@files
def test_steered_gates_equal_the_recorded_surgery_come_off_and_touch_their_own_tokens_alone(path: Path) -> None:
    case, base = of(path)
    surgery, v, ids = case.spec["surgery"], case.tensors["probe"].double(), case.tensors["in.ids"]
    rows = closest_rows(base, v, surgery["n_rows"])
    assert rows == [tuple(row) for row in surgery["rows"]]
    before = logits(base, case)
    adapter = on(base, steered(base, v, surgery["alpha"], rows))
    attachment = attach(base, adapter)
    every = TokenMap(torch.full_like(ids, TEXT), torch.zeros(len(ids), dtype=torch.int64))
    with attachment.bind(every):
        close(logits(base, case), case.tensors["out.surgery"], 2e-5)  # the file holds the probe in float32, and the norms are in float32
    attachment.detach()
    assert torch.equal(logits(base, case), before)
    domain = torch.full_like(ids, TEXT)
    domain[:, -2:] = ANSWER
    attachment = attach(base, on(base, steered(base, v, surgery["alpha"], rows, {"answer": ("answer",)})))
    with attachment.bind(TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))):
        found = logits(base, case)
    attachment.detach()
    assert torch.equal(found[:, :-2], before[:, :-2])
    assert not torch.allclose(found[:, -2:], before[:, -2:], atol=1e-6)


def on(model: nn.Module, made: Any) -> Adapter:
    adapter = Adapter({"lora": made.method}, Anatomy.read(model)).double()
    assert adapter.tensors().keys() == made.tensors.keys()
    adapter.load_state_dict(dict(made.tensors))
    return adapter


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_every_family_can_be_split_cut_and_steered(family: str) -> None:
    base = tiny(family)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(base)
    slim_linears(model, 1.0)
    assert fingerprint(model) != fingerprint(base)
    assert model(input_ids=ids).logits.isfinite().all()
    names = {f"{linear.name}" for linear in Anatomy.read(base).linears}
    assert {linear.name for linear in Anatomy.read(model).linears} == names  # so that LoRA finds them
    model = copy.deepcopy(base)
    left = slice_units(model, [0.5])
    set_units(model, left)
    other = type(model)(model.config).double()
    other.load_state_dict(model.state_dict())  # strict: the config fits
    torch.testing.assert_close(other.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    v = torch.randn(Anatomy.read(base).layer_width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = closest_rows(base, v, 5, layers=(1,))
    assert {layer for layer, _ in rows} == {1}
    before = base(input_ids=ids).logits
    attachment = attach(base, on(base, steered(base, v, 1.0, rows)))
    with attachment.bind(TokenMap(torch.full_like(ids, TEXT), torch.zeros(2, dtype=torch.int64))):
        found = base(input_ids=ids).logits
    attachment.detach()
    assert torch.equal(base(input_ids=ids).logits, before)
    with torch.no_grad():  # as published: the weights themselves
        for layer, row in rows:
            weight = base.get_submodule(units_of(base)[layer].opening[0]).weight
            (weight.T if family == "gpt2" else weight)[row] += v
    torch.testing.assert_close(found, base(input_ids=ids).logits, rtol=0, atol=EXACT[family] * 10)
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_steered_model_moves_the_probe_monotonically() -> None:
    base = tiny("llama")
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v = v / v.norm()
    found = []
    unit = units_of(base)[0]
    gate = base.get_submodule(unit.opening[0])
    read: list[Tensor] = []
    gate.register_forward_hook(lambda module, args, out: read.append(args[0]))
    base(input_ids=ids)
    for alpha in (-2.0, -1.0, 0.0, 1.0, 2.0):
        rows = closest_rows(base, v, 1, layers=(0,))
        attachment = attach(base, on(base, steered(base, v, alpha, rows)))
        outs: list[Tensor] = []
        handle = gate.register_forward_hook(lambda module, args, out, to=outs: to.append(out))
        with attachment.bind(TokenMap(torch.full_like(ids, TEXT), torch.zeros(4, dtype=torch.int64))):
            base(input_ids=ids)
        handle.remove()
        attachment.detach()
        found.append(float((outs[0][..., rows[0][1]] * (read[0] @ v).sign()).detach().mean()))
    assert found == sorted(found)


def test_a_probe_tells_two_kinds_of_states_apart_or_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    states, direction = torch.randn(2000, 16, generator=generator), torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    v, right = fitted_probe(states[:1000] - direction, states[1000:] + direction)
    assert right > 0.8
    assert float(torch.nn.functional.cosine_similarity(v, direction.double(), dim=0)) > 0.9
    with pytest.raises(ConfigError, match=r"^the probe tells \d+ % of the held-out texts apart, and 60 % is the least"):
        fitted_probe(states[:100], states[100:200])
    with pytest.raises(ConfigError, match=r"^a probe has 9 and 100 texts: give ten or more of each kind$"):
        fitted_probe(states[:9], states[100:200])


def test_what_cannot_be_changed_is_refused_in_a_sentence() -> None:
    base = tiny("llama")
    with pytest.raises(ConfigError, match=r"^the ratio is 0.5: give 1 or more"):
        slim_linears(base, 0.5)
    with pytest.raises(ConfigError, match=r"^a ratio of 40 leaves layers.0.self_attn.q_proj \(32 x 32\) a rank of 0: give a smaller ratio$"):
        slim_linears(base, 40)
    with pytest.raises(ConfigError, match=r"^3 shares were given, and the model has 2 layers: give one for all, or one for each$"):
        slice_units(base, [1, 1, 1])
    with pytest.raises(ConfigError, match=r"^a share is 1.5: give more than 0 and at most 1$"):
        slice_units(base, [1.5])
    with pytest.raises(ConfigError, match=r"^intermediate_size of llama is one number for all layers, and these slices have 48, 24 units"):
        set_units(base, (48, 24))
    v = torch.ones(8)
    with pytest.raises(ConfigError, match=r"^the probe has 8 numbers, and the gates of this model read 32: fit it on this model$"):
        closest_rows(base, v, 2)
    with pytest.raises(ConfigError, match=r"^200 rows were asked for, and these layers have 96: give 1 or more, and at most as many$"):
        closest_rows(base, torch.ones(32), 200)
    with pytest.raises(ConfigError, match=r"^layer 7 is outside the model, which has 2: give numbers of 0 to 1$"):
        closest_rows(base, torch.ones(32), 2, layers=(7,))
    slim_linears(base, 2)
    with pytest.raises(ConfigError, match=r"^this base is slim already: give the base that it was made of, and a larger ratio$"):
        slim_linears(base, 2)
    assert rank_of(32, 32, 2) == 8
