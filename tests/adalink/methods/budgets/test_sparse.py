"""Dynamic Subset Tuning: the reference computation, how many weights differ, what is found, what a folder has, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, two_texts
from fixture_file import FixtureFile
from safetensors.torch import load_file, save_file
from shared import fixtures
from tiny import excite, rows, run, tiny, token_map
from torch import Tensor, nn
from train_case import SETTINGS, Stop, stop_at, weights

from adalink import AdaLoRA, AdaptedModel, Adapter, Anatomy, Bridge, LoRA, Sparse, SparseDelta
from adalink.checkpoint.compressed import COMPRESSED_FILE
from adalink.checkpoint.folder import WEIGHTS_FILE, read_config
from adalink.checkpoint.start import Start
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.compress import decompress
from adalink.methods.budgets.schedule import Schedule
from adalink.methods.budgets.sparse import Subset, farthest
from multimodal.model import VisionLanguageModel
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

FILES = sorted(fixtures("dst").glob("*.safetensors"))


class Weights(nn.Module):
    """Tensors to be trained, each a silo of its own."""

    def __init__(self, start: list[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(start):
            self.register_parameter(f"w{i}", nn.Parameter(tensor.clone()))

    def subset(self, fraction: float, **settings: Any) -> Subset:
        return Subset(self, [[name] for name, _ in self.named_parameters()], fraction, **settings)


def optimizer_of(spec: Any, module: nn.Module) -> torch.optim.Optimizer:
    if spec["kind"] == "Adam":
        return torch.optim.Adam(module.parameters(), lr=spec["lr"], betas=tuple(spec["betas"]), eps=spec["eps"])
    return torch.optim.SGD(module.parameters(), lr=spec["lr"])


def steps_of(case: FixtureFile, n_steps: int, **settings: Any) -> Any:
    """The losses before each step, the sets after it, and the weights at the end."""
    spec, tensors = case.spec, case.tensors
    module = Weights([tensors[f"seed.{i}"].double() for i in range(len(spec["silos"]))])
    subset, optimizer = module.subset(spec["fraction"], **settings), optimizer_of(spec["optimizer"], module)
    losses, sets = [], []
    for step in range(n_steps):
        kind = "early" if step < spec["late_from_step"] else "late"
        loss = sum((tensors[f"curvature.{i}"] * (w - tensors[f"{kind}.{i}"]).square()).sum() for i, w in enumerate(module.parameters()))
        losses.append(loss.detach())  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        subset.after_step(step)
        sets.append(torch.cat([(w != tensors[f"seed.{i}"].double()).flatten() for i, w in enumerate(module.parameters())]))
    return torch.stack(losses), torch.stack(sets), module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_training_equals_the_reference_step_by_step(path: Path) -> None:
    case = FixtureFile.read(path)
    losses, sets, module = steps_of(case, case.spec["steps"])
    torch.testing.assert_close(losses, case.tensors["out.losses"], rtol=1e-12, atol=1e-12)
    assert torch.equal(sets.to(torch.uint8), case.tensors["out.changed"])
    for i, weight in enumerate(module.parameters()):
        torch.testing.assert_close(weight.detach(), case.tensors[f"end.{i}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_static_subset_ends_higher_when_the_target_moves(path: Path) -> None:
    case = FixtureFile.read(path)
    dynamic, static = (steps_of(case, 4 * case.spec["steps"], dynamic=dynamic) for dynamic in (True, False))
    assert dynamic[0][-1] < static[0][-1] / 3
    assert all(torch.equal(static[1][0] | one, static[1][0]) for one in static[1])  # no other weight moves


def test_a_planted_support_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(400, generator=generator)
    is_planted = torch.randperm(400, generator=generator) < 120
    signs = torch.randint(0, 2, (400,), generator=generator) * 2 - 1
    sizes = torch.where(is_planted, 1 + torch.rand(400, generator=generator), 0.05)
    module = Weights([start])
    subset, optimizer = module.subset(0.3), torch.optim.Adam(module.parameters(), lr=0.05)
    first = None
    for step in range(400):
        optimizer.zero_grad()
        loss: Any = (module.get_parameter("w0") - start - signs * sizes).square().sum()
        loss.backward()
        optimizer.step()
        subset.after_step(step)
        now = module.get_parameter("w0").detach() != start
        first = now if first is None else first
    assert int(now.sum()) == 120
    assert int((now & is_planted).sum()) >= 0.85 * 120
    assert int((first & is_planted).sum()) < 0.5 * 120  # type: ignore[operator]  # the control: equal first steps choose at random


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exactly_k_weights_of_a_silo_differ_and_the_others_are_the_starts_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(7, 9, dtype=dtype), torch.randn(4, dtype=dtype)]
    module = Weights(start)
    subset, optimizer = module.subset(0.2), torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(6):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        subset.after_step(step)
        assert [int((weight != old).sum()) for weight, old in zip(module.parameters(), start, strict=True)] == [13, 1]


def test_all_weights_are_plain_training_bit_for_bit() -> None:
    ends = []
    for subset in (True, False):
        torch.manual_seed(0)
        module = Weights([torch.randn(5, 6), torch.randn(3)])
        schedule = module.subset(1.0) if subset else Schedule()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for step in range(5):
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            schedule.after_step(step)
        ends.append(list(module.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_of_equal_distances_the_first_stay_and_none_at_zero() -> None:
    assert farthest(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [False, True, True, False, False]
    assert farthest(torch.tensor([0.0, 3.0, 0.0]), 2).tolist() == [False, True, False]


def test_a_silo_is_a_tensor_or_all_of_a_group() -> None:
    groups = {"answer": ("answer",), "text": ("text",)}
    for silo, n_silos in (("tensor", 2 * 2 * 2), ("group", 2)):
        method = Sparse(inner=LoRA(groups=groups, rank=1, targets=("fc1",)), fraction=0.25, silo=silo)  # type: ignore[arg-type]
        subset: Any = method.schedule("sparse", adapter := Adapter({"sparse": method}, Anatomy.read(tiny("opt"))))
        assert len(subset.silos) == n_silos
        excite(adapter)
        subset.after_step(0)
        share = {round(sum(subset.weights[name].numel() for name in names) * 0.25) for names in subset.silos}
        changed = {sum(int((subset.weights[name] != subset.start[name]).sum()) for name in names) for names in subset.silos}
        assert changed == share
        assert share == ({12, 16} if silo == "tensor" else {56})


# ----------------------------------------
# In a run.

GROUPS = {"image": ("image",), "text": ("text",)}
RUNS: dict[str, Any] = {
    "sparse": Sparse(inner=LoRA(groups=GROUPS, rank=2, targets=("fc1", "q_proj")), fraction=0.1, silo="group"),
    "sparse_delta": SparseDelta(groups=GROUPS, fraction=0.02, targets=("fc1", "q_proj")),
}


def trained(folder: Path, name: str, *, resume: bool = False, measure: Any = None, **fields: Any) -> VisionLanguageModel:
    folder.mkdir(exist_ok=True, parents=True)
    model = compose("opt")
    torch.manual_seed(fields.pop("start", 5))
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), name: fields.pop("method", RUNS[name])})
    train(model, Drawn(8), two_texts, TrainSettings(**{**SETTINGS, **fields}), folder, resume=resume, measure=measure)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", name)
    with pytest.raises(Stop):
        trained(tmp_path / "parts", name, measure=stop_at(3), measure_every=1)
    resumed = weights(trained(tmp_path / "parts", name, resume=True))
    assert all(torch.equal(value, resumed[key]) for key, value in weights(whole).items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [line for line in again if "loss" in line]
    changed = {line[f"{name} changed"] for line in lines}
    assert len(changed) == 1
    assert lines[0][f"{name} moved"] == changed.pop()
    assert any(line[f"{name} moved"] for line in lines[1:])
    if name == "sparse":
        with pytest.raises(CheckpointError, match=r"cannot be continued exactly: the subset is of weights that started elsewhere: resume with the seed"):
            trained(tmp_path / "parts", name, resume=True, start=6)


# ----------------------------------------
# What a folder has of it.


def of_few(folder: Path, method: Any) -> tuple[AdaptedModel, Tensor, int]:
    """A saved adapter of which one step was taken; its logits, and how many of its weights differ from the start."""
    torch.manual_seed(4)
    model = AdaptedModel(tiny("opt"))
    adapter = model.add_adapter("one", {"few": method})
    subset: Any = method.schedule("few", adapter)
    excite(adapter)
    subset.after_step(0)
    model.save_pretrained(folder)
    model.eval().double()
    return model, logits(model), int(subset.report()["changed"])


def logits(model: AdaptedModel) -> Tensor:
    ids, domain, mask = rows()
    with torch.no_grad(), model.attachment.bind(token_map(domain)):
        return run(model.base, ids, mask)


TEXT = {"text": ("text",)}


@pytest.mark.parametrize("method", [Sparse(inner=LoRA(groups=TEXT, rank=64), fraction=0.1), SparseDelta(groups=TEXT, fraction=0.1, targets=("all",))], ids=["sparse", "delta"])
def test_a_folder_has_eight_bytes_for_each_weight_that_differs_and_loads_as_an_ordinary_adapter(method: Any, tmp_path: Path) -> None:
    model, expected, n = of_few(tmp_path / "few", method)
    path = tmp_path / "few" / COMPRESSED_FILE
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == pytest.approx(8 * n, rel=0.02)
    assert header < 4 * n
    assert not (tmp_path / "few" / WEIGHTS_FILE).exists()
    assert read_config(tmp_path / "few").methods == {"few": method.inner if isinstance(method, Sparse) else method}
    again = AdaptedModel.from_pretrained(tiny("opt"), tmp_path / "few")
    own = model.active_adapter().float().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.active_adapter().state_dict().items())
    torch.testing.assert_close(logits(again.double()), expected, rtol=0, atol=1e-12)
    decompress(tmp_path / "few", tmp_path / "whole", again)
    assert all(torch.equal(value, own[name]) for name, value in load_file(tmp_path / "whole" / WEIGHTS_FILE).items())


def test_a_folder_that_is_written_again_has_one_file_of_weights(tmp_path: Path) -> None:
    model, *_ = of_few(tmp_path, Sparse(inner=LoRA(groups=TEXT, rank=4), fraction=0.1))
    model.add_adapter("plain", LoRA(groups=TEXT, rank=4))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_FILE).exists()
    assert not (tmp_path / COMPRESSED_FILE).exists()


@pytest.mark.parametrize(("start", "reason"), [(None, "no seed gives it"), (Start(3, "0" * 16), "the start of the adapter cannot be drawn again")], ids=["none", "other"])
def test_weights_whose_start_is_not_known_are_written_whole(start: Start | None, reason: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = AdaptedModel(tiny("opt"))
    excite(model.add_adapter("one", {"few": Sparse(inner=LoRA(groups=TEXT, rank=4), fraction=0.1)}))
    model.start = start
    with pytest.warns(UserWarning, match=f"^the adapter is saved whole, since its start is not known: {reason}"):
        model.save_pretrained(tmp_path)
    again = AdaptedModel.from_pretrained(tiny("opt"), tmp_path)
    own = model.active_adapter().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.active_adapter().state_dict().items())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    of_few(tmp_path, SparseDelta(groups=TEXT, fraction=0.1, targets=("fc1",)))
    path = tmp_path / COMPRESSED_FILE
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata, stored = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "few.text.0.fc1.delta"
    for changes, message in (
        ({f"{name}.index": stored[f"{name}.index"].flip(0)}, "places out of order, or after the last of 3,072 entries"),
        ({f"{name}.index": stored[f"{name}.index"] + 3072}, "places out of order"),
        ({f"{name}.value": stored[f"{name}.value"] + 1}, "is damaged: its weights have the digest"),
        ({"other.value": torch.zeros(1)}, "other.value is of no tensor that the metadata list"),
    ):
        save_file({**stored, **changes}, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            AdaptedModel.from_pretrained(tiny("opt"), tmp_path)


# ----------------------------------------
# What is refused.


def test_wrong_settings_are_refused() -> None:
    lora = LoRA(rank=2)
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"^Sparse's fraction is {wrong}: give the share of the weights that may differ from their start, above 0 and up to 1$"):
            Sparse(inner=lora, fraction=wrong)
        with pytest.raises(ConfigError, match=f"^SparseDelta's fraction is {wrong}"):
            SparseDelta(fraction=wrong)
    with pytest.raises(ConfigError, match=r"^Sparse's silo is 'layer': give tensor or group$"):
        Sparse(inner=lora, fraction=0.5, silo="layer")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Sparse wraps a method, got 3: give for instance LoRA\(rank=8\)$"):
        Sparse(inner=3, fraction=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Sparse wraps a method without a budget of its own, and AdaLoRA has one"):
        Sparse(inner=AdaLoRA(), fraction=0.5)
    with pytest.raises(ConfigError, match=r"^SparseDelta on 12 linears for 1 groups trains in 0\.00 GiB, and memory_gib is 0\.0001: name fewer targets"):
        SparseDelta(fraction=0.5, targets=("all",), memory_gib=1e-4).place(Anatomy.read(tiny("opt")))


def test_silos_of_less_than_a_weight_are_counted_and_parameters_that_are_swapped_are_refused() -> None:
    module = Weights([torch.randn(40, 3), torch.randn(5)])
    subset = module.subset(0.1)
    with pytest.warns(UserWarning, match=r"^1 of 2 silos have fewer than 1 / 0\.1 weights, such as w1: one weight of each may differ$"):
        subset.begin(3, 0)
    module.w0 = nn.Parameter(torch.randn(40, 3))
    with pytest.raises(ConfigError, match=r"^the optimizer has put another parameter in the place of w0, and a subset needs one that changes weights in place$"):
        subset.after_step(0)
