"""An adapter moved to an updated base (PortLLM, arXiv 2410.10870): its tensors stay, what it is bound to changes, after checks that a loader lacks.

A model whose modules have the same names takes any adapter. What decides whether the adapter means the same there is whether ids are the same words,
images the same pixels, and the table that an edit reads of the same size: each of these is a refusal that names both sides. How far the weights
moved is a table, and says less than a score: see `tasks.evaluation.ported`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalink.attachment.modules_to_save import copied
from adalink.checkpoint.compressed import COMPRESSED_FILE, read_compressed
from adalink.checkpoint.fingerprint import TOLERANCES, FrozenPart
from adalink.checkpoint.folder import CONFIG_FILE, PEFT_CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, is_file_with, read_config, stored_tensors
from adalink.checkpoint.peft_format import from_peft
from adalink.edit import Adapter, weight_of
from adalink.errors import AttachError, CheckpointError, ConfigError
from adalink.lifecycle.flat import parts_beside
from adalink.model import AdaptedModel

__all__ = ["MOST_SCALE", "Base", "Drift", "PortReport", "drift_of", "is_of_peft", "port"]

MOST_SCALE = 2.0  # the root mean square of one embedding table over that of the other
_STRUCTURE = re.compile(r"(^|\.)(num_hidden_layers|num_layers|n_layers?|hidden_size|n_embd|d_model)$")
_WORDS = re.compile(r"(^|\.)vocab_size$")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an adapter stands on.

    words          the token of each id, added and special ones too; {} where the tokenizer is unknown
    ids            the ids of `pad`, `bos`, `eos`, `image`; None where the model has none
    chat_template  of a model that sees already; empty where rows are made without one
    """

    adapted: AdaptedModel
    words: Mapping[int, str] = field(default_factory=dict)
    ids: Mapping[str, int | None] = field(default_factory=dict)
    chat_template: str = ""

    @property
    def part(self) -> FrozenPart:
        """The language model, or all of a model that sees already."""
        return self.adapted.parts["language_model"]

    @property
    def table(self) -> Tensor:
        """[V, D]: the embeddings of real ids, without the rows that a table is padded with."""
        anatomy = self.adapted.anatomy
        weight = _plain(weight_of(self.adapted.base, f"{anatomy.stack}.{anatomy.embedding}.weight".lstrip(".")))
        return weight[: max(self.words, default=len(weight) - 1) + 1]


@dataclass(frozen=True)
class Drift:
    """How far a weight moved: ||W' - W|| / ||W|| in the Frobenius norm, in float64; is_rounding: one is the other in its own dtype."""

    name: str
    relative: float
    is_rounding: bool


@dataclass(frozen=True, kw_only=True)
class PortReport:
    """What was found. checks: sentences, warnings among them; drift: the greatest first, empty without the old base; config: of the ported folder."""

    checks: tuple[str, ...]
    drift: tuple[Drift, ...]
    config: AdapterConfig

    def as_json(self) -> dict[str, Any]:
        """Checks and drift as plain data."""
        return {"checks": list(self.checks), "drift": [dataclasses.asdict(one) for one in self.drift]}


def port(folder: Path, new: Base, *, old: Base | None = None, accept: bool = False) -> PortReport:
    """Check an adapter's folder against a new base; nothing is written.

    old     what it was trained on; without it the folder has to say what is compared
    accept  take embedding tables of other scales

    Raises CheckpointError where the adapter does not fit the new base, or means another thing there; the sentence names both sides.
    """
    config = _config_of_peft(folder, new, old) if is_of_peft(folder) else read_config(folder)
    own = {name: base.adapted._parts(config.modules_to_save) for name, base in (("new", new), ("old", old)) if base is not None}
    if missing := config.base.keys() - own["new"].keys():
        found, here = _listed(config.base), _listed(own["new"])
        raise CheckpointError(f"the adapter in {folder} was trained on {found}, and the new base is {here}: give the {missing.pop()}")
    if old is not None:
        config.check_base(own["old"], str(folder))
    _check_beside(folder, config, own["new"])
    _check_size(folder, config, new, old)
    checks = (
        *_checked_words(config, new, old), *_checked_images(config, new, old), *_checked_scale(new, old, accept=accept), *_settings(config, new, old)
    )  # fmt: skip
    if not is_of_peft(folder):  # whose reader has checked it
        _check_tensors(folder, config, new)
    drift = () if old is None else drift_of(old, new)
    if drift and all(one.is_rounding for one in drift):
        checks = (*checks, "the weights are those of the old model, rounded to another precision at most")
    base = {role: own["new"][role] for role in config.base}
    return PortReport(checks=checks, drift=drift, config=dataclasses.replace(config, base=base))


def drift_of(old: Base, new: Base) -> tuple[Drift, ...]:
    """Of every matrix that both models have, the greatest first; of tables of words the rows of ids that both have."""
    n_words = min(len(old.table), len(new.table))
    was, now = (dict(base.adapted.base.named_parameters(remove_duplicate=False)) for base in (old, new))
    of_words = {id(table.weight) for table in _tables(old.adapted.base)}
    found, seen = [], set()
    for name in was.keys() & now.keys():
        if was[name].dim() < 2 or (pair := (id(was[name]), id(now[name]))) in seen:
            continue
        seen.add(pair)
        before, after = (_plain(weight_of(base.adapted.base, name)) for base in (old, new))
        if id(was[name]) in of_words:
            before, after = before[:n_words], after[:n_words]
        if before.shape == after.shape:
            found.append(_moved(name, before, after))
    return tuple(sorted(found, key=lambda one: (-one.relative, one.name)))


def _tables(model: Any) -> list[Any]:
    """The embedding of words, and the head that gives one score for each of them."""
    return [table for table in (model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()) if table is not None]


def _moved(name: str, before: Tensor, after: Tensor) -> Drift:
    rounded = torch.equal(before.to(after.dtype), after) or torch.equal(before, after.to(before.dtype))
    difference = torch.linalg.vector_norm(after.double() - before.double()) / torch.linalg.vector_norm(before.double())
    return Drift(name, float(difference), rounded)


def _plain(weight: Tensor) -> Tensor:
    """The values of a weight that may be quantised."""
    return weight.dequantize() if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize") else weight.detach()


# ----------------------------------------
# The checks. Each gives sentences, or raises CheckpointError.


def _listed(parts: Mapping[str, FrozenPart]) -> str:
    return " and ".join(f"the {role.replace('_', ' ')} {part.name}" for role, part in parts.items())


def _check_beside(folder: Path, config: AdapterConfig, now: Mapping[str, FrozenPart]) -> None:
    """What is trained inside the part that reads images goes nowhere else."""
    role = "encoder" if "encoder" in config.base else "language_model"
    inside = [what for what in parts_beside(folder) if "head" not in what]
    if inside and config.base[role].fingerprint != now[role].fingerprint:
        raise CheckpointError(
            f"the adapter in {folder} has {' and '.join(inside)} of {config.base[role].name}, which {now[role].name} cannot take: train an adapter on "
            "the new one"
        )


def is_of_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of the peft library."""
    return not (folder / CONFIG_FILE).exists() and is_file_with(folder / PEFT_CONFIG_FILE, '"peft_type"')


def _config_of_peft(folder: Path, new: Base, old: Base | None) -> AdapterConfig:
    """What a folder of peft would say of itself on the old base."""
    if old is None:
        raise CheckpointError(f"{folder} is of the peft library, whose folders name no tokenizer: give the model it was trained on (--old)")
    try:
        return AdapterConfig(from_peft(folder, new.adapted.base).methods, {"language_model": old.part})
    except CheckpointError as error:
        raise CheckpointError(f"the adapter in {folder} has no place in {new.part.name}: {error}") from error


def _check_size(folder: Path, config: AdapterConfig, new: Base, old: Base | None) -> None:
    anatomy, name = new.adapted.anatomy, new.part.name
    size = f"{name} has {len(anatomy.layers)} layers of width {anatomy.width}"
    if old is not None and (was := old.adapted.anatomy) and (len(was.layers), was.width) != (len(anatomy.layers), anatomy.width):
        raise CheckpointError(f"{old.part.name} has {len(was.layers)} layers of width {was.width}, and {size}: train an adapter on the new model")
    known = config.base["language_model"].config
    for setting in filter(_STRUCTURE.search, sorted(known.keys() & new.part.config.keys())):
        if known[setting] != new.part.config[setting]:
            raise CheckpointError(
                f"the adapter in {folder} was trained on a model with {setting} {known[setting]}, and {name} has {new.part.config[setting]}: "
                "train an adapter on the new model"
            )


def _check_tensors(folder: Path, config: AdapterConfig, new: Base) -> None:
    anatomy, name = new.adapted.anatomy, new.part.name
    size = f"{name} has {len(anatomy.layers)} layers of width {anatomy.width}"
    try:
        adapter = Adapter(config.methods, anatomy, copied(new.adapted.base, anatomy, config.modules_to_save))
    except (AttachError, ConfigError) as error:
        raise CheckpointError(f"the adapter in {folder} has no place in {name}: {error}") from error
    is_compressed = not (folder / WEIGHTS_FILE).exists() and (folder / COMPRESSED_FILE).exists()
    found = read_compressed(folder / COMPRESSED_FILE).changes if is_compressed else stored_tensors(folder)[1]
    stored, wanted = ({key: tuple(value.shape) for key, value in tensors.items()} for tensors in (found, adapter.tensors()))
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise CheckpointError(
                f"the adapter in {folder} has {key} of {_size(stored.get(key))}, and on {name} it is of {_size(wanted.get(key))} ({size}): "
                "train an adapter on the new model"
            )


def _size(shape: tuple[int, ...] | None) -> str:
    return "no size" if shape is None else " x ".join(map(str, shape))


def _checked_words(config: AdapterConfig, new: Base, old: Base | None) -> Iterator[str]:
    known, now = config.base["language_model"].tokenizer, new.part.tokenizer
    if old is None or not (old.words and new.words):
        if not known or known != now:
            found = "does not say which tokenizer it was trained with" if not known else "was trained with another tokenizer"
            raise CheckpointError(f"the adapter {found}, and {new.part.name} has {now or 'an unknown one'}: give the model it was trained on (--old)")
        yield "the tokenizer is the same"
        return
    n_rows = old.adapted.anatomy.vocabulary
    words = {token: word for token, word in old.words.items() if token < n_rows}
    other = [token for token in sorted(words) if new.words.get(token) != words[token]]
    if other:
        first = other[0]
        raise CheckpointError(
            f"{len(other):,} of {len(words):,} token ids mean other words in {new.part.name} (first: {first} {words[first]!r} -> {new.words.get(first)!r}): "
            "an adapter's texts would be others there, so train one on the new model"
        )
    more = len(new.words) - len(words)
    yield f"all {len(words):,} token ids mean the same words" + (f"; the new model has {more:,} more" if more > 0 else "")
    for name in sorted(old.ids.keys() | new.ids.keys()):
        if old.ids.get(name) != new.ids.get(name):
            one, two = old.ids.get(name), new.ids.get(name)
            raise CheckpointError(f"the {name} token is {one} in {old.part.name} and {two} in {new.part.name}: give the new model the old id")
    if old.chat_template != new.chat_template:
        templates = f"{old.chat_template[:60]!r} and {new.chat_template[:60]!r}"
        raise CheckpointError(f"{old.part.name} and {new.part.name} have other chat templates ({templates}): give the new model the old one")
    if known and now and known != now:
        yield "warning: the same words have the same ids, and some text is divided into other tokens"


def _checked_images(config: AdapterConfig, new: Base, old: Base | None) -> Iterator[str]:
    """Of the part that reads images: the sizes of its features, and how images are prepared."""
    role = "encoder" if "encoder" in config.base else "language_model"
    was, now = config.base[role], new.adapted.parts[role]
    sketches = {**(old.adapted.parts[role].sketches if old is not None else {}), **was.sketches}
    if role == "encoder" and was.fingerprint != now.fingerprint and not {"pixels", "features"} <= sketches.keys():
        raise CheckpointError(f"the adapter does not say how {was.name} prepares images, so {now.name} cannot be compared with it: give the old parts (--old)")
    if "features" in sketches and sketches["features"].shape != now.sketches["features"].shape:
        one, two = (" x ".join(map(str, shape[1:])) for shape in (sketches["features"].shape, now.sketches["features"].shape))
        raise CheckpointError(f"{was.name} gives {one} features of an image, and {now.name} {two}: train an adapter on the new encoder")
    if "pixels" in sketches:
        differ = sketches["pixels"].difference(now.sketches["pixels"]) > TOLERANCES["pixels"]
        if differ or (role == "encoder" and was.processor and was.processor != now.processor and was.fingerprint == now.fingerprint):
            raise CheckpointError(
                f"{was.name} prepares an image as {sketches['pixels']}, and {now.name} as {now.sketches['pixels']}: give an encoder with the old preprocessing"
            )
        yield f"images are prepared alike ({now.sketches['pixels']})"
    if "features" in sketches and role == "encoder" and was.fingerprint != now.fingerprint:
        yield f"features of a test image differ by {100 * sketches['features'].difference(now.sketches['features']):.1f} % of their range"


def _checked_scale(new: Base, old: Base | None, *, accept: bool) -> Iterator[str]:
    if old is None:
        yield "warning: without the old model, ids of special tokens, the chat template, the embedding table's scale and the drift are not compared"
        return
    was, now = (float(base.table.double().square().mean().sqrt()) for base in (old, new))
    sentence = f"the embedding table of {old.part.name} has a root mean square of {was:.3g}, and that of {new.part.name} of {now:.3g}"
    if max(was, now) > MOST_SCALE * min(was, now):
        if not accept:
            raise CheckpointError(f"{sentence}: edits of inputs are in units of that table, so train an adapter on the new model, or --accept it")
        sentence = f"warning: {sentence}"
    yield sentence


def _settings(config: AdapterConfig, new: Base, old: Base | None) -> Iterator[str]:
    """Warnings: settings that change what the model computes and not what runs."""
    was = old.part.config if old is not None else config.base["language_model"].config
    for name in sorted(was.keys() | new.part.config.keys() if was else ()):
        if not _WORDS.search(name) and was.get(name) != new.part.config.get(name):
            yield f"warning: {name} is {was.get(name)!r} in the old model and {new.part.config.get(name)!r} in the new one"
