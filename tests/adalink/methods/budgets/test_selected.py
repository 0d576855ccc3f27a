"""Selected (TAPS): what the authors' code computes, what a closed gate leaves, what is found, what a folder has, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_file import FixtureFile
from safetensors import safe_open
from shared import fixtures
from tiny import INPUTS, excite, rows, run, tiny, token_map
from torch import Tensor, nn

from adalink import (
    EPALM,
    IA3,
    IST,
    PROMPT,
    AdaLink,
    AdaptedModel,
    Adapter,
    Anatomy,
    Bottleneck,
    Bridge,
    Gated,
    LoRA,
    Placement,
    Port,
    Prefix,
    Prompt,
    Selected,
    Slots,
    UniPELT,
    attach,
    to_peft,
)
from adalink.attachment.slots import HideKeys
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from adalink.errors import AttachError, ConfigError
from adalink.methods.budgets.selected import Gates, Score, SelectedEdit

PUBLISHED = sorted(fixtures("taps").glob("*.safetensors"))
LORA = LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2)


class Dense(nn.Module):
    """h + D x, D a whole matrix of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(width, width, dtype=torch.float64))

    def forward(self, h: Tensor, tokens: object, x: Tensor) -> Tensor:
        return h + x @ self.change.T


class Layers(nn.Module):
    """The network of the recorded runs: sum over l of head_l tanh((W_l + g_l D_l) x_l)."""

    def __init__(self, weights: Tensor, head: Tensor, threshold: float, start: float) -> None:
        super().__init__()
        self.weights, self.head = weights, head
        self.scores = nn.ModuleList(Score(start).double() for _ in weights)
        self.edits = nn.ModuleList(SelectedEdit(Dense(weights.shape[-1]), score, threshold, "") for score in self.scores)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        changed = [edit(x[:, i] @ self.weights[i].T, None, x[:, i]) for i, edit in enumerate(self.edits)]
        return torch.stack([torch.tanh(one) @ head.T for one, head in zip(changed, self.head, strict=True)]).sum(0)


def trained(case: FixtureFile, **changed: Any) -> tuple[Layers, dict[str, Tensor]]:
    """A recorded run again: its losses, and scores and norms of D after each step."""
    spec = case.spec
    n = spec["layers"]
    model = Layers(
        torch.stack([case.tensors[f"w.layer.{i}"] for i in range(n)]), case.tensors["w.head"], spec["threshold"], spec["score_init"]
    )
    settings = {
        "weight": spec["lambda"],
        "threshold": spec["threshold"],
        "warmup": spec["warmup_steps"],
        "rate": spec["optimizer"]["lr"],
        **changed,
    }
    gates = Gates(Selected(inner=LORA, **settings), {str(i): score for i, score in enumerate(model.scores)})  # type: ignore[misc]
    optimizer = torch.optim.SGD(model.parameters(), lr=spec["optimizer"]["lr"])
    gates.begin(spec["steps"], 0)
    noted: dict[str, list[Any]] = {"losses": [], "scores": [], "residual_norms": []}
    for step in range(spec["steps"]):
        task = nn.functional.mse_loss(model(case.tensors["in.x"][step % 3]), case.tensors["in.y"][step % 3])
        penalty = gates.loss(step)
        whole = task if penalty is None else task + penalty
        whole.backward()  # type: ignore[no-untyped-call]
        gates.after_backward(step)
        optimizer.step()
        gates.after_step(step)
        optimizer.zero_grad()
        noted["losses"].append(torch.stack([task, whole]).detach())
        noted["scores"].append(torch.cat([score.value.detach() for score in model.scores]).clone())  # type: ignore[operator]
        noted["residual_norms"].append(torch.stack([edit.edit.change.detach().norm() for edit in model.edits]))  # type: ignore[union-attr,operator]
    return model, {name: torch.stack(values) for name, values in noted.items()}


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Hides the keys of prompt slots, and edits nothing."""

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        return [Placement("hidden", Port(anatomy.layers[0], "mask"), HideKeys(), (PROMPT,))]


def is_open(model: Layers) -> list[int]:
    return [int(edit.is_open) for edit in model.edits]  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_it_equals_the_authors_run(path: Path) -> None:
    case = FixtureFile.read(path)
    model, noted = trained(case)
    for name, values in noted.items():
        torch.testing.assert_close(values, case.tensors[f"out.{name}"], rtol=0, atol=1e-10)
    for i, edit in enumerate(model.edits):
        torch.testing.assert_close(edit.edit.change.detach(), case.tensors[f"end.residual.{i}"], rtol=0, atol=1e-10)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        torch.testing.assert_close(model(case.tensors["in.x"][0]), case.tensors["out.last"], rtol=0, atol=1e-10)
        torch.testing.assert_close(model.eval()(case.tensors["in.x"][0]), case.tensors["out.last"], rtol=0, atol=1e-10)
    assert is_open(model) == case.spec["kept_at_end"]


@pytest.fixture(scope="module")
def planted() -> FixtureFile:
    path = next((path for path in PUBLISHED if path.stem == "planted"), None)
    if path is None:
        pytest.skip("the recorded runs are not beside the repository")
    return FixtureFile.read(path)


@pytest.mark.parametrize(("weight", "step"), [(0.2, "gradient"), (1.6, "proximal")])
def test_the_planted_layers_are_found(planted: FixtureFile, weight: float, step: str) -> None:
    assert is_open(trained(planted, weight=weight, step=step)[0]) == planted.spec["kept_at_end"]


def test_without_a_penalty_none_closes_and_a_huge_one_closes_all_for_good(planted: FixtureFile) -> None:
    assert trained(planted, weight=0.0)[1]["scores"].min() >= 0.1
    scores = trained(planted, weight=100.0, step="proximal")[1]["scores"]
    first = int((scores < 0.1).all(1).nonzero()[0])
    assert first < 20
    assert (scores[first:] < 0.1).all()
    jumps = trained(planted, weight=100.0)[1]["scores"]
    assert bool((jumps[first:] >= 0.1).any())  # the control: by its gradient such a penalty throws scores past 0, and they come back open


def test_a_gate_that_passes_no_gradient_never_moves(planted: FixtureFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(base: Tensor, value: Tensor, score: Tensor, threshold: float) -> Tensor:
        return torch.where(score >= threshold, value, base)

    monkeypatch.setattr("adalink.methods.budgets.selected._StraightThrough.apply", detached)
    scores = trained(planted, weight=0.0)[1]["scores"]
    assert torch.equal(scores, torch.full_like(scores, planted.spec["score_init"]))


# ----------------------------------------
# On a model.


def increments(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[L, N, D]: what each layer but the last adds to the tokens, so that no layer can do another one's part."""
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack(found[:-1]).diff(dim=0)[:, mask.bool()]


@pytest.mark.parametrize(("per", "step"), [pytest.param("layer", "gradient", marks=pytest.mark.slow), ("group", "proximal")])
def test_the_places_in_which_a_teacher_differs_are_found(per: Any, step: Any) -> None:
    """A LoRA for images in layer 0 and for text in layer 3 makes the outputs; one with gates in all four layers learns them."""
    torch.manual_seed(1)
    model = tiny("llama", n_layers=5)
    ids, domain, mask = rows()
    anatomy, bound = Anatomy.read(model, INPUTS), token_map(domain)
    image, text = (
        LoRA(groups={name: (name,)}, rank=2, targets=("down",), exclude_layers=tuple({0, 1, 2, 3, 4} - {layer}))
        for name, layer in (("image", 0), ("text", 3))
    )
    excite(adapter := Adapter({"one": image, "two": text}, anatomy).double(), 3, 1.0)
    frozen, teacher = increments(model, ids, mask), attach(model, adapter)
    with teacher.bind(bound), torch.no_grad():
        wanted = increments(model, ids, mask)
    teacher.detach()
    scale = (wanted - frozen).square().mean((1, 2)).max()
    inner = LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2, targets=("down",), exclude_layers=(4,))
    student = Adapter(
        {"taps": Selected(inner=inner, per=per, step=step, weight=0.3 if per == "layer" else 0.6, rate=0.05, warmup=20)}, anatomy
    ).double()
    gates: Any = student.methods["taps"].schedule("taps", student)  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-2, weight_decay=0.0)
    attachment, noted = attach(model, student), []
    for number in range(100):
        with attachment.bind(bound):
            loss = (increments(model, ids, mask) - wanted).square().mean() / scale
        penalty = gates.loss(number)
        (loss if penalty is None else loss + penalty).backward()
        gates.after_backward(number)
        optimizer.step()
        gates.after_step(number)
        optimizer.zero_grad()
        noted.append({key for key, score in gates.scores.items() if float(score.value.detach()) >= 0.1})
    often = {key for key in gates.scores if sum(key in one for one in noted[-30:]) > 15}
    assert often == ({"0", "3"} if per == "layer" else {"0.image", "3.text_answer"})
    assert len(gates.scores) == (4 if per == "layer" else 8)


INNER: dict[str, Any] = {
    "lora": LORA, "ia3": IA3(groups={"image": ("image",), "shared": ("image", "text")}), "bottleneck": Bottleneck(width=4),
    "adalink": AdaLink(rank=4, modalities=("text", "image")), "epalm": EPALM(layers=(0, 2), n_taps=1, connector="shared"),
    "gated": Gated(inner=LoRA(groups={"all": ("all",)}, rank=2)),
}  # fmt: skip


def with_scores(inner: Any, per: Any, family: str = "llama", closed: tuple[str, ...] = ()) -> tuple[AdaptedModel, Adapter]:
    """An excited adapter, in which the scores whose names begin as one of `closed` are below the threshold. "" closes all."""
    model = AdaptedModel(tiny(family), inputs=INPUTS)
    adapter = model.add_adapter("one", {"bridge": Bridge(kind="linear"), "taps": Selected(inner=inner, per=per)}).double()
    excite(adapter)
    adapter.float().double()  # what a folder in float32 can hold
    with torch.no_grad():
        for name, module in adapter.named_modules():
            if isinstance(module, Score):
                module.value.fill_(0.0 if name.removeprefix("taps.scores.").startswith(closed) else 0.2)
    return model, adapter


def loaded(folder: Path) -> AdaptedModel:
    model = AdaptedModel(tiny("llama"), inputs=INPUTS)
    model.load_adapter(folder, "one")
    return model.double().eval()


def logits(model: AdaptedModel) -> Tensor:
    ids, domain, mask = rows()
    bound = token_map(domain)
    with model.attachment.bind(bound), torch.no_grad():
        return run(model.base, ids, mask)


@pytest.mark.parametrize("name", [name for name in INNER if name != "epalm"])  # whose slot stays in the row
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_closed_is_the_frozen_model_bit_for_bit_and_runs_no_edit(family: str, name: str) -> None:
    model, adapter = with_scores(INNER[name], "layer", family, closed=("",))
    alone = AdaptedModel(tiny(family), inputs=INPUTS)
    alone.add_adapter("one", {"bridge": Bridge(kind="linear")}).double().load_state_dict(adapter.state_dict(), strict=False)
    frozen = logits(alone)
    runs: list[str] = []
    edits: Any = [one.edit.edit for one in adapter.placements if isinstance(one.edit, SelectedEdit)]
    for edit in edits:
        edit.register_forward_hook(lambda *_: runs.append("run"))
    model.train()
    assert torch.equal(logits(model), frozen)
    assert len(runs) >= len(edits)  # its score learns
    runs.clear()
    model.eval()
    assert torch.equal(logits(model), frozen)
    assert not runs
    with torch.no_grad():
        next(module for module in adapter.modules() if isinstance(module, Score)).value.fill_(0.2)
    assert not torch.allclose(logits(model), frozen)  # control
    assert runs


@pytest.mark.parametrize(
    ("per", "closed"),
    [("layer", ("0", "other")), ("group", ("0.image", "1.text")), ("placement", ("image.0", "shared.1", "all.1", "1", "text"))],
)
@pytest.mark.parametrize("name", INNER)
def test_a_folder_has_the_open_edits_and_gives_the_same_bits_without_gates(
    name: str, per: str, closed: tuple[str, ...], tmp_path: Path
) -> None:
    model, adapter = with_scores(INNER[name], per, closed=closed)
    model.eval().save_pretrained(tmp_path)
    method: Any = read_config(tmp_path).methods["taps"]
    again = loaded(tmp_path)
    assert torch.equal(logits(again), logits(model))
    found = again.active_adapter()
    assert not any(isinstance(module, Score | SelectedEdit) for module in found.modules())
    assert 0 < len(found.placements) <= len(adapter.placements)
    assert all(value == pytest.approx(0.2) for value in method.scores.values())
    plain = {key.removeprefix("taps.") for key in Adapter({"taps": INNER[name]}, adapter.anatomy).tensors()}
    assert {key.removeprefix("taps.") for key in found.tensors() if key.startswith("taps.")} <= plain  # as the inner method calls them


def test_some_of_each_are_left_out_of_the_file(tmp_path: Path) -> None:
    model, _ = with_scores(LORA, "group", closed=("0.image",))
    model.save_pretrained(tmp_path)
    names = {name for name in stored_names(tmp_path) if name.startswith("taps.")}
    assert not any(name.startswith(("taps.image.0.", "taps.scores")) for name in names)
    assert {name.split(".")[1] + name.split(".")[2] for name in names} == {"image1", "text0", "text1"}
    assert set(read_config(tmp_path).methods["taps"].scores) == {"1.image", "0.text_answer", "1.text_answer"}  # type: ignore[attr-defined]
    assert '"scores"' in (tmp_path / CONFIG_FILE).read_text()


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:  # type: ignore[no-untyped-call]
        return list(file.keys())


def test_what_is_open_goes_to_peft_as_a_lora(tmp_path: Path) -> None:
    model = AdaptedModel(tiny("llama"))
    adapter = model.add_adapter("one", {"taps": Selected(inner=LoRA(rank=2), per="placement"), "ist": IST()})
    excite(adapter)  # some scores are now below the threshold
    with pytest.raises(ConfigError, match="is no LoRA"):
        to_peft(adapter, tiny("llama"), tmp_path / "gates")
    model.save_pretrained(tmp_path / "own")
    again = AdaptedModel.from_pretrained(tiny("llama"), tmp_path / "own")
    to_peft(again.active_adapter(), tiny("llama"), tmp_path / "peft")
    method: Any = again.active_adapter().methods["taps"]
    names = {
        name.removeprefix("model.layers.") for name in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    }
    assert 0 < len(names) < len(adapter.placements)
    assert {(name.split(".")[0], name.split(".")[-1]) for name in names} == {tuple(key.split(".")[1:]) for key in method.scores}


def test_one_tap_in_several_layers_has_a_score_in_each() -> None:
    _, adapter = with_scores(INNER["epalm"], "layer")
    taps = [one for one in adapter.placements if isinstance(one.edit, SelectedEdit)]
    assert len(taps) == 2
    assert len({id(one.edit.scores[0]) for one in taps}) == 2  # type: ignore[union-attr,index]
    assert len({id(one.edit.edit) for one in taps}) == 1  # type: ignore[union-attr,operator]


def test_all_closed_is_an_error_and_an_empty_folder_is_written_only_where_asked(tmp_path: Path) -> None:
    scores = {"0": Score(0.0), "1": Score(0.09)}
    with pytest.raises(
        ConfigError,
        match=r"^all 2 gates of Selected are closed at the end, and nothing of LoRA is left to save: give a smaller weight or rate",
    ):
        Gates(Selected(inner=LORA), scores).end()
    Gates(Selected(inner=LORA, may_be_empty=True), scores).end()
    model, _ = with_scores(LORA, "layer", closed=("",))
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.active_adapter().placements == tuple(one for one in again.active_adapter().placements if one.role.startswith("bridge."))
    assert torch.equal(logits(again), logits(model.eval()))


def test_what_does_not_fit_is_refused() -> None:
    anatomy = Anatomy.read(tiny("llama"), INPUTS)
    for inner in (
        Prompt(length=2),
        Prefix(length=2, form="table"),
        UniPELT(variant="AP", bottleneck=4, prefix_length=2),
    ):
        with pytest.raises(
            ConfigError, match="whose slots stay in the row when it is closed: wrap methods that edit tokens which are there"
        ):
            Adapter({"one": Selected(inner=inner)}, anatomy)
    for fields, message in (
        ({"inner": "lora"}, r"Selected wraps a method, got 'lora': give for instance LoRA"),
        ({"inner": Selected(inner=LORA)}, r"Selected wraps Selected, which has a schedule of its own"),
        ({"threshold": 0.0}, r"threshold is 0.0 and its score 0.15: no gate would ever close"),
        ({"score": 0.05}, r"threshold is 0.1 and its score 0.05: nothing would train at the start"),
        ({"weight": -1.0}, r"weight is -1.0, rate 0.5 and warmup 0: give a positive rate, and 0 or more for the others"),
        ({"weight": float("nan")}, r"weight is nan"),
        ({"rate": 0.0}, r"rate 0.0"),
        ({"warmup": -1}, r"warmup -1"),
        ({"per": "head"}, r"per is 'head'"),
        ({"step": "newton"}, r"step 'newton'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Selected(**{"inner": LORA, **fields})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Gated wraps Selected, which has a schedule"):
        Gated(inner=Selected(inner=LORA))
    with pytest.raises(ConfigError, match="warmup is 10 steps, and the run has 10: give fewer, or the penalty never begins"):
        Gates(Selected(inner=LORA, warmup=10), {"0": Score(0.15)}).begin(10, 0)
    with pytest.raises(AttachError, match="edits no hidden state of this model, so there is nothing to choose"):
        Adapter({"one": Selected(inner=Hidden())}, anatomy)
