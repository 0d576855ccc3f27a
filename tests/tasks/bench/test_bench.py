"""`adalink bench` in its tiny size: every row is there, both sides compute the same, and what is refused is refused at once."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cli_run import adalink, refused

from adalink.errors import DataError
from tasks.bench import measurements as scripts
from tasks.bench.clock import Finding, alternate, as_line, needs
from tasks.bench.existing import TINY_LLAVA, TINY_QWEN2_VL, existing_step
from tasks.bench.models import TINY_LLAMA, TINY_OPT, Machine, Shape, Work, drawn_tower, our_model, our_step, their_step

CPU = Machine(device=torch.device("cpu"), dtype=torch.float32)
QUICK = ("--size", "tiny", "--repetitions", "2")
# Rows of a tiny run: what each begins with.
ROWS = {
    "features": ("tiny llama, test_vit", "tiny opt, test_vit"),
    "adapters": (
        "tiny opt: a forward pass with AdaLink",
        "tiny opt: a batch that mixes 8 AdaLinks",
        "tiny opt, 9 image tokens: a training step's rate",
    ),
    "lora": tuple(f"tiny llama, {name}, all linears" for name in ("LoRA by two domains", "one LoRA", "BitFit by two domains", "IA3 by two domains")),
    "ladder": (
        "2 rungs, reduction 4: bytes",
        *(f"llama of width 32, 4 layers, {name}: {unit}" for unit in ("bytes", "seconds") for name in ("reduction 4, every layer", "reduction 4, every second layer")),
        "tiny opt, text, every second layer",
    ),
    "generation": tuple(
        f"tiny llama, 9 image tokens, 5 questions, {end}"
        for end in ("12 new tokens, greedy", "3 new tokens, greedy", "12 new tokens, 3 beams")
    ),
    "shards": ("records of 9 KiB", "JPEGs of 640 x 480"),
    "metrics": ("200 answers", "20 captions"),
}


@pytest.mark.parametrize("part", ROWS)
def test_every_row_of_a_part_is_printed_and_written(part: str, tmp_path: Path) -> None:
    done = adalink("bench", *QUICK, "--only", part, "--out", tmp_path / "found.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["what"].startswith(begin) for row, begin in zip(found["findings"], ROWS[part], strict=True)] == [True] * len(ROWS[part])
    assert {row["part"] for row in found["findings"]} == {part}
    for row in found["findings"]:
        assert row["what"] in done.out
        assert len(row["ratios"]) in (1, 2, 6) or "not measured" in row["detail"]
        assert all(ratio > 0 for ratio in row["ratios"])
    assert "1 thread" in found["where"]["machine"]
    assert "torch" in found["where"]["software"]


CAPTIONS = ("lora, 9 image tokens, captions: faster", "prompt, 9 image tokens, captions: faster", "lora, 9 image tokens, captions: smaller")
QUESTIONS = ("lora, 9 image tokens, questions: faster", "text lora, 9 image tokens, captions: faster")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param((), [*(f"tiny llama, {row}" for row in CAPTIONS + QUESTIONS), *(f"tiny opt, {row}" for row in CAPTIONS)], marks=pytest.mark.slow),
        (("--model", "tiny opt"), [f"tiny opt, {row}" for row in CAPTIONS + QUESTIONS]),
    ],
    ids=["every model, questions on the first", "one model alone"],
)
def test_training_is_measured_against_peft_in_speed_and_memory(asked: tuple[str, ...], expected: list[str], tmp_path: Path) -> None:
    done = adalink("bench", *QUICK, "--only", "training", *asked, "--out", tmp_path / "found.md")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("training")]
    for row in expected:
        assert sum(f"  {row} than peft" in line for line in lines) == 1, row
    table = (tmp_path / "found.md").read_text()
    assert table.count("\n| tiny") == len(lines) == len(expected)


def test_growth_is_drawn(tmp_path: Path) -> None:
    done = adalink("bench", *QUICK[:2], "--repetitions", "1", "--only", "growth", "--plot", tmp_path / "growth.svg")
    assert done.code == 0, done.err
    drawn = ElementTree.parse(tmp_path / "growth.svg").getroot()
    texts = ["".join(node.itertext()) for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"image tokens", "captions an image", "language model", "rank", "ms a caption", "MiB a caption"} <= set(texts)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2 * 2 * 4
    assert done.out.count("\ngrowth") == 7


@pytest.mark.parametrize("taught", ["lora", "prompt", "text lora"])
@pytest.mark.parametrize("shape", [TINY_LLAMA, TINY_OPT], ids=lambda shape: shape.name)
def test_both_sides_learn_the_same_from_the_same(shape, taught) -> None:
    """Three steps, so that gradients and optimizers agree too; text alone has another gradient, so there the first step says it all."""
    work, machine = Work(n_patches=7, n_prompt=4, n_images=2), replace(CPU, dtype=torch.float64)
    model = our_model(shape, machine, drawn_tower(7).double(), taught).double()
    features = work.features(machine)
    ours = our_step(model, work, lambda: features)
    theirs = their_step(model, shape, machine, work, lambda: features.repeat_interleave(5, 0), taught)
    for _ in range(1 if taught == "text lora" else 3):
        assert ours() == pytest.approx(theirs(), rel=1e-6)


def test_sides_that_compute_different_things_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"the sides of one measurement give .*'a': 1.0.*expected the same"):
        alternate({"a": lambda: 1.0, "b": lambda: 1.1}, 1, CPU.device, CPU.dtype)


def test_sides_take_turns_in_both_orders_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def side(name: str) -> Callable[[], float]:
        return lambda: float(called.append(name) or 0)

    turns = alternate({"a": side("a"), "b": side("b")}, 2, CPU.device, CPU.dtype)
    assert "".join(called) == "abab" + "ba"
    assert len(turns.ratios("a", "b")) == 2


def test_seconds_are_of_the_processor_so_that_waiting_costs_nothing() -> None:
    turns = alternate({"waits": lambda: float(time.sleep(0.5) or 0)}, 1, CPU.device, CPU.dtype)
    assert turns.median("waits") < 0.4


def test_memory_above_the_loaded_model_is_the_steps_own() -> None:
    small, large = (needs("peft", TINY_LLAMA, CPU, Work(n_patches=n), "lora", 4, 1) for n in (20, 150))
    assert large.mib > small.mib > 0


def test_a_verdict_says_by_how_much_a_target_is_missed() -> None:
    def found(*ratios: float, target: float | None, sense="at least") -> Finding:
        return Finding(part="p", what="w", ratios=ratios, target=target, sense=sense)

    assert found(2.0, 3.0, 9.0, target=3).outcome == "met"
    assert found(2.7, target=3).outcome == "missed by 10.0 %"
    assert found(1.03, target=1.02, sense="at most").outcome == "missed by 1.0 %"
    assert found(1.0, target=None).outcome == found(target=3).outcome == ""
    assert re.search(r"3 \(2 to 9\) +at least 3 +met +w", as_line(found(2.0, 3.0, 9.0, target=3)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--only", "speed"), r"speed"),
        (("--model", "gpt2"), r"--model is 'gpt2', and --size usual measures llama60, opt125: give one of these, or no --model"),
        (("--repetitions", "0"), r"repetitions is 0: give 1 or more"),
        (("--threads", "0"), r"threads is 0: give 1 or more"),
        (("--out", "found.txt"), r"--out is found.txt: give a file whose name ends in .md or .json"),
        (("--out", "nowhere/found.md"), r"there is no folder nowhere: make it first"),
        (("--plot", "growth.png"), r"--plot is growth.png: give a file whose name ends in .svg"),
        (("--plot", "growth.svg", "--only", "training"), r"--plot draws how the cost grows, and --only training leaves that out"),
        (("--device", "abacus"), r"the device 'abacus' is none: give cpu, cuda or cuda:N"),
        (("--device", "meta"), r"the device 'meta' is not measured"),
        (("--device", "cuda:99"), r"the device 'cuda:99' was asked for, and torch .* finds \d+"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments: tuple[str, ...], expected: str) -> None:
    assert re.search(expected, refused(adalink("bench", *arguments)))


@pytest.mark.parametrize("part", ["training", "features", "growth"])
def test_a_missing_peer_is_told_with_the_command_that_installs_it(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refused(adalink("bench", *QUICK, "--only", part)).endswith("peft, is not installed: pip install 'adalink[bench]'")


@pytest.mark.parametrize("part", ["shards", "metrics"])
def test_parts_that_need_the_repository_say_so_outside_it(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scripts, "FOLDER", tmp_path)
    assert re.search(
        f"the part {part} runs tests/benchmarks/bench_{part}.py.*clone of the repository", refused(adalink("bench", *QUICK, "--only", part))
    )


@pytest.mark.parametrize("shape", [TINY_LLAVA, TINY_QWEN2_VL], ids=lambda shape: shape.name)
def test_models_that_see_already_learn_the_same_on_both_sides(shape: Shape) -> None:
    """Two steps each, whose second loss tells that the gradients were the same."""
    machine, work = Machine(device=torch.device("cpu"), dtype=torch.float32), Work(n_patches=9, n_prompt=8, n_target=3)
    sides = {
        "cached": existing_step("adalink", shape, machine, work),
        "encoded": existing_step("adalink", shape, machine, work, is_encoded=False),
        "peft": existing_step("peft", shape, machine, work),
    }
    losses = {name: (step(), step()) for name, step in sides.items()}
    assert losses["peft"][0] != losses["peft"][1]
    assert losses["cached"] == pytest.approx(losses["peft"], rel=1e-5)
    assert losses["encoded"] == pytest.approx(losses["peft"], rel=1e-5)
