"""Context-PEFT with configurations that the fixtures do not have, against a plain computation: OPT, grouped queries, overlaps, exclusions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
import torch
from context_peft_case import Case
from context_peft_checks import check_generation, check_padding, check_routing, check_training, check_variants
from context_peft_made import make

LINEARS = {"opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "gpt2": ["c_attn", "c_proj", "c_fc"],
           "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip


def lora(kind: str, modalities: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "type": "lora", "modalities": modalities, "messages": None, "exclude_modules": None, "target_modules": LINEARS[kind], "r": 4, "lora_alpha": 8,
        "use_rslora": False, "use_bias": "auto", "scale_multiplier": 1.0, **changes,
    }  # fmt: skip


def bitfit(kind: str, modalities: list[str], **changes: Any) -> dict[str, Any]:
    return {"type": "bitfit", "modalities": modalities, "exclude_modules": None, "target_modules": LINEARS[kind], "force_bias": False, **changes}


def ia3(modalities: list[str], inner: str, **changes: Any) -> dict[str, Any]:
    targets = ["k_proj", "v_proj", inner]
    return {"type": "ia3", "modalities": modalities, "exclude_modules": None, "target_modules": targets, "feedforward_modules": [inner], **changes}


CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "opt_lora_mixed_ranks": ("opt", {"image": lora("opt", ["image"], r=2, scale_multiplier=0.5), "text": lora("opt", ["text"], r=8, lora_alpha=4)}),
    "opt_bitfit_own_biases": ("opt", {"image": bitfit("opt", ["image"]), "both": bitfit("opt", ["image", "text"])}),
    "opt_ia3_overlapping": ("opt", {"image": ia3(["image"], "fc2"), "shared": ia3(["image", "text"], "fc2")}),
    "llama_lora_shared_group": ("llama", {"shared": lora("llama", ["image", "text"], use_rslora=True, use_bias=True)}),
    "llama_lora_differing": (
        "llama",
        {
            "image": lora("llama", ["image"], use_rslora=True, target_modules=["q_proj", "v_proj"]),
            "text": lora("llama", ["text"], exclude_modules=["layers.1"], use_bias=False),
            "shared": lora("llama", ["text", "image"], r=1, exclude_modules=["layers.0.mlp.down_proj"]),
        },
    ),
    "llama_bitfit_forced_and_excluded": ("llama", {"image": bitfit("llama", ["image"], force_bias=True, exclude_modules=["layers.2"])}),
    "llama_ia3_and_lora": ("llama", {"gain": ia3(["image"], "down_proj"), "low": lora("llama", ["text"], target_modules=["q_proj", "up_proj"])}),
    "gpt2_lora": ("gpt2", {"image": lora("gpt2", ["image"]), "text": lora("gpt2", ["text"], r=1)}),
}
FREQUENCIES: dict[str, Literal["rounded", "stored"]] = {"llama_lora_shared_group": "rounded", "llama_ia3_and_lora": "stored"}
CHECKS = (check_routing, check_training, check_padding, check_variants, check_generation)


@cache
def made(name: str) -> Case:
    return make(*CASES[name])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_formulas(name: str, check: Callable[[Case], None]) -> None:
    check(made(name))


@pytest.mark.parametrize("name", FREQUENCIES)
def test_rotary_frequencies_are_those_of_the_file(name: str) -> None:
    case = make(*CASES[name], FREQUENCIES[name])
    assert (case.tensors["out.logits"] - made(name).tensors["out.logits"]).abs().max() > 1e-9  # the control: it matters
    check_training(case)
    check_generation(case)


def test_an_output_that_nobody_compares_is_refused_unless_it_is_for_information() -> None:
    case = made("gpt2_lora")
    check_training(Case(case.spec, {**case.tensors, "out.extra": torch.tensor(3.0)}))
    with pytest.raises(AssertionError, match="outputs that this test does not check: states"):
        check_training(Case(case.spec, {**case.tensors, "out.states": torch.zeros(2, 3)}))


@pytest.mark.parametrize("name", ["out.acc", "out.ppl", "tap.connector_out"])
def test_what_the_trainer_prints_and_the_connector_gives_is_compared(name: str) -> None:
    case = made("gpt2_lora")
    with pytest.raises(AssertionError, match="not close"):
        check_training(Case(case.spec, {**case.tensors, name: case.tensors[name] + 1e-6}))


def test_a_wrong_scale_is_seen() -> None:
    """The control: what is compared can differ."""
    kind, adaptors = CASES["opt_lora_mixed_ranks"]
    case = make(kind, adaptors)
    adaptors = {name: {**a, "lora_alpha": a["lora_alpha"] * 1.001} for name, a in adaptors.items()}
    wrong = Case({**case.spec, "config": {**case.config, "adaptors": adaptors}}, case.tensors)
    with pytest.raises(AssertionError, match="not close"):
        check_training(wrong)
