"""Adapters whose down projection is never trained: linear in what is, the same for every seed, and added up exactly at the size of one."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import fixtures, fixtures_root
from tiny import INPUTS, tiny
from torch import Tensor, nn

from adalink import AdaLink, AdaptedModel, LoRA, Method
from adalink.checkpoint.folder import read_config, write_adapter
from adalink.checkpoint.start import Start
from adalink.errors import CheckpointError
from adalink.lifecycle.flat import read_flat, start_of
from adalink.lifecycle.merge import MergeSettings, merge
from adalink.methods.adalink import Bottleneck

METHODS: dict[str, dict[str, Method]] = {
    "adalink": {"adalink": AdaLink(rank=3, modalities=("text",), activation="gelu", bias=True, frozen_down=True)},
    "lora": {"lora": LoRA(rank=2, alpha=3.0, frozen_down=True)},
}
FILES = sorted(path.stem for path in (fixtures_root() / "merge").glob("linearised*.json")) or ["absent"]


@cache
def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = fixtures("merge")
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def of_fixture(name: str, up: Tensor) -> Bottleneck:
    """AdaLink's edit with the fixture's start, and this up projection."""
    facts, tensors = case(name)
    edit = Bottleneck(facts["D"], facts["R"], facts["activation"], bias=False, fixed="any").double()
    edit.down.weight.copy_(tensors["init.down"])
    edit.up.weight = nn.Parameter(up.clone())
    return edit


@pytest.mark.parametrize("name", FILES)
def test_it_is_the_published_linearisation(name: str) -> None:
    tensors, ups = case(name)[1], []
    x = tensors["in.x"]
    for n in (0, 1):
        ups.append(tensors[f"adapter{n}.up"])
        edit = of_fixture(name, ups[-1])
        out = edit.up(edit.act(edit.down(x)))
        torch.testing.assert_close(out, tensors[f"out{n}.official"], rtol=0, atol=1e-12)
        assert not torch.allclose(out, tensors[f"out{n}.plain"])  # the control: what trains both factors gives
        (out * tensors[f"out{n}.cotangent"]).sum().backward()
        torch.testing.assert_close(edit.up.weight.grad, tensors[f"grad{n}.up"], rtol=0, atol=1e-10)
        assert not tensors[f"grad{n}.down"].any()
        assert [key for key, _ in edit.named_parameters()] == ["up.weight"]  # down has no gradient, ours nor theirs
    both = of_fixture(name, 0.7 * ups[0] + 0.3 * ups[1])
    torch.testing.assert_close(both.up(both.act(both.down(x))), tensors["out.sum"], rtol=0, atol=1e-12)


def test_the_output_is_affine_in_what_is_trained() -> None:
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def bend(edit: Bottleneck) -> float:
        outputs = []
        for step in range(3):
            outputs.append(edit(h, None, h).detach())  # type: ignore[arg-type]  # the edit reads no tokens
            with torch.no_grad():
                for seed, parameter in enumerate(edit.parameters()):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
            del step
        return float((outputs[2] - 2 * outputs[1] + outputs[0]).abs().max())

    assert bend(Bottleneck(8, 3, "gelu", bias=True, fixed="any").double()) < 1e-12
    assert bend(Bottleneck(8, 3, "gelu", bias=True).double()) > 0.1  # the control


def save(folder: Path, methods: dict[str, Method], family: str, seed: int) -> AdaptedModel:
    """A folder in float64 of an adapter of this seed whose trained weights were moved."""
    model = AdaptedModel(tiny(family), inputs=INPUTS)
    torch.manual_seed(seed)
    adapter = model.add_adapter("one", methods)
    generator, trained = torch.Generator().manual_seed(seed), dict(adapter.named_parameters())
    moved = {name: value.double() + (torch.randn(value.shape, generator=generator).double() if name in trained else 0) for name, value in adapter.tensors().items()}
    write_adapter(folder, moved, model._config_of("one"))
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "t5"])
@pytest.mark.parametrize("kind", METHODS)
def test_task_arithmetic_is_the_stack_at_the_size_of_one(kind: str, family: str, tmp_path: Path) -> None:
    """Whatever the seeds: what is drawn does not depend on them."""
    for seed in (1, 2):
        model = save(tmp_path / str(seed), METHODS[kind], family, seed)
    folders = [tmp_path / "1", tmp_path / "2"]
    found = {
        method: merge(folders, MergeSettings(method=method, weights=(0.7, 0.4)), start=lambda folder: start_of(folder, model))  # type: ignore[arg-type]
        for method in ("arithmetic", "stack")
    }
    plain, grown = found["arithmetic"].tensors, found["stack"].tensors
    for name in plain:
        if not name.endswith(".up.weight"):
            continue
        root = name.removesuffix(".up.weight")
        rank = len(plain[f"{root}.down.weight"])
        middle = torch.randn(4, plain[f"{root}.down.weight"].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scale = 3.0 / 2 if kind == "lora" else 1.0  # the stacked LoRA has its scale in up
        outputs = [scale * through(plain, root, middle), through(grown, root, middle)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
        assert len(grown[f"{root}.down.weight"]) == 2 * rank
    nothing = merge([folders[0]] * 2, MergeSettings(method="arithmetic", weights=(1.0, -1.0)), start=lambda folder: start_of(folder, model)).tensors
    assert all(not value.abs().gt(1e-12).any() for name, value in nothing.items() if ".up." in name)  # the frozen model


def through(tensors: Any, root: str, x: Tensor) -> Tensor:
    """The change of a pair of projections, with GELU and biases where there are some."""
    middle = x @ tensors[f"{root}.down.weight"].T
    if f"{root}.down.bias" in tensors:
        return nn.functional.gelu(middle + tensors[f"{root}.down.bias"]) @ tensors[f"{root}.up.weight"].T + tensors[f"{root}.up.bias"]
    return middle @ tensors[f"{root}.up.weight"].T


def test_the_fixed_half_is_in_the_folder_and_in_no_count(tmp_path: Path) -> None:
    model = save(tmp_path / "one", METHODS["adalink"], "opt", 1)
    other = save(tmp_path / "two", METHODS["adalink"], "opt", 2)
    adapter = model.active_adapter()
    assert adapter.n_parameters() == {"adalink": 32 * 3 + 32}
    assert "trained: 128 ||" in model.trainable_summary()
    assert torch.equal(adapter.tensors()["adalink.text.down.weight"], other.active_adapter().tensors()["adalink.text.down.weight"])
    assert adapter.tensors()["adalink.text.down.weight"].std() == pytest.approx(0.02, rel=0.2)
    configs = [read_config(tmp_path / name) for name in ("one", "two")]
    assert configs[0].start is not None
    assert configs[0].start != configs[1].start
    assert configs[0].start.digest == configs[1].start.digest  # type: ignore[union-attr]
    flat = read_flat(tmp_path / "one")
    changed = {**flat.tensors(), "adalink.text.down.weight": flat.tensors()["adalink.text.down.weight"] + 1}
    write_adapter(tmp_path / "two", changed, dataclasses.replace(configs[1], start=Start(2, "0" * 16)))
    with pytest.raises(CheckpointError, match=r"the frozen halves differ \(digests \w{16} and \w{16}\): their sums are not exact; use --method stack"):
        merge([tmp_path / "one", tmp_path / "two"], MergeSettings(method="average"))
