"""Several saved adapters of one frozen model as one: exactly, as a sum of what they compute, or by the weights, at the size of one.

    merged = merge(["runs/a/adapter", "runs/b/adapter"], MergeSettings(method="stack", weights=(0.7, 0.3)))
    merged.write(Path("merged"))

Where the server may give each row its own adapter (`adapter_names`), that is exact and loses nothing: merge for places that know one adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adalink.checkpoint.compressed import COMPRESSED_FILE
from adalink.checkpoint.fingerprint import differences
from adalink.checkpoint.folder import AdapterConfig, local_folder, read_config
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.flat import Flat, check_alike, parts_beside, read_flat, write_derived
from adalink.lifecycle.stack import TAKEN_UP, check_settings, stacked, truncated
from adalink.lifecycle.vectors import balanced, by_parts, dare_masks, disjoint_mean, elected_signs, rescaled, ties, weighted
from adalink.model import AdaptedModel

__all__ = ["MergeSettings", "Merged", "Merger", "Source", "merge", "read_sources"]

Merger = Literal["stack", "svd", "average", "arithmetic", "ties", "dare", "dare_ties", "pcb"]
OF_FUNCTIONS = ("stack", "svd")
KEEP: Mapping[str, float] = {"ties": 0.2, "pcb": 0.1, "dare": 0.9, "dare_ties": 0.9}
OF_WORDS = frozenset({"task", "prompt", "target", "system", "raw", "generation"})  # of a config's task: they decide no number of the function


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How adapters are merged."""

    method: Merger = "stack"  # stack: exact, ranks add; svd: that, cut to a rank; the others: of weights of one start, at the size of one adapter
    weights: tuple[float, ...] = ()  # one for each adapter; by default 1 / n, and 1 each for arithmetic and pcb
    scale: float = 1.0  # of the merged change, for arithmetic, ties, dare and pcb
    keep: float | None = None  # share of entries that take part: ties 0.2, pcb 0.1, dare 0.9
    scope: Literal["whole", "method", "tensor"] = "whole"  # what ties and pcb compare entries within
    rank: int = 0  # of svd
    seed: int = 0  # of dare

    def __post_init__(self) -> None:
        """Check what a person can get wrong."""
        if self.keep is not None and (self.method not in KEEP or not 0 < self.keep <= 1):
            raise ConfigError(f"keep is {self.keep:g} with the method {self.method}: {', '.join(KEEP)} take a share above 0 and up to 1, the others none")
        if not math.isfinite(self.scale) or (self.scale != 1 and self.method in (*OF_FUNCTIONS, "average")):
            raise ConfigError(f"scale is {self.scale:g} with the method {self.method}: give a number for arithmetic, ties, dare or pcb; others have weights")
        if not all(map(math.isfinite, self.weights)) or (self.weights and self.method in ("ties", "dare_ties")):
            raise ConfigError(f"weights are {list(self.weights)} with the method {self.method}: give numbers, and none for ties, which counts signs")
        if (self.rank > 0) != (self.method == "svd"):
            raise ConfigError(f"rank is {self.rank} with the method {self.method}: svd needs a rank of 1 or more, and no other method has one")
        if self.scope != "whole" and self.method not in ("ties", "pcb"):
            raise ConfigError(f"scope is {self.scope} with the method {self.method}: only ties and pcb compare entries")

    def of(self, n: int) -> tuple[float, ...]:
        """The weight of each of n adapters. Raises ConfigError for another number of weights."""
        if self.weights and len(self.weights) != n:
            raise ConfigError(f"{len(self.weights)} weights were given for {n} adapters: give one for each")
        return self.weights or ((1.0,) * n if self.method in ("arithmetic", "pcb") else (1 / n,) * n)

    def to_json(self, n: int) -> dict[str, Any]:
        """What of it counts, for the folder that is made."""
        retained = {"keep": self.keep or KEEP.get(self.method), "scope": self.scope if self.method in ("ties", "pcb") else None, "rank": self.rank or None}
        seed, scale = self.seed if self.method.startswith("dare") else None, None if self.method in (*OF_FUNCTIONS, "average") else self.scale
        weights = None if self.method in ("ties", "dare_ties") else list(self.of(n))
        found = {"method": self.method, "weights": weights, "scale": scale, **retained, "seed": seed}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """An adapter folder that is merged. name: the folder as it was given, and a mark where it was given before."""

    folder: str
    name: str
    config: AdapterConfig
    flat: Flat


@dataclass(frozen=True)
class Merged:
    """An adapter that was made of others.

    config   of its folder
    tensors  by name, in the dtypes of the first
    derived  what the folder says of where it came from
    dropped  of svd: the share of the products' squared norm that the rank leaves out
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    derived: Mapping[str, Any]
    dropped: float = 0.0

    def write(self, out: Path) -> None:
        """As an ordinary adapter folder, whole or not at all. Raises ConfigError where `out` holds something already."""
        write_derived(out, self.config, self.tensors, self.derived)


def merge(
    folders: Sequence[str | Path],
    settings: MergeSettings,
    *,
    start: Callable[[str], Flat] | None = None,
    frozen: Callable[[str], AdaptedModel] | None = None,
    template_of: str | Path | None = None,
) -> Merged:
    """Merge adapter folders.

    start        the start of a folder (`adalink.lifecycle.flat.start_of`), for arithmetic, ties, dare and pcb
    frozen       the frozen model of a folder, for compressed ones
    template_of  the folder whose words, task and generation settings the merged one takes; the first where none is named

    Raises CheckpointError or ConfigError where they are of other frozen parts, or cannot be merged rightly.
    """
    return _merged(read_sources(folders, frozen), settings, start, str(template_of) if template_of is not None else None)


def read_sources(folders: Sequence[str | Path], frozen: Callable[[str], AdaptedModel] | None = None) -> list[Source]:
    """The folders, each checked to be of the same frozen parts as the first. frozen: the frozen model of a folder, for compressed ones.

    Raises CheckpointError where a folder is damaged, or one is of other frozen parts; ConfigError where one holds more than edits of a language model.
    """
    found: list[Source] = []
    for folder in folders:
        again = sum(source.folder == str(folder) for source in found)
        name = f"{folder} ({again + 1})" if again else str(folder)
        model = frozen(str(folder)) if frozen is not None and (local_folder(folder) / COMPRESSED_FILE).is_file() else None
        found.append(Source(str(folder), name, read_config(local_folder(folder)), read_flat(folder, model)))
        if beside := parts_beside(folder):
            raise ConfigError(f"the adapter in {folder} has {' and '.join(beside)}, which cannot be merged: give adapters of the language model alone")
    for source in found[1:]:
        _check_base(found[0], source)
    return found


def _merged(given: list[Source], settings: MergeSettings, start: Callable[[str], Flat] | None, template_of: str | None) -> Merged:
    if not given or (len(given) == 1 and settings.method not in OF_FUNCTIONS):
        raise ConfigError(f"{'one adapter was' if given else 'no adapters were'} given: there is nothing to merge")
    by_source = dict(zip((source.name for source in given), settings.of(len(given)), strict=True))
    words = next((source.config.task for source in given if source.folder == template_of), None)
    if template_of is not None and words is None:
        raise ConfigError(f"template_of is {template_of}, which is none of the adapters that are merged: give one of {', '.join(by_source)}")
    check_settings({source.name: source.config.methods for source in given}, TAKEN_UP if settings.method in OF_FUNCTIONS else {})
    sources = sorted(given, key=lambda source: source.flat.digest)  # the order in which they are given changes nothing
    weights = [by_source[source.name] for source in sources]
    derived = {
        "verb": "merge", "sources": [source.folder for source in given], "digests": [source.flat.digest for source in given],
        "settings": settings.to_json(len(given)),
    }  # fmt: skip
    config = dataclasses.replace(given[0].config, task=words if words is not None else given[0].config.task, derived=derived)
    if settings.method in OF_FUNCTIONS:
        return _sum(sources, weights, settings, config, derived)
    _check_one_start(given)
    vector = _of_weights(sources, weights, settings, start)
    return Merged(config, given[0].flat.over(vector).tensors(), derived)


def _sum(sources: Sequence[Source], weights: Sequence[float], settings: MergeSettings, config: AdapterConfig, derived: Mapping[str, Any]) -> Merged:
    if copies := next((source for source in sources if source.config.modules_to_save), None):
        raise ConfigError(f"the adapter in {copies.name} has a trained copy of {', '.join(copies.config.modules_to_save)}, and modules do not add up")
    exact = {
        source.name: (source.config.methods, {name: tensor.double() for name, tensor in source.flat.tensors().items()}) for source in sources
    }  # fmt: skip
    parts, dropped = stacked(exact, weights), 0.0
    if settings.method == "svd":
        parts, dropped = truncated(parts, settings.rank)
    methods, tensors = parts
    dtypes = dict(zip(sources[0].flat.names, sources[0].flat.dtypes, strict=True))
    stored = {name: tensor.to(dtypes.get(name, sources[0].flat.dtypes[0])) for name, tensor in tensors.items()}
    is_same = len(sources) == 1 and methods == sources[0].config.methods
    return Merged(dataclasses.replace(config, methods=methods, start=config.start if is_same else None), stored, derived, dropped)


def _of_weights(sources: Sequence[Source], weights: Sequence[float], settings: MergeSettings, start: Callable[[str], Flat] | None) -> Tensor:
    """float64 [P]: the merged weights. Every source has the same start."""
    check_alike({source.name: source.flat for source in sources})
    rows = torch.stack([source.flat.vector for source in sources])
    if settings.method == "average":
        if not math.isclose(sum(weights), 1, abs_tol=1e-9):
            raise ConfigError(f"the weights sum to {sum(weights):g}, and an average needs a sum of 1: give for instance 0.5 0.5, or --method arithmetic")
        return weighted(rows, weights)
    if start is None:
        raise ConfigError(f"{settings.method} needs the start of the adapters: give `start`, which draws it again on their frozen model")
    first = start(sources[0].folder).vector
    tau = rows - first
    if (unmoved := next((source for source, row in zip(sources, tau, strict=True) if not row.any()), None)) is not None:
        raise ConfigError(f"the adapter in {unmoved.name} equals its start: it was not trained, and there is nothing to merge of it")
    return first + settings.scale * _change(tau, weights, settings, sources[0].flat)


def _change(tau: Tensor, weights: Sequence[float], settings: MergeSettings, flat: Flat) -> Tensor:
    """float64 [P]: the merged task vector, of rows [n, P]."""
    if settings.method == "arithmetic":
        return weighted(tau, weights)
    keep = settings.keep or KEEP[settings.method]
    if settings.method in ("dare", "dare_ties"):
        rows = rescaled(tau, dare_masks(tau.shape, keep, settings.seed), keep)
        return weighted(rows, weights) if settings.method == "dare" else disjoint_mean(rows, elected_signs(rows))
    by_name = flat.parts()
    whole, methods = [slice(0, tau.shape[1])], list(dict.fromkeys(name.split(".", 1)[0] for name in by_name))
    spans = {name: [part for key, part in by_name.items() if key.startswith(f"{name}.")] for name in methods}  # neighbours, since names are sorted
    parts = {"whole": whole, "method": [slice(span[0].start, span[-1].stop) for span in spans.values()], "tensor": list(by_name.values())}[settings.scope]
    if settings.method == "ties":
        return by_parts(lambda rows: ties(rows, keep), tau, parts)
    return by_parts(lambda rows: balanced(rows, keep, weights).merged, tau, parts)


def _check_base(one: Source, other: Source) -> None:
    """Raise CheckpointError where two adapters are of other frozen parts, ConfigError where they read other features of them."""
    for role in sorted({*one.config.base, *other.config.base}):
        mine, theirs = one.config.base.get(role), other.config.base.get(role)
        if mine is None or theirs is None or next(differences(mine, theirs), None):
            names = [f"{part.name} ({part.fingerprint})" if part else "none" for part in (mine, theirs)]
            raise CheckpointError(
                f"{one.name} and {other.name} were trained on other {role.replace('_', ' ')}s: {names[0]} and {names[1]}; merge adapters of one base, "
                "or port one first (adalink port)"
            )
    tasks = [{name: value for name, value in source.config.task.items() if name not in OF_WORDS} for source in (one, other)]
    for name in sorted({*tasks[0], *tasks[1]}):
        if tasks[0].get(name) != tasks[1].get(name):
            found = [repr(task.get(name)) for task in tasks]
            raise ConfigError(f"{name} is {found[0]} in {one.name} and {found[1]} in {other.name}: merge adapters that read the same")


def _check_one_start(sources: Sequence[Source]) -> None:
    """Raise CheckpointError unless all adapters name one start."""
    first = sources[0].config.start
    for source in sources:
        start = source.config.start
        if start is None:
            raise CheckpointError(
                f"the adapter in {source.name} names no start (it was saved by an earlier version, or made of others), and weights can only be merged from "
                "one start: use --method stack, or train again"
            )
        if first is not None and start.digest != first.digest:
            fixed = [_fixed(one) for one in (sources[0], source)]
            if fixed[0] and fixed[1] and fixed[0] != fixed[1]:
                raise CheckpointError(f"the frozen halves differ (digests {fixed[0]} and {fixed[1]}): their sums are not exact; use --method stack")
            raise CheckpointError(
                f"the adapters start from different weights (seed {first.seed} and seed {start.seed}): weights can only be merged from one start; "
                "use --method stack, or train with one seed"
            )


def _fixed(source: Source) -> str:
    """The digest of the down projections that were never trained; empty where all were."""
    names = tuple(f"{name}." for name, method in source.config.methods.items() if getattr(method, "frozen_down", False))
    found = {name: tensor for name, tensor in source.flat.tensors().items() if name.startswith(names) and ".down." in name} if names else {}
    return Flat.of(found).digest if found else ""
