"""A training step of methods by token domain beside one of peft's LoRA, on the same rows: what a second group of weights costs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adalink import ANSWER, IA3, IMAGE, TEXT, Adapter, Anatomy, BitFit, LoRA, Method, TokenMap, attach
from tasks.bench.clock import Finding, alternate
from tasks.bench.models import ALPHA, IGNORED, Bench, Machine, Shape, Step, Work, check_peft, language, learn

__all__ = ["lora", "method_step"]

RANK = 8
TWO = {"image": ("image",), "text": ("text",)}
METHODS: Mapping[str, tuple[Method, float | None]] = {  # with the target: at most this many times peft's step
    "LoRA by two domains": (LoRA(groups=TWO, rank=RANK, alpha=ALPHA), 1.0),
    "one LoRA": (LoRA(rank=RANK, alpha=ALPHA), None),
    "BitFit by two domains": (BitFit(groups=TWO, force_bias=True), None),
    "IA3 by two domains": (IA3(groups=TWO), None),
}


def lora(bench: Bench) -> Iterator[Finding]:
    """On the first language model, all linears of its layers. Raises ConfigError without peft."""
    check_peft()
    shape, machine = bench.sizes.models[0], bench.machine
    work = replace(bench.sizes.captions[0].work, n_images=1)
    ids, labels, domain = _rows(work, machine)
    sides = {"peft": _their_step(shape, machine, ids, labels)}
    sides |= {name: method_step(shape, machine, method, ids, labels, domain) for name, (method, _) in METHODS.items()}
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype)
    del sides
    gc.collect()  # hooks and modules hold each other
    for name, (_, target) in METHODS.items():
        yield Finding(
            part="lora",
            what=f"{shape.name}, {name}, all linears: a training step, times that of peft's one LoRA",
            ratios=turns.ratios(name, "peft"),
            target=target,
            sense="at most",
            detail=f"{1000 * turns.median(name):.0f} ms against {1000 * turns.median('peft'):.0f} ms, {len(ids)} rows of {ids.shape[1]} tokens",
        )


def _rows(work: Work, machine: Machine) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels and domains of whole rows: an image, then a text, of which the last tokens are learnt."""
    shape = (work.n_texts, work.n_patches + work.n_prompt + work.n_target)
    ids = torch.randint(4, 100, shape, generator=torch.Generator().manual_seed(0)).to(machine.device)
    domain, labels = torch.full_like(ids, TEXT), torch.full_like(ids, IGNORED)
    domain[:, : work.n_patches] = IMAGE
    domain[:, -work.n_target :] = ANSWER
    labels[:, -work.n_target :] = ids[:, -work.n_target :]
    return ids, labels, domain


def method_step(shape: Shape, machine: Machine, method: Method, ids: Tensor, labels: Tensor, domain: Tensor) -> Step:
    """A training step of one method on rows of ids, labels and domains, int64 [B, T] each."""
    base: Any = language(shape, machine).model
    anatomy = Anatomy.read(base)
    adapter = Adapter({"method": method}, anatomy).to(machine.device)
    attachment = attach(base, adapter, anatomy=anatomy)
    model, optimizer = _compiled(base, machine), _optimizer(adapter)

    def step() -> float:
        token_map = TokenMap(domain, torch.zeros_like(domain[:, 0]), serving=frozenset({0}))
        with attachment.bind(token_map):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        return learn(loss, optimizer)

    return step


def _their_step(shape: Shape, machine: Machine, ids: Tensor, labels: Tensor) -> Step:
    from peft import LoraConfig, get_peft_model  # an extra

    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    base: Any = get_peft_model(language(shape, machine).model, config)
    model, optimizer = _compiled(base, machine), _optimizer(base)
    return lambda: learn(model(input_ids=ids, labels=labels, use_cache=False).loss, optimizer)


def _compiled(model: Any, machine: Machine) -> Any:
    return torch.compile(model) if machine.is_compiled else model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW, as training takes it: the plain one's time is of the number of tensors."""
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=True)
