"""Effective rank, CKA and drift: planted ones are found, sums over batches equal whole matrices, and the frozen model is read without slots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import Done, adalink, refused, train
from composed import excite
from existing_families import made as existing
from safetensors.torch import load_file
from shared import fixtures
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from adalink import PREFIX, TEXT, AdaptedModel, Bridge, LoRA, Method, Prefix, Prompt, TokenMap
from adalink.errors import DataError
from multimodal.data.feature_cache.encode import PatchTable, encode_all
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample
from multimodal.template import Template
from tasks.captioning import Captioning
from tasks.evaluation.representation import LayerStates, Moments, layer_states, representation
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa

SOURCE = Scenes(split="val", size=5)
WORDS: dict[str, Method] = {"prompt": Prompt(length=2), "lora": LoRA(rank=2)}


def drawn(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(x: Tensor, y: Tensor | None = None, each: int = 7) -> Moments:
    moments = Moments(x.shape[1], y is not None)
    for first in range(0, len(x), each):
        moments.add(x[first : first + each], None if y is None else y[first : first + each])
    return moments


def whole_rank(x: Tensor) -> float:
    values = torch.linalg.svdvals(x)
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def whole_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_sums_over_batches_equal_whole_matrices() -> None:
    x, y = drawn(50, 12, 1) + 3.0, drawn(50, 12, 2)
    y = y + 0.5 * x
    found = summed(x, y)
    assert found.rank == pytest.approx(whole_rank(x), abs=1e-9)
    assert found.host_rank == pytest.approx(whole_rank(y), abs=1e-9)
    assert found.cka == pytest.approx(whole_cka(x, y), abs=1e-9)
    assert found.drift == pytest.approx(float((x - y).norm() / y.norm()), abs=1e-12)
    assert 0.01 < whole_cka(x, y) < 0.99
    few = drawn(5, 12, 3)  # fewer tokens than dimensions
    assert summed(few).rank == pytest.approx(whole_rank(few), abs=1e-9)


def test_rank_and_cka_do_not_change_with_a_rotation_or_a_scale() -> None:
    x, y, turn = drawn(50, 12, 1), drawn(50, 12, 2), torch.linalg.qr(drawn(12, 12, 4))[0]
    plain, turned, other = summed(x, y), summed(3 * x @ turn, y), summed(x * torch.arange(12.0), y)
    assert (turned.rank, turned.cka) == pytest.approx((plain.rank, plain.cka), abs=1e-9)
    assert turned.drift != pytest.approx(plain.drift, abs=0.1)  # which does
    assert abs(other.rank - plain.rank) > 0.1  # the control: no rotation
    same = summed(2 * x @ turn, x)
    assert same.cka == pytest.approx(1, abs=1e-12)
    constant = summed(torch.ones(4, 3, dtype=torch.float64), drawn(4, 3, 1))
    assert (constant.cka, constant.rank) == (None, pytest.approx(1, abs=1e-12))
    assert summed(torch.zeros(4, 3)).rank == 0.0


def test_ranks_are_those_of_the_published_computation() -> None:
    """Planted ones, and those of a tiny OPT with a prefix in its cache and LoRA by hooks, at the start and after two stages."""
    for file in sorted(fixtures("pt_peft").glob("*.json")):
        spec, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
        assert summed(tensors["erank.planted3"].double()).rank == pytest.approx(3, abs=1e-12)
        for name in ("planted3", "any"):
            assert summed(tensors[f"erank.{name}"].double()).rank == pytest.approx(float(tensors[f"erank.{name}.value"]), abs=1e-9)
        last = f"after.{len(spec['stages']) - 1}."
        for at, expected in (("start.", tensors["erank.start"]), (last, tensors["erank.end"])):
            assert ranks_of(spec, tensors, at) == pytest.approx(expected.tolist(), abs=1e-8)
        assert tensors["erank.start"].tolist() != pytest.approx(tensors["erank.end"].tolist(), abs=1e-2)  # the control


def ranks_of(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], at: str) -> list[float]:
    base: Any = OPTForCausalLM(OPTConfig(**spec["config"])).double().eval()
    base.load_state_dict({name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}, strict=False)
    n, ids = spec["prefix_length"], tensors["in.ids"]
    lora = LoRA(rank=spec["rank"], alpha=spec["alpha"], groups={"all": ("all",)}, targets=("query", "value"))
    model = AdaptedModel(base)
    adapter = model.add_adapter("one", {"prefix": Prefix(length=n, form="table"), "lora": lora}).double()
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            matrix, number = ("A" if "down" in name else "B"), [int(part) for part in name.split(".") if part.isdigit()]
            if name.startswith("prefix"):
                weight.copy_(tensors[f"{at}prefix"].permute(2, 0, 1, 3).flatten(1))
            elif f"{at}{matrix}" in tensors:
                weight.copy_(tensors[f"{at}{matrix}"][number[0], int("v_proj" in name)])
    domain = torch.cat([torch.full((len(ids), n), PREFIX), torch.full_like(ids, TEXT)], 1)

    def run() -> None:
        with model.attachment.bind(TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))):
            base(input_ids=nn.functional.pad(ids, (n, 0)), attention_mask=torch.ones_like(domain))

    states = layer_states(model, range(len(tensors["erank.start"])), run)
    return [summed(found[:, n:].flatten(0, 1)).rank for _, found in sorted(states.items())]


def of(model: VisionLanguageModel, task: Any, **options: Any) -> dict[tuple[str, int], LayerStates]:
    patches = options.pop("patches", None) or encode_all(model, SOURCE)
    return {(one.domain, one.layer): one for one in representation(model, SOURCE, task, patches, **options)}


def close(first: Mapping[Any, LayerStates], second: Mapping[Any, LayerStates], near: float = 1e-4) -> bool:
    numbers = [[value for name in ("rank", "host_rank", "cka", "drift") if (value := getattr(one, name)) is not None] for one in (*first.values(), *second.values())]
    half = len(numbers) // 2
    return first.keys() == second.keys() and all(a == pytest.approx(b, rel=near, abs=1e-5) for a, b in zip(numbers[:half], numbers[half:], strict=True))


@pytest.mark.parametrize("kind", ["vqa", "captioning"])
def test_the_frozen_model_is_read_without_the_adapters_slots(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Vqa() if kind == "vqa" else Captioning()
    model = compose("scenes:encoder", "scenes:language", template=task.template)
    model.add_adapter("lora", {"lora": WORDS["lora"]})
    before = torch.get_rng_state(), model.training, [weight.clone() for weight in model.parameters()]
    same = of(model, task)
    assert torch.equal(torch.get_rng_state(), before[0])  # a run that reads states trains as one that does not
    assert model.training == before[1]
    assert all(torch.equal(weight, other) for weight, other in zip(model.parameters(), before[2], strict=True))
    assert {domain for domain, _ in same} == {"text"}
    assert all(one.cka == pytest.approx(1, abs=1e-9) and one.drift == 0 and one.rank == one.host_rank for one in same.values())  # LoRA starts as nothing
    excite(model.adapted.active_adapter())
    moved = of(model, task)
    assert all(one.drift > 0.01 and one.cka < 0.999 for (_, layer), one in moved.items() if layer)  # type: ignore[operator]
    model.add_adapter("all", {"bridge": Bridge(kind="linear"), **WORDS})
    model.set_adapter("all")
    slots = of(model, task)
    assert all(slots["text", layer].host_rank == one.host_rank and slots["text", layer].tokens == one.tokens for (_, layer), one in same.items())
    assert all(one.host_rank is one.cka is one.drift is None for (domain, _), one in slots.items() if domain == "image")
    assert slots["image", 1].tokens == slots["image", 0].tokens == 5 * 5 * model.tower.n_patches  # five texts about each
    assert close(slots, of(model, task, batch_size=2))
    assert not close(slots, moved)
    monkeypatch.setattr("tasks.evaluation.representation.AT_ONCE", 1)  # one layer at a time
    assert of(model, task) == slots


def test_a_model_that_sees_already_has_image_tokens_of_its_own() -> None:
    model = VisionLanguageModel.from_model(*existing("qwen2_vl"), template=Template(prompt="<image>{question}", target="{text}"))
    model.add_adapter("one", WORDS)
    start = of(model, Vqa())
    assert {domain for domain, _ in start} == {"text", "image"}
    assert all(one.cka is not None and one.host_rank is not None for one in start.values())
    assert start["image", 0].drift == pytest.approx(0, abs=1e-6)
    excite(model.adapted.active_adapter())
    assert of(model, Vqa())["image", 2].drift > start["image", 2].drift + 0.01  # type: ignore[operator]


def test_a_model_that_chooses_its_answers_has_states_too() -> None:
    model = compose("scenes:encoder", "scenes:language", template=Vqa().template)
    model.add_adapter("one", {"bridge": Bridge(kind="linear"), "lora": WORDS["lora"]})
    texts = of(model, Vqa())["text", 1].tokens
    model.add_answer_head(["red", "blue", "yes", "no"])
    found = of(model, Vqa())
    assert found["text", 1].tokens < texts


def test_bad_samples_are_left_out_and_all_bad_is_a_sentence() -> None:
    model = compose("scenes:encoder", "scenes:language", template=Vqa().template)
    model.add_adapter("one", {"lora": WORDS["lora"]})
    patches = encode_all(model, SOURCE)
    bad = {i: BadSample(key=str(i), reason="unreadable", detail="") for i in range(5)}
    some = of(model, Vqa(), patches=PatchTable(patches.patches, {0: bad[0]}))
    assert some["text", 0].tokens < of(model, Vqa())["text", 0].tokens
    with pytest.raises(DataError, match=r"^none of the first 2 samples can be read, so the model has no states to compare: give more with `representation`$"):
        of(model, Vqa(), patches=PatchTable(patches.patches, bad), samples=2)


def test_a_run_compares_its_start_and_its_end_and_the_command_finds_the_same(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("captioning", run, "--representation", "3").code == 0
    page = (run / "report.html").read_text()
    assert all(part in page for part in ('id="representation"', "text, layer 4", "CKA, untrained", "drift, trained", 'href="#representation"'))
    stored = json.loads((run / "representation.json").read_text())
    found: Done = adalink("report", "representation", "--adapter", run / "adapter", "--config", run / "config.yaml", "--samples", "3", "--json")
    assert (found.code, json.loads(found.out)) == (0, stored)
    assert stored["untrained"] != stored["trained"]
    again = adalink("evaluate", "--adapter", run / "adapter", "--config", run / "config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again
    assert json.loads((tmp_path / "again" / "representation.json").read_text()) == {"samples": 3, "trained": stored["trained"]}
    table = adalink("report", "representation", "--adapter", run / "adapter", "--data.val.scenes", "val/3")
    assert "rank, frozen  rank, trained  CKA, trained  drift, trained" in table.out
    assert "untrained" not in table.out  # no config says how it began
    for option, message in (("0", "samples is 0, and hidden states are compared on samples"), ("-2", "representation is -2: give a number of samples")):
        assert message in refused(adalink("report", "representation", "--adapter", run / "adapter", "--data.val.scenes", "val/3", "--samples", option))
