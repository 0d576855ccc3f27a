"""A training step of a ladder beside one of LoRA on q and v: what is stored for the backward pass, how long it takes, and an epoch with cached states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from adalink import ANSWER, TEXT, AdaptedModel, Ladder, LoRA, Method, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.tokenize import Row
from multimodal.loss.hidden_states import LayersBeside, LowerStates
from multimodal.loss.language_loss import LanguageLoss
from multimodal.training.prepare import read_beside
from tasks.bench.clock import Finding, Turns, alternate, seconds_on
from tasks.bench.domains import method_step
from tasks.bench.models import OPT_125M, TINY_LLAMA, TINY_OPT, Bench, Machine, Shape, language, learn

__all__ = ["ladder"]

LORA = LoRA(groups={"all": ("all",)}, rank=8, alpha=8, targets=("query", "value"))
N_PROMPT, N_TARGET, N_TEXTS, N_BATCHES = 56, 8, 4, 4  # of a text, of a batch and of an epoch with cached states


def ladder(bench: Bench) -> Iterator[Finding]:
    """Bytes of a step at three depths, bytes and seconds beside LoRA, and a second epoch beside the first."""
    is_tiny = bench.sizes.models[0] is TINY_LLAMA
    width, length, depths = (32, 16, (2, 4)) if is_tiny else (256, 128, (6, 12, 24))
    yield _bytes_by_depth(bench, width, length, depths)
    yield from _beside_lora(bench, _shape(width, 4 if is_tiny else 12), length)
    yield _second_epoch(bench, TINY_OPT if is_tiny else OPT_125M)


def _shape(width: int, n_layers: int) -> Shape:
    """A Llama of a small vocabulary, so that its layers are what a step costs."""
    sizes = {"hidden_size": width, "intermediate_size": {32: 64, 256: 688}[width], "num_hidden_layers": n_layers, "pad_token_id": 0}
    return Shape(name=f"llama of width {width}, {n_layers} layers", config=LlamaConfig(vocab_size=100, num_attention_heads={32: 4, 256: 8}[width], **sizes))


def _texts(machine: Machine, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels and domains of four texts, all of it learnt."""
    ids = torch.randint(4, 100, (4, length), generator=torch.Generator().manual_seed(0)).to(machine.device)
    return ids, ids, torch.full_like(ids, TEXT)


def _stored(shape: Shape, machine: Machine, method: Method, length: int) -> int:
    """Bytes that the backward pass of a step needs: each storage once, without parameters."""
    base: Any = language(shape, machine).model
    adapted = AdaptedModel(base)
    adapter = adapted.add_adapter("one", {"method": method}).to(machine.device)
    weights = {one.untyped_storage().data_ptr() for one in (*base.parameters(), *adapter.parameters())}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids, labels, domain = _texts(machine, length)
    token_map = TokenMap(domain, adapted.rows(len(ids)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), adapted.attachment.bind(token_map):
        loss = base(input_ids=ids, labels=labels, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)


def _bytes_by_depth(bench: Bench, width: int, length: int, depths: Sequence[int]) -> Finding:
    """The same number of rungs, evenly over the layers."""
    found = [_stored(_shape(width, n), bench.machine, Ladder(reduction=4, rungs=tuple(range(0, n, n // depths[0]))), length) for n in depths]
    layers = ", ".join(map(str, depths))
    return Finding(
        part="ladder",
        what=f"{depths[0]} rungs, reduction 4: bytes that a step stores beside {layers} layers, the most times the least",
        ratios=(max(found) / min(found),),
        target=1.0,
        sense="at most",
        detail=" and ".join(f"{one / 2**20:.2f} MiB" for one in found),
    )


def _beside_lora(bench: Bench, shape: Shape, length: int) -> Iterator[Finding]:
    n, machine, is_tiny = shape.config.num_hidden_layers, bench.machine, length < 128
    half = 4 if is_tiny else 8
    ladders = {
        "reduction 4, every layer": (Ladder(reduction=4), 0.50, 0.85),
        f"reduction {half}, every second layer": (Ladder(reduction=half, rungs=tuple(range(1, n, 2))), 0.16, 0.60),
    }
    theirs = _stored(shape, machine, LORA, length)
    for name, (method, bytes_at_most, _) in ladders.items():
        ours = _stored(shape, machine, method, length)
        yield Finding(
            part="ladder", what=f"{shape.name}, {name}: bytes that a step stores, times LoRA's on q and v", ratios=(ours / theirs,),
            target=None if is_tiny else bytes_at_most, sense="at most", detail=f"{ours / 2**20:.1f} MiB against {theirs / 2**20:.1f} MiB",
        )  # fmt: skip
    methods: dict[str, Method] = {"lora": LORA, **{name: method for name, (method, *_) in ladders.items()}}
    sides = {name: method_step(shape, machine, method, *_texts(machine, length)) for name, method in methods.items()}
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype, tolerance=math.inf)
    for name, (_, _, seconds_at_most) in ladders.items():
        yield Finding(
            part="ladder", what=f"{shape.name}, {name}: seconds of a step, times LoRA's on q and v", ratios=turns.ratios(name, "lora"),
            target=None if is_tiny else seconds_at_most, sense="at most",
            detail=f"{1000 * turns.median(name):.0f} ms against {1000 * turns.median('lora'):.0f} ms, 4 texts of {length} tokens",
        )  # fmt: skip


# ----------------------------------------
# What the ladder reads of a text is cached: an epoch after the first runs the ladder alone.


def _second_epoch(bench: Bench, shape: Shape) -> Finding:
    machine = bench.machine
    adapted = AdaptedModel(language(shape, machine).model)
    n = len(adapted.anatomy.layers)
    adapter = adapted.add_adapter("one", Ladder(reduction=4 if shape is TINY_OPT else 8, rungs=tuple(range(1, n, 2)))).to(machine.device)
    loss, batches = LanguageLoss(adapted), [_batch(shape.config.vocab_size, seed, machine) for seed in range(N_BATCHES)]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)

    def epoch() -> float:
        started = seconds_on(machine.device)
        for batch in batches:
            learn(loss(batch, TokenMap(batch.domain, adapted.rows(len(batch.ids)))) / batch.n_targets, optimizer)
        return seconds_on(machine.device) - started

    below = LayersBeside(adapted, read_beside(adapted.anatomy, adapter))
    found: list[tuple[float, float, float]] = []
    for _ in range(1 + bench.repetitions):
        loss.lower = None
        plain = epoch()
        loss.lower = LowerStates(below, int(adapted.rows(1)), most=2**40)
        found.append((plain, epoch(), epoch()))
    turns = Turns(seconds=dict(zip(("plain", "first", "second"), zip(*found[1:], strict=True), strict=True)))
    return Finding(
        part="ladder",
        what=f"{shape.name}, text, every second layer: an epoch with cached states, faster than the one that caches them",
        ratios=turns.ratios("first", "second"),
        target=None if shape is TINY_OPT else 3.0,
        detail=f"{1000 * turns.median('first') / N_BATCHES:.0f} ms against {1000 * turns.median('second') / N_BATCHES:.0f} ms a step "
        f"({1000 * turns.median('plain') / N_BATCHES:.0f} ms where nothing is cached), "
        f"{N_TEXTS} texts of {N_PROMPT + N_TARGET} tokens, {N_TARGET} of them learnt",
    )


def _batch(vocabulary: int, seed: int, machine: Machine) -> Batch:
    ids = torch.randint(4, vocabulary, (N_TEXTS, N_PROMPT + N_TARGET), generator=torch.Generator().manual_seed(seed)).tolist()
    source = tuple(range(N_PROMPT - 1, N_PROMPT + N_TARGET - 1))
    rows = [Row(tuple(row[:-1]), (TEXT,) * N_PROMPT + (ANSWER,) * (N_TARGET - 1), source, tuple(row[-N_TARGET:])) for row in ids]
    return collate(rows, [0] * len(rows), torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(machine.device)
