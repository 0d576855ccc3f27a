"""UniPELT against the authors' code and AdapterHub's: every file of fixtures/unipelt, in float64, to 1e-10."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import unipelt_made
from double import arithmetic
from fixture_file import refuse_unchecked
from shared import fixtures, fixtures_root
from torch import Tensor
from unipelt_case import Case, read, role

from adalink import attach
from adalink.methods.bottleneck import Adapted
from adalink.methods.unipelt import Gate

FOLDER = fixtures_root() / "unipelt"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}
COMPARISONS = sorted(path for path in FOLDER.glob("*.json") if path.stem not in FILES)
EXACT = 1e-10


@cache
def stored(name: str) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    return read(FILES[name]) if name in FILES else unipelt_made.made(**unipelt_made.SETTINGS[name])


@pytest.mark.parametrize("name", [*FILES, *unipelt_made.SETTINGS])
def test_outputs_gates_attention_loss_and_every_gradient_equal_the_published_code(name: str) -> None:
    file = stored(name)
    with arithmetic(lambda: difference(*file))():
        check(Case(*file))


@pytest.mark.parametrize("key", ["adapter_out.layer1", "adapter_residual.layer1", "out.other"])
def test_each_of_these_is_compared(key: str) -> None:
    """The control: another number is seen, and an output that nobody compares is refused unless the file says what it is for."""
    names = [name for name in FILES if key in stored(name)[1]] or list(FILES)[:1] * (key == "out.other")
    for spec, tensors in map(stored, names):
        changed = {**tensors, key: tensors[key] + 1e-6 if key in tensors else torch.ones(2, 3)}
        with pytest.raises(AssertionError, match=r"not close|does not check: other"):
            check(Case(spec, changed))
        if key == "out.other":
            check(Case({**spec, "keys": {**spec["keys"], "out.other": "For information: of a model without it"}}, changed))


def test_the_authors_files_are_found() -> None:
    """Skips, saying so, where they are absent; the cases that are made here run everywhere."""
    assert sorted(fixtures("unipelt").glob("*.safetensors")) == list(FILES.values()) != []


def difference(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Of the last states, from those of the file."""
    case = Case(spec, tensors)
    with attach(case.model, case.adapter).bind(case.token_map()):
        states = case.model(**case.inputs(), use_cache=False, output_hidden_states=True).hidden_states
    return states[-1][:, case.n_slots :] - case.tensors["out.last_hidden_state"]


def check(case: Case) -> None:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in case.adapter.named_modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out[:, 0]))
        if isinstance(module, Adapted):
            module.register_forward_hook(lambda m, args, out, name=name: seen[f"{name}:in"].append(args[2]))
    attachment = attach(case.model, case.adapter)
    residual, change = watched_adapters(case)
    biases = {name: case.model.get_parameter(name).requires_grad_() for name in case.under("grad_bias.")}
    with attachment.bind(case.token_map()):
        output = case.model(**case.inputs(), output_hidden_states=True, output_attentions=True, use_cache=False)
    n, expected = case.n_slots, case.under("out.")
    last = output.hidden_states[-1][:, n:]
    loss = (last * case.tensors["in.loss_weight"]).sum()
    loss.backward()
    checked = {"last_hidden_state": last, "loss": loss[None]}
    checked |= {"logits": output.logits[:, n:]} if "logits" in output else {}
    checked |= {f"hidden_states.{i}": h[:, n:] for i, h in enumerate(output.hidden_states)}
    checked |= {f"attentions.{i}": a[:, :, n:] for i, a in enumerate(output.attentions)}
    refuse_unchecked(expected, checked, case.spec)
    for name in expected.keys() & checked.keys():
        close(checked[name], expected[name].reshape(checked[name].shape) if name == "loss" else expected[name])
    for name, value in case.under("grad_bias.").items():
        close(biases[name].grad, value)
    gradients = case.under("grad.")
    assert {own for name, value in gradients.items() for own in case.own(name, value)} == set(dict(case.adapter.named_parameters()))
    for name, value in gradients.items():
        close(case.gradient(name, value), value)
    check_gates(case, seen)
    for i in range(len(case.anatomy.layers)):
        if f"adapter_in.layer{i}" in case.tensors:
            found = next(values[0] for name, values in seen.items() if name.startswith(f"adapter.{i}") and name.endswith(":in"))
            close(found[:, n:], case.tensors[f"adapter_in.layer{i}"])
        if f"adapter_residual.layer{i}" in case.tensors:
            close(residual[i][:, n:], case.tensors[f"adapter_residual.layer{i}"])
        if f"adapter_out.layer{i}" in case.tensors:
            close((residual[i] + change[i])[:, n:], case.tensors[f"adapter_out.layer{i}"])


def watched_adapters(case: Case) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By layer, filled as the model runs: what its feed-forward network gives (its last linear), and what the adapter adds, gate included."""
    residual, change = dict[int, Tensor](), dict[int, Tensor]()
    stack = case.model.get_submodule(case.anatomy.stack) if case.anatomy.stack else case.model
    for i, name in enumerate(case.anatomy.layers):
        linear = [module for module in stack.get_submodule(name).modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2][-1]
        linear.register_forward_hook(lambda m, args, out, i=i: residual.__setitem__(i, out))
    for placement in case.adapter.placements:
        if placement.role.startswith("adapter."):
            layer = int(placement.role.split(".")[1])
            placement.edit.register_forward_hook(lambda m, args, out, i=layer: change.__setitem__(i, out - args[0]))
    return residual, change


def check_gates(case: Case, seen: dict[str, list[Tensor]]) -> None:
    """Authors: gate.layer0.lora_query; AdapterHub: the module's path. Both [B, gates of the module]."""
    found: dict[str, dict[int, list[tuple[str, Tensor]]]] = {"adapter": defaultdict(list), "prefix": defaultdict(list), "lora": defaultdict(list)}
    for name, values in seen.items():
        part, kind, *rest = name.split(".")
        if kind == "gates":
            layer = int(rest[1] if part == "lora" else rest[0])
            found[part][layer].append((rest[-1], values[0]))
    stored = case.under("gate.")
    assert bool(stored) == bool(case.gated)
    for name, value in stored.items():
        if re.match(r"layer\d+\.", name):
            layer, kind = int(name.split(".")[0].removeprefix("layer")), name.split(".")[1]
        else:
            _, place = role(f"{name}.weight")
            layer, kind = int(place.split(".")[1]), f"{role(f'{name}.weight')[0]}_{place.split('.')[2]}"
        if kind == "central":
            close(torch.cat([found["lora"][layer][0][1], found["prefix"][layer][0][1]], 1), value)
            continue
        gates = found[kind.split("_")[0]][layer]
        last = kind.split("_", 1)[-1]
        chosen = [gate for end, gate in gates if len(gates) == 1 or value.shape[1] == len(gates) or end == last]
        close(torch.cat(chosen, 1), value)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_authors_names_and_adapterhubs_mean_the_same_tensors(path: Path) -> None:
    comparison = json.loads(path.read_text())
    assert comparison["max_abs_diff_last_hidden"] < EXACT
    assert comparison["max_abs_diff_pelt_grads"] < EXACT
    for official, hub in comparison["name_map"].items():
        assert role(official) == role(hub)


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=EXACT)
