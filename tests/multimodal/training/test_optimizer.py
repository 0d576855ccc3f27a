"""AdamW in one kernel gives what AdamW in a loop does, and goes on from its states; stages train what they name and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, two_texts
from safetensors.torch import load_file
from shared import fixtures
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_case import SETTINGS as SHORT
from train_case import Stop, losses, stop_at, weights
from transformers import OPTConfig, OPTForCausalLM

from adalink import PREFIX, TEXT, Adapter, Anatomy, Bridge, LoRA, Prefix, TokenMap, attach
from adalink.errors import CheckpointError, ConfigError
from multimodal.model import VisionLanguageModel
from multimodal.template import Text
from multimodal.training.prepare import new_optimizer, parameter_groups
from multimodal.training.settings import Stage, TrainSettings
from multimodal.training.stages import Stages
from multimodal.training.state import load_state, save_state
from multimodal.training.train import train

SETTINGS = TrainSettings(learning_rate=0.1, weight_decay=0.1, learning_rates={"b": 0.03})


class Run:
    """Two methods' weights and their optimizer."""

    def __init__(self, dtype: torch.dtype, *, fused: bool) -> None:
        torch.manual_seed(1)
        self.weights = {name: nn.Parameter(torch.randn(*shape, dtype=dtype)) for name, shape in (("a.down", (3, 2)), ("a.bias", (2,)), ("b.up", (3, 2)))}
        self.optimizer = new_optimizer(self.weights, SETTINGS)
        for group in self.optimizer.param_groups:
            group["fused"] = fused

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            for weight in self.weights.values():
                weight.grad = torch.randn_like(weight)
            self.optimizer.step()


def test_an_optimizer_of_floats_on_a_processor_is_fused() -> None:
    weights = {"a.down": nn.Parameter(torch.randn(2, 2)), "b.up": nn.Parameter(torch.randn(2, 2))}
    assert all(group["fused"] for group in new_optimizer(weights, SETTINGS).param_groups)
    weights["b.up"] = nn.Parameter(torch.randn(2, 2, device="meta"))  # stands for a device that has no such kernel
    assert not any(group["fused"] for group in new_optimizer(weights, SETTINGS).param_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)], ids=["fused", "loop then fused", "fused then loop"])
def test_ten_steps_of_either_form_and_ten_of_the_other_equal_twenty_in_a_loop(dtype: torch.dtype, before: bool, after: bool, tmp_path: Path) -> None:
    whole, first, second = Run(dtype, fused=False), Run(dtype, fused=before), Run(dtype, fused=after)
    whole.steps(0, 20)
    first.steps(0, 10)
    save_state(tmp_path, 10, first.weights, first.optimizer, {}, 1)
    load_state(tmp_path / "step_00000010", second.weights, second.optimizer)
    second.steps(10, 20)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
        assert float(second.optimizer.state[second.weights[name]]["step"]) == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the step count of a fused optimizer is kept beside its weights on a GPU alone")
def test_a_state_from_a_processor_is_continued_in_one_kernel_on_a_gpu(tmp_path: Path) -> None:
    first, second = Run(torch.float32, fused=False), Run(torch.float32, fused=True)
    first.steps(0, 10)
    save_state(tmp_path, 10, first.weights, first.optimizer, {}, 1)
    weights = {name: nn.Parameter(weight.detach().cuda()) for name, weight in second.weights.items()}
    optimizer = new_optimizer(weights, SETTINGS)
    load_state(tmp_path / "step_00000010", weights, optimizer)
    assert all(optimizer.state[weight]["step"].is_cuda for weight in weights.values())
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


# ----------------------------------------
# Stages: prefixes first, then LoRA too (PT-PEFT).


METHODS = {"bridge": Bridge(kind="linear"), "prefix": Prefix(length=2, form="table"), "lora": LoRA(rank=2, groups={"all": ("all",)})}
FIRST, THEN = ("bridge", "prefix"), ("bridge", "prefix", "lora")
TWO = (Stage(trains=FIRST, steps=3), Stage(trains=THEN, steps=4))


def staged(folder: Path, *, resume: bool = False, measure: Any = None, methods: Mapping[str, Any] = METHODS, **fields: Any) -> VisionLanguageModel:
    """A training of seven steps."""
    model = compose("opt")
    torch.manual_seed(5)
    excite(model.add_adapter("one", methods).double())
    options = {**SHORT, "steps": 7, "checkpoint_every": 1, "warmup": 0.3, "keep": 9, **fields}
    train(model, Drawn(8), two_texts, TrainSettings(**options), folder, resume=resume, measure=measure)
    return model


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "state.safetensors")


def of(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(start)}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and bool(first) and all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_a_stage_does_not_name_has_no_gradient_and_no_state_and_stays_bit_for_bit(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        assert all((one.grad is not None) == one.requires_grad for one in parameters)
        seen.append({group["peaks"] for group in optimizer.param_groups if all(one.requires_grad for one in group["params"])})

    handle = register_optimizer_step_pre_hook(look)
    try:
        model = staged(tmp_path, stages=TWO)
    finally:
        handle.remove()
    model.save_pretrained(tmp_path / "adapter")  # peft writes the prefix of such a pair alone
    assert equal(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), weights(model))
    assert [len(groups) for groups in seen] == [1] * 3 + [2] * 4
    states = [saved(tmp_path, step) for step in range(1, 8)]
    assert all(equal(of(states[0], "weight.lora"), of(state, "weight.lora")) for state in states[:3])
    assert [bool(of(state, "optimizer.lora")) for state in states] == [False] * 3 + [True] * 4
    for one in ("weight.lora", "weight.prefix", "weight.bridge"):
        moves = [not equal(of(before, one), of(after, one)) for before, after in pairwise(states)]
        assert moves == ([False] * 2 + [True] * 4 if "lora" in one else [True] * 6)
    counts = {name: float(states[-1][f"optimizer.{name}.step"]) for name in weights(model)}
    assert {count for name, count in counts.items() if name.startswith("lora.")} == {4.0}
    assert {count for name, count in counts.items() if not name.startswith("lora.")} == {7.0}
    assert all(parameter.requires_grad for parameter in model.adapted.active_adapter().parameters())
    assert json.loads((tmp_path / "checkpoints/step_00000007/state.json").read_text())["stage"] == {"number": 1, "trains": list(THEN)}


@pytest.fixture(scope="module")
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The settings of a training in two stages, and the folder of such a run."""
    shares = (Stage(trains=FIRST, share=0.45), Stage(trains=THEN, share=0.55))  # 3.15 of seven steps are three
    fields: dict[str, Any] = {"stages": TWO} if request.param == "steps" else {"steps": 0, "epochs": 3.5, "stages": shares}
    folder = tmp_path_factory.mktemp(request.param)
    staged(folder, checkpoint_every=2, **fields)
    return fields, folder


@pytest.mark.parametrize("unbroken", ["steps"], indirect=True)
def test_one_stage_of_everything_and_stages_of_no_steps_change_nothing(unbroken: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    none = (Stage(trains=("lora",), steps=0), Stage(trains=THEN, steps=3), Stage(trains=("bridge",), steps=0, optimizer="new"), Stage(trains=THEN))
    runs = {"plain": (), "one": (Stage(trains=THEN),), "none": none}
    found = {name: weights(staged(tmp_path / name, stages=stages)) for name, stages in runs.items()}
    logs = {name: (tmp_path / name / "metrics.jsonl").read_text() for name in runs}
    for name in ("one", "none"):
        assert equal(found[name], found["plain"])
        assert logs[name] == logs["plain"]
    assert not equal(of(saved(unbroken[1], 7), "weight."), of(saved(tmp_path / "plain", 7), "weight."))  # the control: two stages


@pytest.mark.parametrize(("unbroken", "step"), [("steps", 3), ("steps", 4), ("steps", 6), ("shares", 4)], indirect=["unbroken"])
def test_a_run_that_stops_in_any_stage_goes_on_bit_for_bit(step: int, unbroken: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """After steps 2, 3 and 4: in the first stage, between the two, and in the second."""
    fields, whole = unbroken
    with pytest.raises(Stop):
        staged(tmp_path, measure=stop_at(step), measure_every=1, checkpoint_every=3 if step == 4 else 2, **fields)
    staged(tmp_path, checkpoint_every=2, resume=True, **fields)
    assert losses(tmp_path) == losses(whole)
    assert equal(saved(tmp_path, 7), saved(whole, 7))  # the optimizer's state too


def test_a_checkpoint_of_another_stage_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        staged(tmp_path, stages=TWO, measure=stop_at(5), measure_every=1)
    cases = {
        (): r"it was written in stage 2 of train\.stages, which trained bridge, prefix, lora, and now there are 1;",
        (TWO[0], Stage(trains=("lora",))): r"in stage 2 of train\.stages, which trained bridge, prefix, lora, and now it trains lora;",
        (Stage(trains=FIRST, steps=5), TWO[1]): r"it was written in stage 2 of train\.stages, and now an earlier stage is as long as that;",
    }
    for stages, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            staged(tmp_path, stages=stages, steps=0 if len(stages) == 2 and stages[1].steps else 7, resume=True)


class Ticks:
    """An optimizer's groups of three methods, and the stages over them: which rates are given step by step."""

    def __init__(self, stages: Sequence[Stage], **fields: Any) -> None:
        self.weights = {f"{name}.up": nn.Parameter(torch.ones(1, 1)) for name in ("a", "b", "c")}
        self.settings = TrainSettings(learning_rate=1.0, stages=tuple(stages), **fields)
        self.optimizer = new_optimizer(self.weights, self.settings)
        self.stages = Stages(self.settings, self.optimizer)

    def rates(self, steps: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in self.weights}
        for step in range(steps):
            self.stages.enter(step, steps)
            for group in self.optimizer.param_groups:
                for name, weight in self.weights.items():
                    if any(weight is one for one in group["params"]):
                        found[name].append(group["lr"])
        return found


def test_a_rate_rises_and_falls_over_the_stages_in_a_row_that_name_its_method() -> None:
    stages = (Stage(trains=("a",), steps=4), Stage(trains=("a", "b"), steps=6, learning_rate=0.5), Stage(trains=("a", "c"), steps=2, optimizer="new"))
    ticks = Ticks(stages, warmup=0.25, learning_rates={"c": 2.0})
    assert ticks.settings.steps == 12
    found, rate = ticks.rates(12), ticks.settings.rate
    assert found["a.up"] == [rate(i, 10) * (1.0 if i < 4 else 0.5) for i in range(10)] + [rate(i, 2) for i in range(2)]
    assert found["b.up"] == [0.0] * 4 + [0.5 * rate(i, 6) for i in range(6)] + [0.0] * 2
    assert found["c.up"] == [0.0] * 10 + [2.0 * rate(i, 2) for i in range(2)]


@pytest.mark.parametrize("optimizer", ["keep", "new"])
def test_the_optimizers_state_of_what_goes_on_is_kept_or_made_anew(optimizer: Any) -> None:
    ticks = Ticks((Stage(trains=("a", "c"), share=0.5), Stage(trains=("a", "b"), share=0.5, optimizer=optimizer)))
    for step in range(4):
        ticks.stages.enter(step, 4)
        for weight in ticks.weights.values():
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        ticks.optimizer.step()
    found = {name: float(ticks.optimizer.state[weight]["step"]) for name, weight in ticks.weights.items() if weight in ticks.optimizer.state}
    assert found == {"a.up": 4.0 if optimizer == "keep" else 2.0, "b.up": 2.0}


STEPS = "train.stages counts steps, and how many are left for the last stage train.epochs does not say: give train.steps, or shares"
BAD: list[tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = [
    (({"trains": ()},), {}, "a stage of train.stages trains nothing: give under `trains` the names of one or more methods, such as [prefix]"),
    (({"trains": ("a",), "steps": 1, "share": 0.5},), {}, "a stage of train.stages has steps: 1 and share: 0.5, which both say how long it is: give one of them"),
    (({"trains": ("a",), "steps": -1},), {}, "a stage of train.stages has steps: -1 and share: None: give 0 steps or more, or a share from 0 to 1"),
    (({"trains": ("a",), "share": 1.5},), {}, "a stage of train.stages has steps: None and share: 1.5: give 0 steps or more, or a share from 0 to 1"),
    (({"trains": ("a",), "learning_rate": 0.0},), {}, "a stage of train.stages has learning_rate: 0.0: give a positive rate"),
    (
        ({"trains": ("a",)}, {"trains": ("b",), "steps": 2}), {"steps": 4},
        "train.stages has a stage without steps and share that is not the last, which alone takes the rest: say how long it is",
    ),
    (({"trains": ("a",), "steps": 2}, {"trains": ("b",)}), {}, STEPS),
    (({"trains": ("a",), "steps": 2}, {"trains": ("b",), "share": 0.5}), {"steps": 4}, "train.stages counts some stages in steps and others in shares: count all of them alike"),
    (
        ({"trains": ("a",), "steps": 2}, {"trains": ("b",), "steps": 3}), {"steps": 6},
        "train.stages add up to 5 steps, and the run has 6: give stages that add up to it, or none for the last",
    ),
    (
        ({"trains": ("a",), "share": 0.5}, {"trains": ("b",), "share": 0.6}), {},
        "train.stages add up to 1.1 of the run, and the run has 1: give stages that add up to it, or none for the last",
    ),
    (
        ({"trains": ("a",), "share": 0.5}, {"trains": ("b",)}), {"patience": 2, "measure_every": 1},
        "train.patience is 2, which ends a run before its later train.stages: give 0, or one stage",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "fields", "message"), BAD, ids=range(len(BAD)))
def test_stages_that_are_none_are_refused_in_a_sentence(stages: tuple[dict[str, Any], ...], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TrainSettings(stages=tuple(Stage(**stage) for stage in stages), **fields)
    assert str(refused.value) == message


def test_an_answer_head_is_named_like_a_method(tmp_path: Path) -> None:
    model = compose("opt")
    model.add_adapter("one", {name: METHODS[name] for name in ("bridge", "lora")})
    model.add_answer_head(["yes", "no"])
    stages = (Stage(trains=("head",), steps=1), Stage(trains=("head", "bridge"), steps=1), Stage(trains=("lora", "bridge")))

    def scored(sample: Any, rng: Any) -> list[Text]:
        return [Text("is it red ?", None, scores=((0, 1.0),))]

    train(model, Drawn(4), scored, TrainSettings(**{**SHORT, "steps": 3, "checkpoint_every": 1, "keep": 9, "stages": stages}), tmp_path)
    states = [saved(tmp_path, step) for step in (1, 2, 3)]
    trained = [{part for part in ("head", "bridge", "lora") if of(state, f"optimizer.{part}.")} for state in states]
    assert trained == [{"head"}, {"head", "bridge"}, {"bridge", "lora"}]
    assert equal(of(states[1], "weight.head"), of(states[2], "weight.head"))
    assert not equal(of(states[0], "weight.head"), of(states[1], "weight.head"))


def test_a_method_that_no_stage_names_is_noted_and_stays_as_it_begins(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^no stage of train\.stages trains bridge, lora, so it stays as it begins$"):
        staged(tmp_path, stages=(Stage(trains=("prefix",)),), steps=2)
    assert not of(saved(tmp_path, 2), "optimizer.bridge")


def test_a_stage_of_a_method_that_is_not_there_or_does_not_train_is_refused() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("bridge.w", "lora.a.up", "head.linear.bias")}
    parameter_groups(parameters, TrainSettings(stages=(Stage(trains=("bridge", "head"), share=0.5), Stage(trains=("lora.a",)))))
    with pytest.raises(ConfigError, match=r"^train\.stages names prefx, and this adapter's methods are bridge, head, lora$"):
        parameter_groups(parameters, TrainSettings(stages=(Stage(trains=("prefx",)),)))


def test_two_stages_equal_the_published_computation_in_losses_and_weights() -> None:
    """A prefix in transformers' cache and LoRA by hooks, in float64."""
    for file in sorted(fixtures("pt_peft").glob("*.json")):
        spec, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
        assert off_the_file(spec, tensors) < 1e-10
        assert off_the_file({**spec, "stages": spec["stages"][::-1]}, tensors) > 1e-3  # the control


def off_the_file(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> float:
    """The largest difference of losses, of weights after each stage and of the last logits."""
    model: Any = OPTForCausalLM(OPTConfig(**spec["config"])).double().eval()
    model.load_state_dict({name.removeprefix("w."): value for name, value in of(tensors, "w.").items()}, strict=False)
    n, ids = spec["prefix_length"], tensors["in.ids"]
    lora = LoRA(rank=spec["rank"], alpha=spec["alpha"], groups={"all": ("all",)}, targets=("query", "value"))
    adapter = Adapter({"prefix": Prefix(length=n, form="table"), "lora": lora}, Anatomy.read(model)).double()
    given = weights_of_file(adapter, tensors, "start.")
    adapter.load_state_dict({name: given.get(name, torch.zeros_like(value)) for name, value in adapter.state_dict().items()})
    stages = tuple(Stage(trains=tuple(one["trains"]), steps=one["steps"], learning_rate=one["lr"]) for one in spec["stages"])
    settings = TrainSettings(stages=stages, warmup=0.0, final_rate=1.0)  # a rate that stays
    parameters = dict(adapter.named_parameters())
    optimizer = torch.optim.SGD([{**group, "weight_decay": 0.0} for group in parameter_groups(parameters, settings)], lr=0.0)
    passed, attachment = Stages(settings, optimizer), attach(model, adapter)
    domain = torch.cat([torch.full((len(ids), n), PREFIX), torch.full_like(ids, TEXT)], 1)

    def logits() -> Tensor:
        with attachment.bind(TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))):
            found: Tensor = model(input_ids=nn.functional.pad(ids, (n, 0)), attention_mask=torch.ones_like(domain)).logits[:, n:]
        return found

    off, ends = [], list(torch.tensor([one.steps for one in stages]).cumsum(0))
    for step in range(settings.steps):
        passed.enter(step, settings.steps)
        loss = nn.functional.cross_entropy(logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        off.append(loss.detach() - tensors["out.losses"][step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for stage in [i for i, end in enumerate(ends) if end == step + 1]:
            off += [(parameters[name] - value).detach() for name, value in weights_of_file(adapter, tensors, f"after.{stage}.").items()]
    off.append(logits().detach() - tensors["out.last_logits"])
    return max(float(one.abs().max()) for one in off)


def weights_of_file(adapter: Adapter, tensors: Mapping[str, Tensor], at: str) -> dict[str, Tensor]:
    """The adapter's weights by name, of what the file holds at a moment: keys and values [L, 2, S, d], A [L, 2, r, d] and perhaps B [L, 2, d, r]."""
    found = {"prefix.shared.table": tensors[f"{at}prefix"].double().permute(2, 0, 1, 3).flatten(1)}
    for name in (name for name, _ in adapter.named_parameters() if name.startswith("lora.")):
        matrix, is_value = ("A" if "down" in name else "B"), "v_proj" in name
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        if f"{at}{matrix}" in tensors:
            found[name] = tensors[f"{at}{matrix}"][layer, int(is_value)].double()
    return found
