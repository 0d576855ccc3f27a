"""Below the lowest edit nothing is kept for a backward pass, and nothing is run a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from shared import covering
from tiny import INPUTS, excite, rows, run, tiny, token_map
from torch import Tensor

from adalink import EPALM, IA3, AdaLink, Adapter, Anatomy, Attachment, BitFit, Bridge, LoRA, Port, Prefix, Prompt, attach
from adalink.attachment.slots import lowest_edit

N_LAYERS = 4
ALL = {"all": ("all",)}
DECODERS = ("llama", "opt", "gpt2")


def lora_from(layer: int) -> LoRA:
    return LoRA(groups=ALL, rank=2, alpha=2, targets=("query", "value"), exclude_layers=tuple(range(layer)))


# What is attached, and the layer that holds its lowest edit; -1 for the embedding, which is below all layers.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "adalink": ({"adalink": AdaLink(rank=2, modalities=("text",))}, -1),
    "bridge": ({"bridge": Bridge(kind="linear")}, -1),
    "prompt": ({"prompt": Prompt(length=2, init_std=0.5)}, -1),
    "prefix": ({"prefix": Prefix(length=2, form="table", init_std=0.5)}, 0),
    "lora": ({"lora": lora_from(0)}, 0),
    "lora from layer 1": ({"lora": lora_from(1)}, 1),
    "lora in the last layer": ({"lora": lora_from(3)}, 3),
    "ia3 in the last layers": ({"ia3": IA3(groups=ALL, exclude_layers=(0, 1))}, 2),
    "bitfit in the last layer": ({"bitfit": BitFit(groups=ALL, force_bias=True, exclude_layers=(0, 1, 2))}, 3),
    "epalm in deep layers": ({"epalm": EPALM(layers=(2, 4), n_taps=2, connector="shared")}, 2),
    "epalm in the last layer": ({"epalm": EPALM(layers=(3, 4), n_taps=1, connector="shared")}, 3),
    "a deep one and a deeper one": ({"lora": lora_from(3), "epalm": EPALM(layers=(2, 3), n_taps=1, connector="shared")}, 2),
    "a deep one beside the embedding's": ({"lora": lora_from(3), "adalink": AdaLink(rank=2, modalities=("text",))}, -1),
}


@dataclass
class Work:
    """What a forward and a backward pass did in each layer; -1 stands for all that ran outside of the layers."""

    retained: Counter[int]
    runs: Counter[int]
    results: list[Tensor]


@contextmanager
def watched(attachment: Attachment, work: Work) -> Iterator[None]:
    """Count what autograd keeps while a layer runs, and how often its attention runs. What is a weight of the model costs nothing to keep."""
    at = [-1]
    own = {parameter.data_ptr() for parameter in attachment.model.parameters()}
    handles = []

    def enter(layer: int, *_: object) -> None:
        at[0] = layer

    def leave(*_: object) -> None:
        at[0] = -1

    def ran(layer: int, *_: object) -> None:
        work.runs[layer] += 1

    for number, name in enumerate(attachment.anatomy.layers):
        layer = attachment.stack.get_submodule(name)
        handles += [layer.register_forward_pre_hook(partial(enter, number), prepend=True), layer.register_forward_hook(leave)]
        projection = attachment.stack.get_submodule(attachment.anatomy.projections[number].query.linear)
        handles.append(projection.register_forward_pre_hook(partial(ran, number)))

    def keep(tensor: Tensor) -> Tensor:
        work.retained[at[0]] += tensor.data_ptr() not in own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    for handle in handles[::3] + handles[1::3]:
        handle.remove()


def done(family: str, methods: dict[str, Any], *, checkpointed: bool) -> Work:
    """One training step's work, with loss and gradients."""
    model = tiny(family, n_layers=N_LAYERS)
    adapter = Adapter(methods, Anatomy.read(model, INPUTS)).double()
    excite(adapter)
    attachment = attach(model, adapter, anatomy=Anatomy.read(model, INPUTS))
    if checkpointed:
        attachment.checkpoint_layers()
    ids, domain, mask = rows()
    work = Work(Counter(), Counter(), [])
    with attachment.bind(token_map(domain)):
        if checkpointed:  # its own hooks keep what it needs; only what is run again is counted
            with watched(attachment, Work(Counter(), work.runs, [])):
                loss = run(model, ids, mask).square().mean()
        else:
            with watched(attachment, work):
                loss = run(model, ids, mask).square().mean()
    work.results = [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]
    return work


@pytest.mark.parametrize(("case", "family"), covering(product(CASES, DECODERS), each=1, shift=0))
def test_nothing_is_kept_below_the_lowest_edit(family: str, case: str) -> None:
    methods, lowest = CASES[case]
    work = done(family, methods, checkpointed=False)
    assert {layer for layer in range(N_LAYERS) if work.retained[layer]} == set(range(max(lowest, 0), N_LAYERS))
    assert work.runs == Counter(range(N_LAYERS))
    if lowest >= 0:
        before = done(family, {"adalink": AdaLink(rank=2, modalities=("text",))}, checkpointed=False)
        assert work.retained[-1] < before.retained[-1]  # nothing at the embedding either, only around the head


@pytest.mark.parametrize(("case", "family"), covering(product(CASES, DECODERS), each=1, shift=1))
def test_checkpointing_runs_no_layer_below_the_lowest_edit_again(family: str, case: str) -> None:
    methods, lowest = CASES[case]
    plain, again = done(family, methods, checkpointed=False), done(family, methods, checkpointed=True)
    assert again.runs == Counter({layer: 2 if layer >= lowest else 1 for layer in range(N_LAYERS)})
    assert all(torch.equal(a, b) for a, b in zip(plain.results, again.results, strict=True))


@pytest.mark.parametrize(("case", "family"), covering(product(CASES, DECODERS), each=1, shift=2))
def test_the_lowest_edit_is_known_before_anything_runs(family: str, case: str) -> None:
    methods, lowest = CASES[case]
    anatomy = Anatomy.read(tiny(family, n_layers=N_LAYERS), INPUTS)
    found, placement = lowest_edit(anatomy, Adapter(methods, anatomy))
    assert found == lowest
    assert placement.role.split(".")[0] in methods


def test_an_edit_above_the_layers_is_told_by_their_number() -> None:
    anatomy = Anatomy.read(tiny("opt", n_layers=N_LAYERS), INPUTS)
    adapter = Adapter({"adalink": AdaLink(rank=2, modalities=("text",))}, anatomy)
    assert anatomy.final_norm is not None
    adapter.placements = tuple(replace(placement, port=Port(anatomy.final_norm, "output")) for placement in adapter.placements)
    assert lowest_edit(anatomy, adapter)[0] == N_LAYERS
