"""An adapter's folder as one vector, and a vector as a folder: what every operation on saved adapters reads and writes.

    flat = read_flat("runs/a/adapter")
    write_derived(Path("half"), read_config(Path("runs/a/adapter")), flat.over(flat.vector / 2), derived_from("halve", {"runs/a/adapter": flat}, {}))
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalink.attachment.modules_to_save import copied
from adalink.checkpoint.folder import AdapterConfig, load_weights, local_folder, read_config, stored_tensors, write_adapter
from adalink.checkpoint.start import digest_of, redrawn
from adalink.edit import COPIES, Adapter
from adalink.errors import CheckpointError, ConfigError
from adalink.files import new_folder
from adalink.lifecycle.stack import check_settings
from adalink.model import AdaptedModel

__all__ = ["Flat", "begin_with", "check_alike", "derived_from", "fix_method", "parts_beside", "read_flat", "start_of", "write_derived"]

BESIDE = {"vision": "an adapted encoder", "connector": "an adapted connector", "answer_head.safetensors": "an answer head"}


@dataclass(frozen=True)
class Flat:
    """An adapter's tensors as one vector.

    names   of the tensors, sorted
    shapes  of each
    dtypes  of each, which `tensors` restores
    vector  float64 [P]: the tensors in this order, each flattened
    digest  16 hex digits of the tensors that it was made of (`digest_of`); empty for a vector that was computed
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    vector: Tensor
    digest: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Flat:
        """The tensors of an adapter by name."""
        names = tuple(sorted(tensors))
        values = [tensors[name].detach().cpu() for name in names]
        vector = torch.cat([value.double().flatten() for value in values]) if values else torch.zeros(0, dtype=torch.float64)
        return cls(names, tuple(tuple(value.shape) for value in values), tuple(value.dtype for value in values), vector, digest_of(tensors))

    def over(self, vector: Tensor) -> Flat:
        """Another vector [P] of the same tensors. Raises ConfigError for one of another length."""
        if vector.shape != self.vector.shape:
            raise ConfigError(f"a vector of {vector.numel():,} numbers was given for tensors of {self.vector.numel():,}: give as many")
        return dataclasses.replace(self, vector=vector.double(), digest="")

    def parts(self) -> dict[str, slice]:
        """Tensor name -> where its numbers lie in the vector."""
        sizes, end = [prod(shape) for shape in self.shapes], 0
        return {name: slice((end := end + size) - size, end) for name, size in zip(self.names, sizes, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in its own shape and dtype."""
        values = self.vector.split([prod(shape) for shape in self.shapes])
        described = zip(self.names, values, self.shapes, self.dtypes, strict=True)
        return {name: value.reshape(shape).to(dtype) for name, value, shape, dtype in described}


def read_flat(folder: str | Path, frozen: AdaptedModel | None = None) -> Flat:
    """The weights of an adapter folder or hub name. Warns where they are not those that its config has the digest of.

    frozen: the frozen model that it was trained on, which a compressed folder is read with.
    Raises CheckpointError where it is damaged, or holds tensors of no method of its config, or values that are not finite.
    """
    path = local_folder(folder)
    config = read_config(path)
    file, stored = stored_tensors(path, None if frozen is None else _new(config, frozen))
    known = {*config.methods, *([COPIES] if config.modules_to_save else [])}
    if {name.split(".", 1)[0] for name in stored} != known:
        unknown = sorted(name for name in stored if name.split(".", 1)[0] not in known)
        missing = sorted(known - {name.split(".", 1)[0] for name in stored})
        raise CheckpointError(f"{file} does not fit its config: no tensor of {missing or 'nothing'} is there, unknown are {unknown or 'none'}")
    if broken := next((name for name, value in sorted(stored.items()) if not value.isfinite().all()), None):
        raise CheckpointError(f"{file}: {broken} holds values that are not finite: train it again, or take an earlier checkpoint")
    flat = Flat.of(stored)
    if config.weights and config.weights != flat.digest:
        warnings.warn(f"the weights in {folder} have the digest {flat.digest}, and its config names {config.weights}: was the file changed?", stacklevel=2)
    return flat


def start_of(folder: str | Path, frozen: AdaptedModel, states: tuple[Tensor, ...] = ()) -> Flat:
    """The weights that an adapter folder's adapter started from, drawn again on its frozen model; in the dtypes of the folder.

    frozen  the frozen model that it was trained on; which adapters it has does not matter
    states  of torch's generator, to try where the seed alone gives another start (`adalink.checkpoint.start.redrawn`)

    Raises CheckpointError for a folder that names no start, or whose start cannot be drawn again.
    """
    path = local_folder(folder)
    config = read_config(path)
    if config.start is None:
        why = "was made of other adapters" if config.derived else "names no start; it was saved by an earlier version, or its weights were drawn elsewhere"
        raise CheckpointError(f"the adapter in {folder} {why}, so how far its training moved it is not known: use an operation that needs no start")
    try:
        adapter = redrawn(config.start, lambda: _new(config, frozen), states)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    stored = stored_tensors(path, adapter)[1]
    return Flat.of({name: tensor.to(stored[name].dtype) for name, tensor in adapter.tensors().items()})


def _new(config: AdapterConfig, frozen: AdaptedModel) -> Adapter:
    return Adapter(config.methods, frozen.anatomy, copied(frozen.base, frozen.anatomy, config.modules_to_save))


def check_alike(flats: Mapping[str, Flat]) -> None:
    """Raise CheckpointError, by folder, where two adapters do not hold the same tensors in the same shapes."""
    (first, one), *others = flats.items()
    for folder, other in others:
        mine, theirs = (dict(zip(flat.names, flat.shapes, strict=True)) for flat in (one, other))
        if (name := next((name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)), None)) is not None:
            raise CheckpointError(
                f"{name} is {list(mine[name]) if name in mine else 'missing'} in {first} and {list(theirs[name]) if name in theirs else 'missing'} in "
                f"{folder}: give adapters of the same methods and ranks"
            )


def derived_from(verb: str, sources: Mapping[str, Flat], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says that was made of others: the command, their folders, the digests of their weights, and the settings (as JSON)."""
    return {"verb": verb, "sources": list(sources), "digests": [flat.digest for flat in sources.values()], "settings": dict(settings)}


def write_derived(out: Path, config: AdapterConfig, flat: Flat | Mapping[str, Tensor], derived: Mapping[str, Any]) -> None:
    """Write an adapter that was made of others as an ordinary folder, whole or not at all.

    config   of the adapter that it is like; its start stays in it, so one of another shape or start needs `start=None`
    derived  see `derived_from`

    Raises ConfigError where `out` holds something already.
    """
    tensors = flat.tensors() if isinstance(flat, Flat) else flat
    with new_folder(out) as folder:
        write_adapter(folder, tensors, dataclasses.replace(config, derived=derived))


def parts_beside(folder: str | Path) -> list[str]:
    """What an adapter folder holds beside the adapter itself, in words: an adapted encoder, an answer head."""
    return [what for name, what in BESIDE.items() if (local_folder(folder) / name).exists()]


def begin_with(model: AdaptedModel, folder: str | Path) -> None:
    """Give the active adapter the weights of a saved one, whose start is then its own.

    Raises ConfigError where it has other methods, CheckpointError where the saved one is of another base, or damaged.
    """
    path = local_folder(folder)
    config = read_config(path)
    config.check_base(model.parts, str(folder))
    check_settings({"the config": model.active_adapter().methods, str(folder): config.methods}, {})
    load_weights(path, model.active_adapter())
    model.start = config.start


def fix_method(model: AdaptedModel, method: str, folder: str | Path) -> None:
    """Give one method of the active adapter the weights of a saved adapter, and train them no more: no seed gives this start.

    Raises ConfigError where one of them has no such method, or no method is left to train; CheckpointError as `begin_with`.
    """
    adapter, config = model.active_adapter(), read_config(local_folder(folder))
    for owner, methods in (("the config", adapter.methods), (str(folder), config.methods)):
        if method not in methods:
            raise ConfigError(f"the method {method} is to be frozen, and {owner} has {', '.join(methods)}: give methods that both have")
    config.check_base(model.parts, str(folder))
    check_settings({"the config": {method: adapter.methods[method]}, str(folder): {method: config.methods[method]}}, {})
    stored, own = read_flat(folder, model).tensors(), {name: tensor for name, tensor in adapter.tensors().items() if name.startswith(f"{method}.")}
    theirs = {name: tensor for name, tensor in stored.items() if name.startswith(f"{method}.")}
    check_alike({"the config": Flat.of(own), str(folder): Flat.of(theirs)})
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(theirs[name])
    adapter.fix(method)
    model.start = None
    if not any(True for _ in adapter.parameters()):
        raise ConfigError(f"the method {method} is to be frozen, and nothing else is trained: add a method")
