"""UniPELT against the authors' code and AdapterHub's: every file of fixtures/unipelt, in float64, to 1e-10."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
from shared import fixtures
from torch import Tensor
from unipelt_case import Case, role

from adalink import attach
from adalink.methods.bottleneck import Adapted
from adalink.methods.gated import Gate

FOLDER = fixtures("unipelt")
FILES = sorted(FOLDER.glob("*.safetensors"))
COMPARISONS = sorted(path for path in FOLDER.glob("*.json") if not path.with_suffix(".safetensors").exists())
EXACT = 1e-10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_outputs_gates_attention_loss_and_every_gradient_equal_the_published_code(path: object) -> None:
    case = Case(path)  # type: ignore[arg-type]
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in case.adapter.named_modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out[:, 0]))
        if isinstance(module, Adapted):
            module.register_forward_hook(lambda m, args, out, name=name: seen[f"{name}:in"].append(args[2]))
    attachment = attach(case.model, case.adapter)
    biases = {name: case.model.get_parameter(name).requires_grad_() for name in case.under("grad_bias.")}
    with attachment.bind(case.token_map()):
        output = case.model(**case.inputs(), output_hidden_states=True, output_attentions=True, use_cache=False)
    n, expected = case.n_slots, case.under("out.")
    last = output.last_hidden_state[:, n:]
    loss = (last * case.tensors["in.loss_weight"]).sum()
    loss.backward()
    checked = {"last_hidden_state": last, "loss": loss[None]}
    checked |= {f"hidden_states.{i}": h[:, n:] for i, h in enumerate(output.hidden_states)}
    checked |= {f"attentions.{i}": a[:, :, n:] for i, a in enumerate(output.attentions)}
    assert set(expected) <= set(checked), f"outputs that this test does not check: {set(expected) - set(checked)}"
    for name, value in expected.items():
        close(checked[name], value)
    for name, value in case.under("grad_bias.").items():
        close(biases[name].grad, value)
    own = dict(case.adapter.named_parameters())
    compared = {key: value for name, stored in case.under("grad.").items() for key, value in case.own(name, stored).items()}
    assert set(compared) == set(own)
    for name, value in compared.items():
        close(own[name].grad, value)
    check_gates(case, seen)
    for i in range(len(case.anatomy.layers)):
        if f"adapter_in.layer{i}" in case.tensors:
            found = next(values[0] for name, values in seen.items() if name.startswith(f"adapter.{i}") and name.endswith(":in"))
            close(found[:, n:], case.tensors[f"adapter_in.layer{i}"])


def check_gates(case: Case, seen: dict[str, list[Tensor]]) -> None:
    """Authors: gate.layer0.lora_query; AdapterHub: the module's path. Both [B, gates of the module]."""
    found = {"adapter": defaultdict(list), "prefix": defaultdict(list), "lora": defaultdict(list)}
    for name, values in seen.items():
        part, kind, *rest = name.split(".")
        if kind == "gates":
            layer = int(rest[1] if part == "lora" else rest[0])
            found[part][layer].append((rest[-1], values[0]))
    stored = case.under("gate.")
    assert bool(stored) == bool(case.gated)
    for name, value in stored.items():
        if name.startswith("layer"):
            layer, kind = int(name.split(".")[0].removeprefix("layer")), name.split(".")[1]
        else:
            _, place = role(f"{name}.weight")
            layer, kind = int(place.split(".")[1]), f"{role(f'{name}.weight')[0]}_{place.split('.')[2]}"
        gates = found[kind.split("_")[0]][layer]
        last = kind.split("_", 1)[-1]
        chosen = [gate for end, gate in gates if len(gates) == 1 or value.shape[1] == len(gates) or end == last]
        close(torch.cat(chosen, 1), value)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_authors_names_and_adapterhubs_mean_the_same_tensors(path: object) -> None:
    comparison = json.loads(path.read_text())  # type: ignore[attr-defined]
    assert comparison["max_abs_diff_last_hidden"] < EXACT
    assert comparison["max_abs_diff_pelt_grads"] < EXACT
    for official, hub in comparison["name_map"].items():
        assert role(official) == role(hub)


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=EXACT)
