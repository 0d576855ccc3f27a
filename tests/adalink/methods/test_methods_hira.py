"""HiRA: what peft computes, what it starts as, what it stores, what it learns that LoRA cannot, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from double import InDouble
from fixture_file import FixtureFile
from hosts import host
from shared import fixtures
from tiny import excite, rows, run, tiny, token_map
from torch import Tensor, nn

from adalink import ANSWER, IMAGE, TEXT, Adapter, Anatomy, HiRA, LoRA, TokenMap, attach
from adalink.errors import AttachError, ConfigError

FILES = sorted(fixtures("hira").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_equals_peft(path: Path) -> None:
    case = FixtureFile.read(path)
    with InDouble():
        model: Any = host({"model_type": case.spec["family"], **case.spec["config"]}, case.under("w."))
        anatomy = Anatomy.read(model)
        adapter = Adapter({"hira": HiRA(rank=case.spec["rank"], targets=tuple(case.spec["targets"]))}, anatomy).double()
        attachment = attach(model, adapter)
        given: dict[str, Any] = {f"{anatomy.stack}.{placed.port.module}": placed.edit for placed in adapter.placements}
        with torch.no_grad():
            for name, edit in given.items():
                edit.down.weight.copy_(case.tensors[f"hira.{name}.A"])
                edit.up.weight.copy_(case.tensors[f"hira.{name}.B"])
        ids, mask, labels = (case.tensors[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels"))
        with attachment.bind(TokenMap(torch.full_like(ids, TEXT), torch.zeros(len(ids), dtype=torch.int64))):
            output: Any = model(input_ids=ids, attention_mask=mask)
        loss: Any = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
    real = mask.bool()
    close(output.logits[real], case.tensors["out.logits"][real])
    close(loss, case.tensors["out.loss"])
    for name, edit in given.items():
        close(edit.down.weight.grad, case.tensors[f"grad.{name}.A"])
        close(edit.up.weight.grad, case.tensors[f"grad.{name}.B"])
    for name, merged in case.under("merged.").items():
        edit = given[name.removesuffix(".weight")]
        whole = edit.weight(torch.float64) * (1 + edit.up.weight @ edit.down.weight)
        close(whole if merged.shape == whole.shape else whole.T, merged)
    attachment.detach()
    with torch.no_grad(), InDouble():
        close(model(input_ids=ids, attention_mask=mask).logits[real], case.tensors["frozen.logits"][real])


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_part_of_a_fused_linear_reads_its_own_rows_of_the_weight_and_zeros_stay() -> None:
    model = tiny("gpt2")
    anatomy = Anatomy.read(model)
    adapter = Adapter({"hira": HiRA(rank=2, targets=("value",))}, anatomy).double()
    frozen: Any = model.get_submodule(f"{anatomy.stack}.h.0.attn.c_attn")
    frozen.weight.data[:, 70] = 0  # a row of W, which is the 7th of the values
    attach(model, adapter)
    excite(adapter)
    edit: Any = adapter.placements[0].edit
    x, h = torch.randn(1, 3, 32).double(), torch.randn(1, 3, 96).double()
    change = edit(h, None, x) - h
    product = frozen.weight.T[64:] * (edit.up.weight @ edit.down.weight)
    torch.testing.assert_close(change, nn.functional.pad(x @ product.T, (64, 0)))
    assert change[..., 70].abs().max() == 0
    assert change[..., 71].abs().min() > 0


def stored(length: int) -> tuple[int, int]:
    """Bytes that a backward pass stores for one edit and its input, with the weight's and without."""
    model = tiny("llama")
    adapter = Adapter({"hira": HiRA(rank=2, targets=("down_proj",), exclude_layers=(0,))}, Anatomy.read(model)).double()
    attach(model, adapter)
    edit: Any = adapter.placements[0].edit
    x = torch.randn(1, length, 48, dtype=torch.float64, requires_grad=True)
    found: dict[int, int] = {}

    def noted(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        edit(torch.zeros(1, length, 32).double(), None, x)
    return sum(found.values()), x.nbytes


def test_the_product_with_the_weight_is_not_stored() -> None:
    (few, few_inputs), (many, many_inputs) = stored(8), stored(512)
    assert many - few == many_inputs - few_inputs
    assert few - few_inputs < 48 * 32 * 8  # less than W has: A and B


def test_the_frozen_weight_is_in_no_state_dict_and_keeps_its_bytes() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = Adapter({"hira": HiRA(rank=2)}, Anatomy.read(model)).double()
    attachment = attach(model, adapter)
    ids, domain, mask = rows()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with attachment.bind(token_map(domain)):
        loss: Any = run(model, ids, mask).square().mean()
        loss.backward()
    optimizer.step()
    assert all(name.endswith(("down.weight", "up.weight")) for name in adapter.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def error_after_learning(method: Any, planted: Tensor, linear: nn.Linear, anatomy: Anatomy, model: nn.Module) -> float:
    """What is left of the start's error after a linear with one edit learnt another linear, on random inputs."""
    torch.manual_seed(0)
    adapter = Adapter({"one": method}, anatomy).double()
    attach(model, adapter).detach()
    edit: Any = adapter.placements[0].edit
    x = torch.randn(256, 1, linear.in_features).double()
    wanted, plain = x @ planted.T, x @ linear.weight.T
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss: Any = (edit(plain, None, x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach() / (plain - wanted).square().mean())


def test_it_learns_in_one_rank_what_lora_of_one_rank_cannot() -> None:
    model = tiny("llama")
    anatomy = Anatomy.read(model)
    only: Any = {"targets": ("down_proj",), "exclude_layers": (1,)}
    linear: Any = model.get_submodule(f"{anatomy.stack}.layers.0.mlp.down_proj")
    torch.manual_seed(3)
    planted = linear.weight.detach() * (1 + torch.randn(32, 1).double() @ torch.randn(1, 48).double())
    assert error_after_learning(HiRA(rank=1, **only), planted, linear, anatomy, model) < 1e-3
    assert error_after_learning(LoRA(groups={"all": ("all",)}, rank=1, alpha=1, **only), planted, linear, anatomy, model) > 0.3


def test_groups_are_for_their_own_domains() -> None:
    model = tiny("llama")
    placed: Any = HiRA(rank={"image": 1, "text": 3}, groups={"image": ("image",), "text": ("text",)}, targets=("q_proj",)).place(Anatomy.read(model))
    assert [(one.role, one.domains) for one in placed if ".0." in one.role] == [("image.0.q_proj", (IMAGE,)), ("text.0.q_proj", (TEXT, ANSWER))]
    assert [len(one.edit.down.weight) for one in placed if ".0." in one.role] == [1, 3]


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match=r"HiRA's rank is 0 for the group all: give 1 or more"):
        HiRA(rank=0)
    model = tiny("llama")
    adapter = Adapter({"hira": HiRA(rank=1, targets=("q_proj",))}, Anatomy.read(model))
    with pytest.raises(AttachError, match="this adapter is attached to no model: attach it first"):
        adapter.placements[0].edit(torch.zeros(1, 1, 32), None, torch.zeros(1, 1, 32))
    linear: Any = model.get_submodule(f"{Anatomy.read(model).stack}.layers.0.self_attn.q_proj")
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match=r"the weight of layers\.0\.self_attn\.q_proj is int8, and HiRA multiplies the weight itself: .*, or use LoRA"):
        attach(model, adapter)
