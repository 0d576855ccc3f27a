"""IST: what the authors' code computes, how often layers are drawn, what rests, what weakening leaves behind, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, two_texts
from fixture_file import FixtureFile
from safetensors.torch import load_file
from shared import fixtures
from tiny import INPUTS, rows, run, tiny, token_map
from torch import Tensor, nn
from train_case import SETTINGS, Stop, stop_at

from adalink import IST, AdaLink, Adapter, Anatomy, Bottleneck, Bridge, LoRA, Selected, attach
from adalink.checkpoint.folder import read_config
from adalink.errors import CheckpointError, ConfigError
from adalink.methods.budgets.ist import Draws, moved
from multimodal.model import VisionLanguageModel, save_composed
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

PUBLISHED = sorted(fixtures("ist").glob("*.safetensors"))
LORA = LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2)


def draws(methods: dict[str, Any], n_layers: int = 4, family: str = "llama", **settings: Any) -> Draws:
    adapter = Adapter({**methods, "ist": IST(**settings)}, Anatomy.read(tiny(family, n_layers=n_layers), INPUTS)).double()
    made = adapter.methods["ist"].schedule("ist", adapter)  # type: ignore[attr-defined]
    assert isinstance(made, Draws)
    return made


# ----------------------------------------
# The rule, against the authors' run.


class Chain(nn.Module):
    """The network of the recorded run: x <- x + tanh(W_l x + scale_l B_l A_l x), and the mean of (head x - y)^2."""

    def __init__(self, case: FixtureFile) -> None:
        super().__init__()
        self.weights, self.head = case.tensors["w.W"].double(), case.tensors["w.head"].double()
        self.down, self.up = (nn.ParameterList(list(case.tensors[f"start.{name}"].double())) for name in "AB")
        self.scales = [case.spec["scale"]] * len(self.weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for weight, down, up, scale in zip(self.weights, self.down, self.up, self.scales, strict=True):
            x = x + torch.tanh(x @ weight.T + scale * (x @ down.T @ up.T))
        return (x @ self.head - y).square().mean()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_it_equals_the_authors_run(path: Path) -> None:
    case = FixtureFile.read(path)
    spec, x, y = case.spec, case.tensors["in.x"].double(), case.tensors["in.y"].double()
    model, importance = Chain(case), torch.zeros(spec["layers"])
    optimizer = torch.optim.SGD(model.parameters(), lr=spec["optimizer"]["lr"])
    sets, size = list(case.tensors["draw.suppressed"].tolist()), spec["reward_batch"]
    for step in range(spec["steps"]):
        if step and step % spec["interval"] == 0:
            update = step // spec["interval"] - 1
            chosen, losses = [sets.pop(0) for _ in range(spec["n_subsets"])], []
            for members in chosen:
                model.scales = [spec["scale"] * (spec["suppression_factor"] if i in members else 1) for i in range(spec["layers"])]
                at = torch.arange(update * size, (update + 1) * size) % spec["n_data"]
                with torch.no_grad():
                    losses.append(float(model(x[at], y[at])))
            model.scales = [spec["scale"]] * spec["layers"]
            importance = moved(importance, chosen, losses, spec["importance_lr"])
        assert torch.equal(importance, case.tensors["out.importance"][step])
        at = torch.arange(step * size, (step + 1) * size) % spec["n_data"]
        loss = model(x[at], y[at])
        torch.testing.assert_close(loss.detach(), case.tensors["out.losses"][step], rtol=0, atol=1e-10)
        loss.backward()
        for i in set(range(spec["layers"])) - set(case.tensors["out.active"][step].tolist()):
            model.down[i].grad = model.up[i].grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert not sets
    for name, weights in (("A", model.down), ("B", model.up)):
        torch.testing.assert_close(torch.stack(list(weights)).detach(), case.tensors[f"end.{name}"], rtol=0, atol=1e-10)


# ----------------------------------------
# Draws.


def never() -> float:
    raise AssertionError("no loss is read")


@pytest.mark.parametrize("n_active", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_are_drawn_as_often_as_their_weights_say(n_active: int) -> None:
    """20,000 steps at a fixed importance: each layer within 3 sigma of its chance, drawn one after the other without coming back."""
    made, n = draws({"bottleneck": Bottleneck(width=2)}, n_layers=5, importance="uniform", active=n_active / 5), 20_000
    made.importance.copy_(torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0]))
    weights = torch.sigmoid(-made.importance.double())
    p = weights / weights.sum()
    chance = (
        p
        if n_active == 1
        else p + torch.stack([torch.stack([p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i]).sum() for i in range(5)])
    )
    for step in range(n):
        made.before_step(step, never)
    share = made.drawn.double() / n
    assert ((share - chance).abs() < 3 * (chance * (1 - chance) / n).sqrt()).all()
    assert (share - n_active / 5).abs().max() > 0.1  # control


def test_sets_are_drawn_by_what_is_unimportant_and_differ() -> None:
    made = draws({"bottleneck": Bottleneck(width=2)}, n_layers=6, sets=3, suppressed=0.34)
    made.importance.copy_(torch.tensor([-4.0, -4.0, 0.0, 0.0, 4.0, 4.0]))
    sets = [made.draw_sets(torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert all(len({frozenset(one) for one in found}) == 3 and all(len(set(one)) == 2 for one in found) for found in sets)
    counts = torch.bincount(torch.tensor(sets).flatten(), minlength=6)
    assert counts[4:].min() > counts[2:4].max() > counts[:2].max()


def test_the_draws_of_a_step_are_a_function_of_seed_and_step() -> None:
    def drawn(seed: int, first: int, loss: Callable[[], float]) -> list[list[int]]:
        made = draws({"bottleneck": Bottleneck(width=2)}, n_layers=6, interval=5, active=0.5)
        made.begin(30, seed)
        found = []
        for step in range(first, 30):
            made.before_step(step, loss)
            found.append(list(made.active))
        return found

    assert drawn(3, 0, lambda: 1.0) == drawn(3, 0, lambda: 1.0)
    assert drawn(3, 0, lambda: 1.0)[12:] == drawn(3, 12, lambda: 1.0)  # equal losses leave the importance at 0
    assert drawn(3, 0, lambda: 1.0) != drawn(4, 0, lambda: 1.0)


# ----------------------------------------
# In a model.


def test_a_layer_that_rests_keeps_its_weights_and_its_moments_bit_for_bit() -> None:
    model = tiny("llama", n_layers=4)
    ids, domain, mask = rows()
    methods: dict[str, Any] = {"adalink": AdaLink(rank=2, modalities=("text",)), "lora": LORA, "taps": Selected(inner=Bottleneck(width=2))}
    adapter = Adapter({**methods, "ist": IST(importance="uniform")}, Anatomy.read(model, INPUTS)).double()
    excite(adapter)
    made, optimizer = adapter.methods["ist"].schedule("ist", adapter), torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)  # type: ignore[attr-defined]
    attachment = attach(model, adapter)
    made.begin(6, 0)
    for step in range(6):
        weights = {name: value.detach().clone() for name, value in adapter.named_parameters()}
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        made.before_step(step, never)
        with attachment.bind(token_map(domain)):
            run(model, ids, mask).square().mean().backward()
        made.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        layer = str(made.active[0])
        for i, (name, value) in enumerate(adapter.named_parameters()):
            rests = not name.startswith("adalink") and layer not in name.split(".")
            assert torch.equal(value, weights[name]) == rests, name
            assert not rests or repr(optimizer.state_dict()["state"].get(i)) == repr(moments.get(i))


def test_weakening_multiplies_the_changes_and_leaves_nothing_behind() -> None:
    model, factor = tiny("llama", n_layers=4), 0.25
    ids, domain, mask = rows()
    adapter = Adapter({"lora": LORA, "ist": IST()}, Anatomy.read(model, INPUTS)).double()
    excite(adapter)
    made, attachment = adapter.methods["ist"].schedule("ist", adapter), attach(model, adapter)  # type: ignore[attr-defined]

    def logits() -> Tensor:
        with attachment.bind(token_map(domain)), torch.no_grad():
            return run(model, ids, mask)

    before = logits()
    with made.weakened([1, 3]):
        weaker = logits()
    assert not torch.allclose(weaker, before)
    assert torch.equal(logits(), before)
    made.begin(20, 0)
    made.before_step(10, lambda: float(logits().mean()))
    assert made.importance.abs().max() > 0  # an update
    assert torch.equal(logits(), before)
    with pytest.raises(ValueError, match="at once"), made.weakened([0]):
        raise ValueError("at once")
    assert torch.equal(logits(), before)
    with torch.no_grad():
        for placement in adapter.placements:
            if ".1." in placement.role or ".3." in placement.role:
                placement.edit.up.weight.mul_(factor)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(logits(), weaker, rtol=0, atol=1e-12)


def test_layers_of_text_and_image_may_rest_apart() -> None:
    assert draws({"lora": LORA}).names == ["0", "1", "2", "3"]
    assert sorted(draws({"lora": LORA}, per="layer_domain").names) == sorted(
        f"{layer}.{name}" for layer in range(4) for name in ("image", "text_answer")
    )


@pytest.mark.slow
def test_the_one_layer_that_lowers_the_loss_is_trained_more() -> None:
    """A LoRA in layer 1 of 4 makes the outputs, and what each layer adds is compared, so that no other layer can do its part."""
    model = tiny("llama", n_layers=5)
    ids, domain, mask = rows(1)
    anatomy, bound = Anatomy.read(model, INPUTS), token_map(domain)
    excite(teacher := Adapter({"lora": LoRA(rank=2, targets=("down",), exclude_layers=(0, 2, 3, 4))}, anatomy).double(), 3)

    def increments() -> Tensor:
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states  # type: ignore[operator]
        return torch.stack(found[:-1]).diff(dim=0)

    attachment, frozen = attach(model, teacher), increments()
    with attachment.bind(bound), torch.no_grad():
        wanted = increments()
    attachment.detach()
    adapter = Adapter({"lora": LoRA(rank=2, targets=("down",), exclude_layers=(4,)), "ist": IST()}, anatomy).double()
    made, optimizer = adapter.methods["ist"].schedule("ist", adapter), torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)  # type: ignore[attr-defined]
    scale = (wanted - frozen).square().mean()
    attachment, chosen = attach(model, adapter), []
    made.begin(300, 0)

    def loss() -> Tensor:
        with attachment.bind(bound):
            return (increments() - wanted).square().mean() / scale

    def read() -> float:
        with torch.no_grad():
            return float(loss())

    for step in range(300):
        made.before_step(step, read)
        chosen.append(made.active[0])
        loss().backward()
        made.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.sigmoid(-made.importance)
    assert weights[1] / weights.sum() > 0.4  # of the steps that would follow: 0.50 is measured
    assert read() < 0.01


def test_the_control_trains_all_layers_alike() -> None:
    control = draws({"bottleneck": Bottleneck(width=2)}, importance="uniform")
    for step in range(300):
        control.before_step(step, never)
    assert ((control.drawn / 300 - 0.25).abs() < 3 * (0.25 * 0.75 / 300) ** 0.5).all()


# ----------------------------------------
# In a training.

RUNS: dict[str, dict[str, Any]] = {
    "ist": {"lora": LORA, "ist": IST(active=0.5, interval=1, sets=2)},
    "ist_layer_domain": {"lora": LORA, "bottleneck": Bottleneck(width=2), "ist": IST(interval=2, per="layer_domain", active=0.5)},
    "selected": {"selected": Selected(inner=LORA, per="group", weight=0.5, rate=0.05, warmup=1)},
    "proximal": {"selected": Selected(inner=LORA, weight=0.1, rate=0.05, step="proximal"), "ist": IST(active=0.5, importance="uniform")},
}


def trained(name: str, folder: Path, *, resume: bool = False, measure: Any = None, **fields: Any) -> VisionLanguageModel:
    folder.mkdir(exist_ok=True, parents=True)
    model, _ = excited(name)
    train(model, Drawn(8), two_texts, TrainSettings(**{**SETTINGS, **fields}), folder, resume=resume, measure=measure)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "ist_layer_domain" else []) for name in RUNS])
def test_a_run_that_is_stopped_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = trained(name, tmp_path / "whole")
    with pytest.raises(Stop):
        trained(name, tmp_path / "parts", measure=stop_at(3), measure_every=1)
    resumed = trained(name, tmp_path / "parts", resume=True)
    own, again = (dict(model.adapted.active_adapter().named_parameters()) for model in (whole, resumed))
    assert all(torch.equal(value, again[key]) for key, value in own.items())
    states = [load_file(tmp_path / folder / "checkpoints" / "step_00000004" / "state.safetensors") for folder in ("whole", "parts")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    start = excited(name)[1]
    assert any(not torch.equal(value, start[key]) for key, value in own.items() if "scores" in key) == ("selected" in RUNS[name])


def excited(name: str) -> tuple[VisionLanguageModel, dict[str, Tensor]]:
    """A model whose edits are at work, and whose gates are open; and its weights."""
    model = compose("opt")
    torch.manual_seed(5)
    adapter = model.add_adapter("one", {"bridge": Bridge(kind="linear"), **RUNS[name]}).double()
    excite(adapter)
    with torch.no_grad():
        for key, value in adapter.named_parameters():
            if ".scores." in key:
                value.fill_(0.15)
    return model, dict(adapter.named_parameters())


def test_a_folder_has_what_was_trained_and_no_ist(tmp_path: Path) -> None:
    model = trained("ist", tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ist trains 0"] + last["ist trains 1"] == 1.0  # one of the two layers in each step
    assert last["ist lowest"] == last["ist trains 1"]
    save_composed(model, tmp_path / "saved", {})
    assert set(read_config(tmp_path / "saved").methods) == {"bridge", "lora"}
    own, found = model.adapted.active_adapter().tensors(), compose("opt").load_adapter(tmp_path / "saved", "two").tensors()
    assert all(torch.equal(value.float(), found[key].float()) for key, value in own.items())


def test_the_optimizer_sees_no_score(tmp_path: Path) -> None:
    trained("selected", tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 1 <= last["selected open"] == last["selected open for image"] + last["selected open for text_answer"] <= 4
    state = load_file(tmp_path / "checkpoints" / "step_00000004" / "state.safetensors")
    assert any(key.startswith("weight.selected.scores") for key in state)
    assert not any(key.startswith("optimizer.selected.scores") for key in state)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ist trains 0.25 of 2 layers with edits, so n_active would be 0: give an active of 0.5 or more"):
        draws({"lora": LORA}, n_layers=2)
    with pytest.raises(ConfigError, match=r"ist chooses among layers, and the methods beside it have no trained edit inside one"):
        draws({"adalink": AdaLink(rank=2, modalities=("text",))})
    with pytest.raises(ConfigError, match=r"ist compares 3 different sets of 1 layers, and 2 have edits, which is too few for that"):
        draws({"lora": LORA}, n_layers=2, active=0.5)
    with pytest.raises(ConfigError, match=r"interval is 20 steps, and the run has 20, so the importance would stay as it is"):
        draws({"lora": LORA}, interval=20).begin(20, 0)
    draws({"lora": LORA}, interval=20, importance="uniform").begin(20, 0)
    with pytest.raises(ConfigError, match=r"^ist's interval is 10 steps, and the run has 4"):
        train(with_ist(IST(active=0.5, sets=2)), Drawn(8), two_texts, TrainSettings(**SETTINGS), tmp_path)  # type: ignore[arg-type]
    for fields, message in (
        ({"active": 0.0}, "ist's active is 0.0: give a share of the layers, more than 0 and at most 1"),
        ({"active": 1.5}, "active is 1.5"),
        ({"suppressed": float("nan")}, "suppressed is nan"),
        ({"interval": 0}, "interval is 0, sets 3, rate 10.0 and factor 0.25: give an interval of 1 or more"),
        ({"sets": 1}, "sets 1"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"factor": 1.0}, "factor 1.0"),
        ({"importance": "random"}, "importance is 'random' and its per 'layer': give learned or uniform"),
        ({"per": "head"}, "per 'head'"),
    ):
        with pytest.raises(ConfigError, match=message):
            IST(**fields)  # type: ignore[arg-type]
    made, other = draws({"lora": LORA}), draws({"lora": LORA}, n_layers=5)
    with pytest.raises(CheckpointError, match="the state of Draws is of other groups or targets: drawn, importance differ"):
        other.load_state(made.state())


def with_ist(method: IST) -> VisionLanguageModel:
    model = compose("opt")
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "lora": LORA, "ist": method}).double()
    return model
