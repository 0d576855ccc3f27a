"""What adapters cost: AdaLink on a forward pass, eight adapters in one batch, and a whole training step beside bare matrix products."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adalink import IMAGE, TEXT, AdaLink, Adapter, Anatomy, Bridge, Method, TokenMap, attach
from tasks.bench.clock import alternate
from tasks.bench.composed import Work, as_batch, composed, drawn_tower, encoded
from tasks.bench.finding import Finding
from tasks.bench.shapes import Machine, Shape, language
from tasks.bench.sides import arrange_of, our_step
from tasks.bench.sizes import Bench

__all__ = ["adapters"]

N_ADAPTERS = 8
COST, MIXED, SHARE = 1.02, 1.05, 0.75
MORE = 3  # turns for a difference of a few percent
ADALINK: Mapping[str, Method] = {"adalink": AdaLink(rank=16, modalities=("image", "text"))}


def adapters(bench: Bench) -> Iterator[Finding]:
    """On the last language model: small differences on pictures of the first size and in more turns, the step on those of the last."""
    shape, first, last = bench.sizes.models[-1], bench.sizes.captions[0].work, bench.sizes.captions[-1].work
    yield _forward(bench, shape, first)
    yield _mixed(bench, shape, first)
    yield _share(bench, shape, last)


def _forward(bench: Bench, shape: Shape, work: Work) -> Finding:
    """The head reads one token: what it costs would hide what the edits do."""
    machine = bench.machine
    plain: Any = language(shape, machine).model
    ids, domain = _rows(work, machine, work.n_texts)
    adapted = _adapted(shape, machine, 1)
    token_map = TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64, device=machine.device), serving=frozenset({0}))
    what = f"{shape.name}: a forward pass with AdaLink on image and text, times the frozen model's"
    return _cost(bench, what, COST, ids, lambda: adapted(ids, token_map), lambda: _first(plain, ids))


def _mixed(bench: Bench, shape: Shape, work: Work) -> Finding:
    machine = bench.machine
    ids, domain = _rows(work, machine, N_ADAPTERS)
    adapted = _adapted(shape, machine, N_ADAPTERS)
    every = TokenMap(domain, torch.arange(N_ADAPTERS, device=machine.device), serving=frozenset(range(N_ADAPTERS)))
    one = TokenMap(domain, torch.zeros_like(every.row), serving=frozenset({0}))
    what = f"{shape.name}: a batch that mixes {N_ADAPTERS} AdaLinks, times a batch with one"
    return _cost(bench, what, MIXED, ids, lambda: adapted(ids, every), lambda: adapted(ids, one))


def _cost(bench: Bench, what: str, target: float, ids: Tensor, costly: Callable[[], float], plain: Callable[[], float]) -> Finding:
    """How many times as long the costly side takes on rows of tokens, which is at most the target."""
    with torch.no_grad():
        turns = alternate({"costly": costly, "plain": plain}, MORE * bench.repetitions, bench.machine.device, bench.machine.dtype)
    ms = f"{1000 * turns.median('costly'):.0f} ms against {1000 * turns.median('plain'):.0f} ms"
    return Finding(
        part="adapters",
        what=what,
        ratios=turns.ratios("costly", "plain"),
        target=target,
        sense="at most",
        detail=f"{ms}, {len(ids)} rows of {ids.shape[1]} tokens",
    )


def _share(bench: Bench, shape: Shape, work: Work) -> Finding:
    """The products of the frozen weights alone are counted, forward and for the gradient of their inputs; attention is not."""
    machine = bench.machine
    model = composed(shape, machine, drawn_tower(work.n_patches), {"bridge": Bridge(kind="linear", norm="none"), **ADALINK})
    features = work.features(machine)
    batch = as_batch(encoded(model, work), features, arrange_of(model))
    anatomy, config = model.adapted.anatomy, model.language.model.config
    n_layers = sum(linear.n_in * linear.n_out for linear in anatomy.linears)
    operations = 4 * (batch.ids.numel() * n_layers + batch.n_targets * config.hidden_size * config.vocab_size)
    side = max(work.n_patches, 16) * 8
    left, right = torch.randn(2, side, side, device=machine.device, dtype=machine.dtype)

    def product() -> float:
        torch.mm(left, right)
        return 0.0

    step = our_step(model, work, lambda: features)

    def stepped() -> float:
        step()
        return 0.0

    turns = alternate({"step": stepped, "product": product}, bench.repetitions, machine.device, machine.dtype)
    rates = [operations / seconds for seconds in turns.seconds["step"]]
    own = [2 * side**3 / seconds for seconds in turns.seconds["product"]]
    return Finding(
        part="adapters",
        what=f"{shape.name}, {work.n_patches} image tokens: a training step's rate on the frozen weights, of the rate of one matrix product",
        ratios=tuple(rate / of for rate, of in zip(rates, own, strict=True)),
        target=SHARE,
        detail=f"{statistics.median(rates) / 1e9:.1f} of {statistics.median(own) / 1e9:.1f} GFLOP/s, {operations / 1e9:.0f} GFLOP a step",
    )


def _adapted(shape: Shape, machine: Machine, n_adapters: int) -> Callable[[Tensor, TokenMap], float]:
    """A forward pass of a model with so many AdaLinks attached."""
    model: Any = language(shape, machine).model
    anatomy = Anatomy.read(model)
    attachment = attach(model, *(Adapter(ADALINK, anatomy).to(machine.device) for _ in range(n_adapters)), anatomy=anatomy)

    def forward(ids: Tensor, token_map: TokenMap) -> float:
        with attachment.bind(token_map):
            return _first(model, ids)

    return forward


def _rows(work: Work, machine: Machine, n_rows: int) -> tuple[Tensor, Tensor]:
    """ids and domains of whole rows: a picture, then a text."""
    length = work.n_patches + work.n_prompt + work.n_target
    domain = torch.full((n_rows, length), TEXT, device=machine.device)
    domain[:, : work.n_patches] = IMAGE
    return torch.randint(4, 100, (n_rows, length), device=machine.device), domain


def _first(model: Any, ids: Tensor) -> float:
    return float(model(ids, logits_to_keep=1, use_cache=False).logits[0, -1, 0])
