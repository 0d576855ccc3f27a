"""Every method trains on two processes, with DDP and with FSDP2, as it does on one: float64, to 1e-10."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from ranks import Machine
from safetensors.torch import load_file
from torch import Tensor

from adalink import (
    EPALM,
    IA3,
    IST,
    AdaLink,
    AdaLoRA,
    BitFit,
    Bottleneck,
    Bridge,
    DePT,
    Gated,
    HiRA,
    Hyper,
    Ladder,
    LoRA,
    Method,
    Prefix,
    Prompt,
    Selected,
    Sparse,
    SparseDelta,
    UniPELT,
)
from adalink.methods import METHODS

CONTEXTS = {"image": ("image",), "text": ("text",)}
BRIDGE = Bridge(kind="linear")
# A run costs what its start costs, so that methods which can be in one adapter are: each of its weights is compared by name.
ADAPTERS: dict[str, dict[str, Method]] = {
    "inputs": {
        "bridge": Bridge(kind="mlp", boundary="learned"), "adalink": AdaLink(rank=4, modalities=("image", "text"), activation="gelu", bias=True),
        "prompt": Prompt(length=2, init_std=0.5, form="mlp", positions="none"),
    },
    "linears": {"bridge": BRIDGE, "bitfit": BitFit(groups=CONTEXTS), "ia3": IA3(groups=CONTEXTS), "hira": HiRA(groups=CONTEXTS, rank=2), "lora": LoRA(groups={**CONTEXTS, "shared": ("image", "text")}, rank=2, alpha=4)},
    "layers": {"bridge": BRIDGE, "bottleneck": Bottleneck(width=4), "prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6)},
    "places": {"bridge": BRIDGE, "dept": DePT(length=2, rank=2, max_length=4, init_std=0.5, modalities=("text", "image"))},
    "budgets": {
        "bridge": BRIDGE, "adalora": AdaLoRA(groups=CONTEXTS, init_rank=3, target_rank=1, tinit=0, tfinal=1, interval=1),
        "sparse": Sparse(inner=LoRA(groups=CONTEXTS, rank=2), fraction=0.2, silo="group"), "sparse_delta": SparseDelta(groups=CONTEXTS, fraction=0.05),
        "hyper": Hyper(prototypes=("a", "b"), width=2, size=4, contrast=0.0),
        "selected": Selected(inner=Bottleneck(width=4), weight=0.1, may_be_empty=True), "ist": IST(active=0.5, interval=1, sets=2),
    },
    "ladder": {"bridge": BRIDGE, "ladder": Ladder(reduction=2, rungs=(0,))},
    "epalm": {"epalm": EPALM(layers=(0, 1), n_taps=1, connector="per_tap")},
    "gated": {"bridge": BRIDGE, "gated": Gated(inner=LoRA(groups=CONTEXTS, rank=2, alpha=2, targets=("query", "value"), bias="auto"))},
    "unipelt": {"bridge": BRIDGE, "unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)},
}  # fmt: skip
WITH_SCHEDULES = ("budgets",)  # which FSDP2 refuses
STATES: dict[str, Any] = {"methods": {"epalm": EPALM(layers=(1, 2), n_taps=1, connector="per_tap")}, "kept": True, "steps": 3, "states_gib": 0.1}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "OPTDecoderLayer"}


def jobs(folder: Path, **fields: Any) -> list[dict[str, Any]]:
    return [{"folder": folder / name, "methods": methods, "kept": True, "steps": 3, **fields} for name, methods in ADAPTERS.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs: one process with twice the images in a step, two with DDP, two with FSDP2."""
    folder = tmp_path_factory.mktemp("methods")
    one = Machine(folder)
    groups = [
        one.start(1, rank_jobs.several, [*jobs(folder / "alone", batch_size=4), {**STATES, "folder": folder / "alone" / "states", "batch_size": 4}]),
        one.start(2, rank_jobs.several, [*jobs(folder / "ddp"), {**STATES, "folder": folder / "ddp" / "states"}]),
        one.start(2, rank_jobs.sharded, [job for job in jobs(folder / "fsdp") if job["folder"].name not in WITH_SCHEDULES], **FSDP),
    ]
    for group in groups:
        group.ended()
    return folder


def weights(folder: Path, step: int = 3) -> dict[str, Tensor]:
    state = load_file(folder / "checkpoints" / f"step_{step:08d}" / "state.safetensors")
    return {name: value for name, value in state.items() if name.startswith("weight.")}


@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name in ADAPTERS for engine in ("ddp", "fsdp") if (name, engine) not in product(WITH_SCHEDULES, ["fsdp"])])
def test_two_processes_train_every_method_as_one_does(name: str, engine: str, trained: Path) -> None:
    alone, together = weights(trained / "alone" / name), weights(trained / engine / name)
    start = dict(rank_jobs.model(ADAPTERS[name]).adapted.active_adapter().named_parameters())
    assert alone.keys() == together.keys() == {f"weight.{own}" for own in start}
    for own, value in alone.items():
        torch.testing.assert_close(together[own], value, rtol=0, atol=1e-10)
        assert torch.equal(together[own] == 0, value == 0)  # both retain the same, where something is left out
    moved = {own.split(".")[1] for own, value in alone.items() if not torch.equal(value, start[own.removeprefix("weight.")].detach())}
    assert moved == set(ADAPTERS[name]) - {"ist"}  # the control: there is something to differ in


def test_two_processes_that_keep_the_states_of_their_texts_train_as_one_does(trained: Path) -> None:
    alone, together = weights(trained / "alone" / "states"), weights(trained / "ddp" / "states")
    assert alone
    for own, value in alone.items():
        torch.testing.assert_close(together[own], value, rtol=0, atol=1e-10)


def test_every_name_of_methods_is_trained() -> None:
    assert {name for methods in ADAPTERS.values() for name in methods} == METHODS.keys() - {"warp"}  # which writes nothing: its prompt is `prompt`'s
    assert all(METHODS[name] is type(method) for methods in ADAPTERS.values() for name, method in methods.items())
