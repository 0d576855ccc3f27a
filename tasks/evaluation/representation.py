"""What an adapter does to a model's hidden states: effective rank, linear CKA and drift beside the frozen model, by layer and domain (as in PT-PEFT).

    effective rank   exp of the entropy of singular values divided by their sum (Roy and Vetterli 2007): k for k equal ones, 1 for rank one; not centred
    linear CKA       |X'Y|^2 / (|X'X| |Y'Y|) of centred states (arXiv 1905.00414): 1 where they are the same up to a rotation and a scale
    drift            |X - Y| / |Y|, Frobenius norms

X are the adapted states, one row for each token, and Y the frozen model's at the same tokens of rows without the adapter's slots.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalink import ANSWER, BASE_NAME, IMAGE, TEXT, AdaptedModel, TokenMap
from adalink.attachment.attachment import without_dropout
from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.batches.collate import Batch, collate, stacked
from multimodal.batches.prefix_sharing import calls_of
from multimodal.batches.tokenize import TextTooLong, slots_at
from multimodal.data.inputs import CachedFeatures
from multimodal.loss.answer_head import pooled_state
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample, SampleSource
from multimodal.template import Text
from tasks.task import Task

__all__ = [
    "LayerStates", "Moments", "layer_states", "read_representation", "representation", "representation_json", "representation_rows", "write_representation",
]  # fmt: skip


# ----------------------------------------
# Sums over tokens, from which everything is found: D x D numbers, however many tokens there are.


_ROUNDING = 1e-12  # what is left of states that are alike, as a share of them


class Moments:
    """float64 sums over the tokens of one layer and domain. hosts: whether the frozen model has states there too."""

    def __init__(self, width: int, hosts: bool) -> None:
        sizes = (width, width * hosts, width * hosts)
        self.n, self.moved, self.hosts = 0, 0.0, hosts  # moved: summed squares of x - y
        self.xx, self.yy, self.xy = (torch.zeros(size, size, dtype=torch.float64) for size in sizes)
        self.x, self.y = (torch.zeros(size, dtype=torch.float64) for size in sizes[:2])

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adapted states [n, D], and the frozen model's at the same tokens."""
        x = x.to("cpu", torch.float64)
        self.n += len(x)
        self.xx.addmm_(x.T, x)
        self.x += x.sum(0)
        if y is not None:
            y = y.to("cpu", torch.float64)
            self.yy.addmm_(y.T, y)
            self.xy.addmm_(x.T, y)
            self.y += y.sum(0)
            self.moved += float((x - y).square().sum())

    @property
    def rank(self) -> float:
        """The effective rank of the adapted states."""
        return _effective_rank(self.xx)

    @property
    def host_rank(self) -> float | None:
        """That of the frozen model's."""
        return _effective_rank(self.yy) if self.hosts else None

    @property
    def cka(self) -> float | None:
        """Linear CKA of both; None where one of them is the same at all tokens."""
        if not self.hosts:
            return None
        triples = ((self.xy, self.x, self.y), (self.xx, self.x, self.x), (self.yy, self.y, self.y))
        cross, own, host = (float((whole - torch.outer(a, b) / self.n).norm()) for whole, a, b in triples)
        return cross**2 / (own * host) if own > _ROUNDING * float(self.xx.norm()) and host > _ROUNDING * float(self.yy.norm()) else None

    @property
    def drift(self) -> float | None:
        """The norm of the difference, in the frozen model's norm; None where that is 0."""
        norm = float(self.yy.trace()) if self.hosts else 0.0
        return (self.moved / norm) ** 0.5 if norm else None


def _effective_rank(gram: Tensor) -> float:
    """Of states X, from X'X [D, D]: its eigenvalues are the squares of X's singular values, and those of rounding alone are none."""
    squares = torch.linalg.eigvalsh(gram)
    found = squares[squares > squares[-1] * len(squares) * torch.finfo(torch.float64).eps].sqrt()
    share = found / found.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(found) else 0.0


# ----------------------------------------
# Reading a model: the same rows with the adapter and without, some layers at a time.


DOMAINS: Mapping[str, tuple[int, ...]] = {"text": (TEXT, ANSWER), "image": (IMAGE,)}
AT_ONCE = 2**31  # bytes of sums; the rows are read again for the layers that do not fit


@dataclass(frozen=True, kw_only=True)
class LayerStates:
    """One layer at the tokens of one domain. None: the frozen model has no such tokens, as a composed one has none of images.

    layer      0 is what enters the first layer; the last is after the model's final norm
    rank       effective rank; `host_rank` that of the frozen model
    """

    layer: int
    domain: str
    tokens: int
    rank: float
    host_rank: float | None
    cka: float | None
    drift: float | None


def representation(
    model: VisionLanguageModel, source: SampleSource, task: Task, patches: CachedFeatures, *, samples: int = 64, batch_size: int = 8
) -> tuple[LayerStates, ...]:
    """What the active adapter does to the states of the first samples' texts; the same ones at each call.

    patches: of the source's images. Raises DataError where none of the samples can be read.
    """
    first = range(min(samples, len(source)))
    pairs = (_pair(model, source, task, patches, first[start : start + batch_size]) for start in first[::batch_size])
    batches = [pair for pair in pairs if pair is not None]
    if not batches:
        raise DataError(f"none of the first {samples} samples can be read, so the model has no states to compare: give more with `representation`")
    n_layers, width = len(model.adapted.anatomy.layers) + 1, model.adapted.anatomy.layer_width
    domains = {name: numbers for name, numbers in DOMAINS.items() if any(_at(batch, numbers).any() for batch, _ in batches)}
    at_once = max(1, AT_ONCE // (len(domains) * 3 * 8 * width**2))
    found: list[LayerStates] = []
    for lowest in range(0, n_layers, at_once):
        layers = range(lowest, min(lowest + at_once, n_layers))
        moments: dict[tuple[int, str], Moments] = {}
        for batch, host in batches:
            _add(model, batch, host, layers, domains, moments)
        found += [
            LayerStates(layer=layer, domain=domain, tokens=one.n, rank=one.rank, host_rank=one.host_rank, cka=one.cka, drift=one.drift)
            for (layer, domain), one in moments.items()
        ]
    return tuple(sorted(found, key=lambda one: (list(domains).index(one.domain), one.layer)))


def _pair(model: VisionLanguageModel, source: SampleSource, task: Task, patches: CachedFeatures, indices: Sequence[int]) -> tuple[Batch, Batch | None] | None:
    """The rows of samples as the adapter reads them, and as the frozen model does; None where no sample has any."""
    encoder: Any = model.row_encoder()
    bare = copy.copy(encoder)
    vars(bare).update(slots=slots_at(()), image_slots=0)  # without slots
    rows: list[tuple[Any, int]] = []
    hosts: list[Any] = []
    images: list[Any] = []
    for index in indices:
        seen = patches[index]
        if isinstance(seen, BadSample):
            continue
        sample = source[index]
        with contextlib.suppress(TextTooLong):
            written = task.texts(sample, random.Random(index)) if model.head is None else ()  # one that chooses reads questions alone
            texts: Sequence[Text] = written or [asked.text for asked in task.asked(sample)]
            made = [encoder.row(text, seen if encoder.reads_images else None) for text in texts]
            with contextlib.suppress(ConfigError):  # a prompt that is an image and nothing else
                hosts += [bare.row(text, seen if encoder.reads_images else None) for text in texts]
            rows += [(row, len(images)) for row in made]
            images.append(seen)
    if not rows:
        return None

    def batch(of: Sequence[Any]) -> Batch:
        made = collate(of, [image for _, image in rows], stacked(images), kind=patches.kind, side="right", pad_id=encoder.placeholder)
        return replace(made, shared_prefix=None).to(model.device)

    return batch([row for row, _ in rows]), batch(hosts) if len(hosts) == len(rows) else None


def _at(batch: Batch, domains: Sequence[int]) -> Tensor:
    return torch.isin(batch.domain, torch.tensor(domains, device=batch.domain.device))


def _add(
    model: VisionLanguageModel, batch: Batch, host: Batch | None, layers: Sequence[int], domains: Mapping[str, Sequence[int]],
    moments: dict[tuple[int, str], Moments],
) -> None:  # fmt: skip
    own = _states(model, batch, model.token_map(batch), layers)
    hosted = {} if host is None else _states(model, host, model.token_map(host, [BASE_NAME] * len(host.ids)), layers)
    for name, numbers in domains.items():
        places, there = _at(batch, numbers), None if host is None else _at(host, numbers)
        both = there is not None and int(there.sum()) == int(places.sum())
        for layer in layers:
            x, y = own[layer][places], hosted[layer][there] if both else None
            moments.setdefault((layer, name), Moments(x.shape[1], both)).add(x, y)


def _states(model: VisionLanguageModel, batch: Batch, token_map: TokenMap, layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> float [B, T, D]."""

    def run() -> None:
        if model.head is not None:
            pooled_state(model.adapted, model.language, batch, token_map)
        else:
            (call,) = calls_of(model.adapted, batch, token_map)
            with call.bound(model.adapted):
                model.adapted.base(**call.arguments)

    with without_dropout(model):
        found = layer_states(model.adapted, layers, run)
    return {layer: states.reshape(*batch.domain.shape, -1) for layer, states in found.items()}


@torch.no_grad()
def layer_states(adapted: AdaptedModel, layers: Sequence[int], run: Callable[[], object]) -> dict[int, Tensor]:
    """Layer -> the states that a call of the model gives; `run` makes the call, which ends with the last of these layers. Numbers as in `LayerStates`."""
    stack, names, norm = adapted.attachment.stack, adapted.anatomy.layers, adapted.anatomy.final_norm
    found: dict[int, Tensor] = {}

    def note(layer: int, states: Any) -> None:
        found[layer] = states[0] if isinstance(states, tuple) else states
        if layer == max(layers):
            raise _Done

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        note(0, args[0] if args else kwargs["hidden_states"])

    # They come last at each module, so they are given what edits have made.
    handles = [stack.get_submodule(names[0]).register_forward_pre_hook(enters, with_kwargs=True)] if 0 in layers else []
    for layer in (one for one in layers if one):
        module = stack.get_submodule(norm if norm and layer == len(names) else names[layer - 1])
        handles.append(module.register_forward_hook(lambda module, args, output, layer=layer: note(layer, output)))
    try:
        with contextlib.suppress(_Done):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Done(Exception):
    """All layers that are asked for have run."""


# ----------------------------------------
# The table: in a run's folder, on its page and on the screen.


FILE = "representation.json"


def representation_json(samples: int, moments: Mapping[str, Sequence[LayerStates]]) -> str:
    """As JSON; moments: what the adapter was (`untrained`, `trained`) -> its states."""
    return json.dumps({"samples": samples, **{name: [asdict(one) for one in states] for name, states in moments.items()}}, indent=1)


def write_representation(folder: Path, samples: int, moments: Mapping[str, Sequence[LayerStates]]) -> None:
    """Write representation.json."""
    write_whole(folder / FILE, (representation_json(samples, moments) + "\n").encode())


def read_representation(folder: Path) -> dict[str, list[LayerStates]]:
    """What a run's folder holds of it; nothing where it does not."""
    content = json.loads((folder / FILE).read_text()) if (folder / FILE).exists() else {}
    return {name: [LayerStates(**one) for one in states] for name, states in content.items() if name != "samples"}


def representation_rows(moments: Mapping[str, Sequence[LayerStates]]) -> dict[str, dict[str, float | None]]:
    """Row -> column -> number: a row for each domain and layer, the frozen model's rank first, then each measure of each adapter."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, states in moments.items():
        for one in states:
            row = rows.setdefault(f"{one.domain}, layer {one.layer}", {"rank, frozen": one.host_rank})
            row |= {f"rank, {name}": one.rank, f"CKA, {name}": one.cka, f"drift, {name}": one.drift}
    return rows
