"""AdaLoRA: the official traces, what it starts as, what its budget finds, what a folder has of it, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import composed
import pytest
import torch
from composed import Drawn, compose, two_texts
from double import InDouble
from fixture_file import FixtureFile
from hosts import host
from safetensors.torch import load_file
from shared import fixtures
from tiny import excite, rows, run, tiny, token_map
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_case import SETTINGS, Stop, stop_at, weights

from adalink import IMAGE, TEXT, AdaLoRA, AdaptedModel, Adapter, Anatomy, Bridge, TokenMap, attach
from adalink.checkpoint.folder import WEIGHTS_FILE, read_config
from adalink.errors import CheckpointError, ConfigError
from adalink.methods.budgets.adalora import Allocator
from adalink.methods.budgets.schedule import Schedule
from multimodal.encoders.tower import new_vision_adapter
from multimodal.model import VisionLanguageModel
from multimodal.training.distributed import opened_accelerator
from multimodal.training.prepare import Schedules
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

FILES = sorted(fixtures("adalora").glob("*.safetensors"))
DOMAINS = {"all": ("all",), "image": ("image",), "text": ("text",)}


def method_of(spec: Any) -> AdaLoRA:
    schedule = spec["schedule"]
    return AdaLoRA(
        groups={group: DOMAINS[group] for group in spec["groups"]}, init_rank=spec["init_rank"], target_rank=spec["target_rank"], alpha=spec["alpha"],
        tinit=schedule["tinit"], tfinal=schedule["tfinal"], total=schedule["total"], interval=schedule["interval"], beta1=schedule["beta1"],
        beta2=schedule["beta2"], orthogonality=spec["orthogonality"], targets=tuple(spec["targets"]),
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_training_equals_the_official_one_step_by_step(path: Path) -> None:
    case = FixtureFile.read(path)
    spec = case.spec
    with InDouble():
        model: Any = host({"model_type": "opt", **spec["config"]}, case.under("w."))
        adapter = Adapter({"adalora": method_of(spec)}, Anatomy.read(model)).double()
        attachment = attach(model, adapter)
        allocator: Any = method_of(spec).schedule("adalora", adapter)
        edits = [allocator.edits[site] for site in spec["order_of_sites"]]
        with torch.no_grad():
            for site, edit in zip(spec["order_of_sites"], edits, strict=True):
                for name, parameter in (("A", edit.down.weight), ("E", edit.value), ("B", edit.up.weight)):
                    parameter.copy_(case.tensors[f"start.{site}.{name}"].view(parameter.shape))
        allocator.begin(spec["steps"], 0)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=spec["optimizer"]["lr"])
        for step in range(spec["steps"]):
            task, logits = loss_of(model, attachment, case.tensors, step)
            whole = task + allocator.loss(step)
            torch.testing.assert_close(torch.stack([task, whole]), case.tensors["out.losses"][step], rtol=0, atol=1e-10)
            optimizer.zero_grad()
            whole.backward()
            optimizer.step()
            allocator.after_step(step)
            assert allocator.budget(step, len(edits)) == case.tensors["out.budget"][step]
            values = torch.stack([edit.value for edit in edits])
            torch.testing.assert_close(values, case.tensors["out.E"][step], rtol=0, atol=1e-10)
            if not (threshold := case.tensors["out.threshold"][step]).isnan():
                torch.testing.assert_close(threshold_of(allocator, step), threshold, rtol=1e-8, atol=0)
            assert torch.equal((values != 0).to(torch.uint8), case.tensors["out.kept"][step])
        logits = loss_of(model, attachment, case.tensors, 0)[1]
    torch.testing.assert_close(logits, case.tensors["out.last_logits"], rtol=0, atol=1e-10)
    for site, edit in zip(spec["order_of_sites"], edits, strict=True):
        for name, parameter in (("A", edit.down.weight), ("E", edit.value), ("B", edit.up.weight)):
            torch.testing.assert_close(parameter, case.tensors[f"end.{site}.{name}"].view(parameter.shape), rtol=0, atol=1e-10)


def loss_of(model: Any, attachment: Any, tensors: Any, step: int) -> tuple[Tensor, Tensor]:
    ids, domain = tensors["in.ids"][step % len(tensors["in.ids"])], tensors["in.domain"]
    with attachment.bind(TokenMap(torch.where(domain == 1, IMAGE, TEXT), torch.zeros(len(ids), dtype=torch.int64))):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def threshold_of(allocator: Allocator, step: int) -> Tensor:
    every = torch.cat(allocator.scores(allocator.pools[0]))
    return every.kthvalue(len(every) - allocator.budget(step, len(allocator.edits))).values


# ----------------------------------------
# What the budget finds: two places of eight are to learn a change of rank 2, and all else is noise.

CONTEXTS = {"image": ("image",), "text": ("text",)}
PLANTED = ("image.2.fc1", "text.0.fc1")


class Planted:
    """Edits of one linear in each of four layers, for two domains, that learn a planted change from inputs which are large where it is planted."""

    def __init__(self, seed: int, steps: int, **settings: Any) -> None:
        model = tiny("opt", n_layers=4)
        self.method = AdaLoRA(groups=CONTEXTS, init_rank=4, target_rank=1, alpha=4, targets=("fc1",), **{"orthogonality": 0, "interval": 1, **settings})
        torch.manual_seed(seed)
        self.adapter = Adapter({"adalora": self.method}, Anatomy.read(model)).double()
        self.allocator: Any = self.method.schedule("adalora", self.adapter)
        self.allocator.begin(steps, 0)
        self.steps, self.generator = steps, torch.Generator().manual_seed(seed)
        self.sets: list[Tensor] = []
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=2e-2, weight_decay=0)
        self.truth = {role: (self.drawn(64, 2) @ self.drawn(2, 48) / 48**0.5 if role in PLANTED else torch.zeros(64, 48).double()) for role in self.edits}

    @property
    def edits(self) -> Any:
        return self.allocator.edits

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def loss(self, noise: float) -> Any:
        losses = []
        for role, edit in self.edits.items():
            x, h = self.drawn(32, 1, 48), torch.zeros(32, 1, 64).double()
            wanted = x @ self.truth[role].T + noise * self.drawn(32, 1, 64)
            losses.append((edit(h, None, x * (30 if role in PLANTED else 1)) - wanted).square().mean())
        return torch.stack(losses).sum()

    def train(self, first: int = 0, last: int | None = None, *, by_size: bool = False) -> Planted:
        for step in range(first, self.steps if last is None else last):
            self.optimizer.zero_grad()
            self.loss(0.1).backward()
            self.optimizer.step()
            if by_size:  # |p g| is then |p|
                for parameter in self.adapter.parameters():
                    parameter.grad = parameter.detach().sign()
            self.allocator.after_step(step)
            self.sets.append(torch.stack([edit.value.detach() != 0 for edit in self.edits.values()]))
        return self

    def ranks(self) -> dict[str, int]:
        return {role: int((edit.value != 0).sum()) for role, edit in self.edits.items()}


@pytest.mark.parametrize(("steps", "seed"), [(100, 0), *(pytest.param(300, seed, marks=pytest.mark.slow) for seed in range(3))])
def test_the_budget_goes_to_where_the_change_is_planted_and_by_size_alone_it_does_not(steps: int, seed: int) -> None:
    found = Planted(seed, steps).train()
    assert {role: n for role, n in found.ranks().items() if n} == dict.fromkeys(PLANTED, 4)
    assert float(found.loss(0.0).detach()) < 0.01
    by_size = Planted(seed, steps).train(by_size=True).ranks()
    assert sum(by_size[role] for role in PLANTED) < 8  # the control


def test_no_more_than_the_budget_stays_after_a_choice_and_the_last_phase_changes_nothing() -> None:
    found = Planted(0, 60, interval=5, tinit=6, tfinal=20).train()
    counts = [int(one.sum()) for one in found.sets]
    budgets = [found.allocator.budget(step, 8) for step in range(60)]
    assert budgets[:7] == [32] * 7
    assert budgets[40:] == [8] * 20
    assert all(counts[step] <= budgets[step] for step in range(10, 40, 5))
    assert counts[14] > budgets[14]  # between two choices what was left out learns again
    assert all(torch.equal(one, found.sets[41]) for one in found.sets[42:])
    assert counts[-1] <= 8


def test_the_last_step_ends_at_the_target_however_short_the_last_phase_is() -> None:
    for tfinal in (0, 1):
        assert int(Planted(0, 12, interval=5, tinit=0, tfinal=tfinal).train().sets[-1].sum()) == 8


def test_a_training_that_goes_on_from_its_state_retains_the_same_triplets() -> None:
    whole, first = Planted(3, 40).train(), Planted(3, 40).train(last=15)
    again = Planted(3, 40)
    again.adapter.load_state_dict(first.adapter.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.generator.set_state(first.generator.get_state())
    again.allocator.load_state({name: value.clone() for name, value in first.allocator.state().items()})
    again.train(15)
    assert all(torch.equal(one, other) for one, other in zip(again.sets, whole.sets[15:], strict=True))
    assert all(torch.equal(value, again.adapter.state_dict()[name]) for name, value in whole.adapter.state_dict().items())
    other = AdaLoRA(groups={"image": ("image",)}, init_rank=4, target_rank=1, targets=("fc1",))
    allocator = other.schedule("adalora", Adapter({"adalora": other}, Anatomy.read(tiny("opt"))))
    with pytest.raises(CheckpointError, match=r"^the state of Allocator is of other groups or targets: sensitivity\.image\.2\.fc1"):
        allocator.load_state(first.allocator.state())


def test_groups_compete_unless_each_has_a_budget_of_its_own() -> None:
    """Of the two groups one has no token in any batch: its scores are zero."""
    left = {}
    for budget in ("shared", "each_group"):
        method = AdaLoRA(groups=CONTEXTS, init_rank=3, target_rank=2, targets=("fc1",), budget=budget, interval=1, tinit=0, tfinal=1)  # type: ignore[arg-type]
        adapter = Adapter({"adalora": method}, Anatomy.read(tiny("opt"))).double()
        excite(adapter)
        allocator: Any = method.schedule("adalora", adapter)
        allocator.begin(3, 0)
        for step in range(3):
            for name, parameter in adapter.named_parameters():
                parameter.grad = torch.rand_like(parameter) if ".text." in name else None
            allocator.after_step(step)
        left[budget] = {group: sum(int((edit.value != 0).sum()) for role, edit in allocator.edits.items() if role.startswith(group)) for group in CONTEXTS}
    assert left["shared"] == {"image": 0, "text": 6}  # all eight: but of equal scores all go, as published
    assert left["each_group"] == {"image": 0, "text": 4}


def test_what_is_not_trained_or_was_saved_has_no_budget() -> None:
    method = AdaLoRA(targets=("fc1",), ranks={"all.1.fc1": 2})
    adapter = Adapter({"adalora": method}, Anatomy.read(tiny("opt")))
    assert [(one.role, len(one.edit.value)) for one in adapter.placements] == [("adalora.all.1.fc1", 2)]  # type: ignore[arg-type]
    assert type(method.schedule("adalora", adapter)) is Schedule
    frozen = Adapter({"adalora": AdaLoRA(targets=("fc1",))}, Anatomy.read(tiny("opt")))
    frozen.fix("adalora")
    assert type(AdaLoRA(targets=("fc1",)).schedule("adalora", frozen)) is Schedule


# ----------------------------------------
# In a run.

SHORT = AdaLoRA(groups=CONTEXTS, init_rank=3, target_rank=1, targets=("fc1", "q_proj"), interval=1, tinit=0, tfinal=1)


def trained(folder: Path, method: AdaLoRA = SHORT, *, resume: bool = False, measure: Any = None, **fields: Any) -> VisionLanguageModel:
    folder.mkdir(exist_ok=True, parents=True)
    model = compose("opt")
    torch.manual_seed(5)
    dtype = fields.pop("dtype", torch.float64)
    model.adapted.base.to(dtype)
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalora": method}).to(dtype)
    train(model, Drawn(8), two_texts, TrainSettings(**{**SETTINGS, **fields}), folder, resume=resume, measure=measure)
    return model


def test_a_run_that_is_stopped_while_the_budget_shrinks_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", steps=6)
    with pytest.raises(Stop):
        trained(tmp_path / "parts", steps=6, measure=stop_at(3), measure_every=1)
    resumed = weights(trained(tmp_path / "parts", steps=6, resume=True))
    assert all(torch.equal(value, resumed[name]) for name, value in weights(whole).items())
    values = [value for name, value in weights(whole).items() if name.endswith(".value")]
    assert sum(int((value != 0).sum()) for value in values) == len(values)
    with pytest.raises(CheckpointError, match=r"holds other weights than this config trains: \['adalora.image.0.fc1.down.weight'"):
        trained(tmp_path / "parts", AdaLoRA(**{**vars(SHORT), "groups": {"text": ("text",)}}), steps=6, resume=True)


def test_two_micro_batches_are_one_step_of_the_budget(tmp_path: Path) -> None:
    one, two = (weights(trained(tmp_path / str(n), batch_size=8 // n, accumulation=n)) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10)
        assert torch.equal(two[name] == 0, value == 0)
    assert any((value == 0).any() for name, value in one.items() if name.endswith(".value"))


def test_a_step_that_the_scaler_skips_is_none_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaler whose first scale is too large for float32, as one for float16 may be: the real one, which accelerate gives to fp16 on a GPU alone."""

    @contextlib.contextmanager
    def scaled(*args: Any) -> Iterator[Any]:
        with opened_accelerator(*args) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-38)
            yield accelerator

    monkeypatch.setattr("multimodal.training.train.opened_accelerator", scaled)
    trained(tmp_path, steps=3, checkpoint_every=1, keep=3, clip=0.0, dtype=torch.float32)
    first, second = (load_file(tmp_path / "checkpoints" / f"step_0000000{step}" / "state.safetensors") for step in (1, 2))
    name = "adalora.image.0.fc1.value"
    assert not first[f"weight.{name}"].any()  # the start
    scores = [key for key in first if key.startswith("schedule.adalora.sensitivity.")]
    assert scores
    assert not any(first[key].any() for key in scores)
    assert any(second[key].any() for key in scores)


def test_in_the_encoder_the_budget_is_one_of_its_own_and_is_saved_small_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "tower", lambda shared=composed.tower: copy.deepcopy(shared()))  # other tests have it without an adapter
    model = compose("opt")
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalora": SHORT})
    new_vision_adapter(model.tower, {"adalora": AdaLoRA(**{**vars(SHORT), "groups": {"image": ("image",)}, "targets": ("query", "value")})})
    settings: dict[str, Any] = {**SETTINGS, "learning_rates": {"vision": 0.05}}
    train(model, Drawn(8), two_texts, TrainSettings(**settings), tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    for folder, adapter in ((tmp_path / "adapter" / "vision", model.tower.adapter), (tmp_path / "adapter", model.adapted.active_adapter())):
        method: Any = read_config(folder).methods["adalora"]
        assert adapter is not None
        assert sum(method.ranks.values()) == sum(placement.role.startswith("adalora.") for placement in adapter.placements)


def test_fsdp2_which_splits_weights_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        model = compose("opt")
        model.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalora": SHORT})
        assert Schedules(model)
        fully_shard(model.adapted.base.model.decoder.layers[0], mesh=init_device_mesh("cpu", (1,)))  # type: ignore[union-attr, index, arg-type]
        with pytest.raises(ConfigError, match=r"^the schedule of adalora reads whole weights, and FSDP2 splits them over processes: train with DDP$"):
            Schedules(model)
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------
# What a folder has of it.


BOTH = {"answer": ("answer",), "words": ("text",)}


def adapted(**settings: Any) -> AdaptedModel:
    """Excited, with ranks 0, 1, ... of 3 left in the places, one after the other."""
    model = AdaptedModel(tiny("opt"))
    adapter = model.add_adapter("one", AdaLoRA(**{"groups": BOTH, "init_rank": 3, "target_rank": 2, "alpha": 5, **settings})).double()
    excite(adapter)
    with torch.no_grad():
        for i, placement in enumerate(adapter.placements):
            placement.edit.value[torch.tensor([2, 0, 1])[i % 3 :]] = 0  # type: ignore[operator, index]
    return model.eval()


def logits(model: AdaptedModel) -> Tensor:
    ids, domain, mask = rows()
    with torch.no_grad(), model.attachment.bind(token_map(domain)):
        return run(model.base, ids, mask)


def test_a_folder_has_the_triplets_that_are_left_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = adapted()
    adapter, expected = model.active_adapter(), logits(model)
    model.save_pretrained(tmp_path)
    edits: list[Any] = [placement.edit for placement in adapter.placements]
    n_left = sum(int((edit.value != 0).sum()) for edit in edits)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    ranks: Any = read_config(tmp_path).methods["adalora"].ranks  # type: ignore[attr-defined]
    assert sum(ranks.values()) == n_left == sum(len(value) for name, value in stored.items() if name.endswith(".value"))
    assert len(ranks) == len(stored) / 3 == 2 * len(adapter.placements) / 3  # a place of rank 0 has no tensor
    again = AdaptedModel.from_pretrained(tiny("opt"), tmp_path).double()
    assert len(again.active_adapter().placements) == len(ranks)  # and no placement
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)  # a folder loads as float32
    again.active_adapter().load_state_dict({name: value.double() for name, value in stored.items()})
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-12)
    again.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again").methods == read_config(tmp_path).methods


def test_a_linear_without_a_triplet_in_any_group_has_no_hook_and_none_at_all_is_the_frozen_model(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for placement in model.active_adapter().placements:
            placement.edit.value.zero_()  # type: ignore[operator, union-attr]
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS_FILE) == {}
    again = AdaptedModel.from_pretrained(tiny("opt"), tmp_path)
    assert not any(module._forward_hooks for name, module in again.base.named_modules() if name.endswith(("proj", "fc1", "fc2")))
    ids, _, mask = rows()
    assert torch.equal(logits(again), run(tiny("opt"), ids, mask))


def test_saved_between_two_choices_it_says_so(tmp_path: Path) -> None:
    model = AdaptedModel(tiny("opt"))
    excite(model.add_adapter("one", AdaLoRA(init_rank=3, target_rank=2, targets=("fc1",))))
    with pytest.warns(UserWarning, match=r"^AdaLoRA is saved with 6 triplets, and its target is 4: a training that has ended leaves no more than that$"):
        model.save_pretrained(tmp_path)


# ----------------------------------------
# What is refused.

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_rank": 12}, "AdaLoRA goes from init_rank 12 to target_rank 12: give a target of 1 or more, and a larger start, such as 12 and 8"),
    ({"target_rank": 0}, "AdaLoRA goes from init_rank 12 to target_rank 0: give a target of 1 or more"),
    ({"total": 10, "tinit": 6, "tfinal": 4}, "AdaLoRA's tinit is 6 and tfinal 4 of 10 steps, which leave none to shrink the budget in: give fewer"),
    ({"total": 10, "tinit": 2, "tfinal": 4, "interval": 5}, "AdaLoRA's interval is 5 steps, and its budget shrinks in 4 of 10: give a smaller one, or more steps"),
    ({"interval": 0}, "AdaLoRA's interval is 0, orthogonality 0.1 and total 0: give an interval of 1 or more"),
    ({"beta1": 1.0}, "AdaLoRA's beta1 is 1.0 and beta2 0.85: both are between 0 and 1, such as 0.85"),
    ({"beta2": 0.0}, "AdaLoRA's beta1 is 0.85 and beta2 0.0"),
    ({"tinit": 2.5}, "AdaLoRA's tinit is 2.5: give a whole number of steps, or a share below 1"),
    ({"tfinal": -1}, "AdaLoRA's tfinal is -1"),
    ({"budget": "one"}, "AdaLoRA's budget is 'one': give shared or each_group"),
    ({"groups": {}}, "AdaLoRA needs groups of token domains"),
    ({"dropout": 1.0}, "AdaLoRA's dropout is 1.0 for the group all"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        AdaLoRA(**settings)


def test_a_run_that_does_not_fit_and_ranks_of_other_places_are_refused() -> None:
    anatomy = Anatomy.read(tiny("opt"))
    method = AdaLoRA(total=100)
    with pytest.raises(ConfigError, match=r"^AdaLoRA's total is 100 steps, and the run has 80: give the same number, or leave total out$"):
        method.schedule("adalora", Adapter({"adalora": method}, anatomy)).begin(80, 0)
    method = AdaLoRA(tinit=50, tfinal=30)
    with pytest.raises(ConfigError, match=r"^AdaLoRA's tinit is 50 and tfinal 30 of 80 steps"):
        method.schedule("adalora", Adapter({"adalora": method}, anatomy)).begin(80, 0)
    with pytest.raises(ConfigError, match=r"^AdaLoRA's ranks name all.7.fc1, and its groups and targets give no such place"):
        AdaLoRA(ranks={"all.7.fc1": 1}).place(anatomy)
