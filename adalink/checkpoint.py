"""Adapter folders: adalink_config.json, adapter_model.safetensors, README.md. Strict, atomic, and bound to their frozen parts.

The config does not have peft's file name, adapter_config.json, since transformers and peft take whatever has it for a folder of peft:
so a folder may hold a model and an adapter of it. Folders written before that are read all the same.

Tensors are named by role (`adalink.image.down.weight`), not by the host's module path. The config holds a fingerprint of each
frozen part; another base is refused with a sentence that names both.
"""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from adalink.as_transformers import EXTRA
from adalink.atomic import write_whole
from adalink.edit import COPIES, Adapter, Method
from adalink.errors import CheckpointError, ConfigError
from adalink.frozen_part import FrozenPart, differences, part_from_json, part_to_json
from adalink.methods import METHODS

__all__ = [
    "CONFIG_FILE", "PEFT_CONFIG_FILE", "WEIGHTS_FILE", "AdapterConfig", "config_to_json", "configs_to_tensor", "is_file_with", "load_weights",
    "read_config", "save_adapter",
]  # fmt: skip

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adalink_config.json", "adapter_model.safetensors", "README.md"
PEFT_CONFIG_FILE = "adapter_config.json"  # peft's; also what CONFIG_FILE was called in earlier versions
TRAINER_FILE = "model.safetensors"  # of a checkpoint of transformers' Trainer: the state dict of the adapted model
CARD_MARK = "library_name: adalink"
FORMAT = 1


@dataclass(frozen=True)
class AdapterConfig:
    """What adalink_config.json holds.

    methods   name in the adapter -> method
    base      role (`language_model`, `encoder`) -> frozen part
    task      what whoever trained it wants to find again: the task's name, its templates
    modules_to_save  dotted names of the frozen model's modules that the adapter has trained copies of
    """

    methods: Mapping[str, Method]
    base: Mapping[str, FrozenPart]
    task: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def check_base(self, present: Mapping[str, FrozenPart], folder: str, *, allow_other_base: bool = False) -> None:
        """Raise CheckpointError, saying what differs, where a frozen part is not the one that the adapter was trained on.

        allow_other_base: for who knows better: what differs is a warning.
        """
        for role, trained_on in self.base.items():
            here, what = present.get(role), role.replace("_", " ")
            found = [f"{trained_on.name} ({trained_on.fingerprint}), but this one is missing"] if here is None else list(differences(trained_on, here))
            if not found:
                continue
            told = f"the adapter in {folder} was trained on the {what} {'; and on the same '.join(found)}"
            if not allow_other_base or here is None:
                raise CheckpointError(
                    f"{told}: load the adapter with the parts it was trained on, or allow this one by name (allow_other_base=True, --allow_other_base)"
                )
            warnings.warn(f"{told}; it is loaded all the same", stacklevel=2)


def save_adapter(folder: Path, adapter: Adapter, config: AdapterConfig) -> None:
    """Write the adapter folder; each file appears whole or not at all, the config last. A README.md that is not an adapter's own stays.

    Raises CheckpointError for a folder that holds an adapter of peft.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_file_with(folder / PEFT_CONFIG_FILE, '"peft_type"'):
        raise CheckpointError(f"{folder} holds an adapter of the peft library, whose {WEIGHTS_FILE} would be overwritten: save to another folder")
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in adapter.named_parameters()}
    write_whole(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    if not (folder / CARD_FILE).exists() or is_file_with(folder / CARD_FILE, CARD_MARK):
        write_whole(folder / CARD_FILE, _card(adapter, config).encode())
    write_whole(folder / CONFIG_FILE, (json.dumps(config_to_json(config), indent=2) + "\n").encode())
    if is_file_with(folder / PEFT_CONFIG_FILE, '"methods"'):
        (folder / PEFT_CONFIG_FILE).unlink()  # an earlier version's


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder, or of a checkpoint of transformers' Trainer.

    Raises CheckpointError where it is missing, damaged, or of another format.
    """
    path = folder / CONFIG_FILE
    try:
        if not path.is_file() and (folder / TRAINER_FILE).is_file() and (found := _trainers(folder)):
            return _config_from_json(found.config, folder / TRAINER_FILE)
        if not path.is_file() and (folder / PEFT_CONFIG_FILE).is_file():
            path = folder / PEFT_CONFIG_FILE
        return _config_from_json(json.loads(path.read_text()), path)
    except OSError:
        raise CheckpointError(f"{folder} is no adapter folder: it has no {CONFIG_FILE} that can be read") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder / TRAINER_FILE} is damaged ({error}): copy or train it again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an adapter config ({error}): was it changed by hand, or cut off?") from None


def load_weights(folder: Path, adapter: Adapter) -> None:
    """Copy the folder's tensors into the adapter. Strict: a missing, unknown or misshapen tensor is a CheckpointError, and nothing is loaded."""
    path = folder / WEIGHTS_FILE
    try:
        if not (folder / CONFIG_FILE).is_file() and (folder / TRAINER_FILE).is_file() and (found := _trainers(folder)):
            path, stored = folder / TRAINER_FILE, found.tensors
        else:
            stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or train it again") from None
    wanted = dict(adapter.named_parameters())
    if set(stored) != set(wanted):
        missing, unknown = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
        raise CheckpointError(f"{path} does not fit its config: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    for name, parameter in wanted.items():
        if stored[name].shape != parameter.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(stored[name].shape)}, and this model needs {tuple(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def config_to_json(config: AdapterConfig) -> dict[str, Any]:
    """A config as plain data."""
    return {
        "format": FORMAT,
        "methods": {name: method_to_json(method) for name, method in config.methods.items()},
        "base": {role: part_to_json(part) for role, part in config.base.items()},
        "task": dict(config.task),
        **({COPIES: list(config.modules_to_save)} if config.modules_to_save else {}),
    }


def configs_to_tensor(configs: Mapping[str, AdapterConfig], active: str | None) -> Tensor:
    """uint8 [N]: the configs of a model's adapters, for its state dict."""
    content = {"active": active, "adapters": {name: config_to_json(config) for name, config in configs.items()}}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def _config_from_json(content: Any, path: Path) -> AdapterConfig:
    if "peft_type" in content:
        raise CheckpointError(f"{path} is of the peft library ({content['peft_type']}): read its folder with adalink.from_peft")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, and this version of adalink reads {FORMAT}: update adalink")
    return AdapterConfig(
        methods={name: method_from_json({"method": None, **method}) for name, method in content["methods"].items()},
        base={role: part_from_json(part) for role, part in content["base"].items()},
        task=content["task"],
        modules_to_save=tuple(content.get(COPIES, ())),
    )


@dataclass(frozen=True)
class _Trainers:
    """The active adapter in a checkpoint of transformers' Trainer."""

    config: Any
    tensors: Mapping[str, Tensor]


def _trainers(folder: Path) -> _Trainers | None:
    """What a model's state dict in the folder says of its active adapter; None where it is some other model's."""
    with safetensors.safe_open(folder / TRAINER_FILE, "pt") as file:  # type: ignore[no-untyped-call]
        names = list(file.keys())
        extra = next((name for name in names if name.rpartition(".")[2] == EXTRA), None)
        if extra is None:
            return None
        content = json.loads(bytes(file.get_tensor(extra).tolist()))
        name = content["active"] or next(iter(content["adapters"]))
        prefix = f"{extra.removesuffix(EXTRA)}adapters.{name}."
        if beside := [each for each in names if not each.startswith(extra.removesuffix(EXTRA))]:
            raise CheckpointError(
                f"{folder} is a checkpoint of a composed model that trained more than its adapter ({beside[0]}, ...): go on from it with Trainer, "
                "and write the whole with save_pretrained"
            )
        tensors = {each.removeprefix(prefix): file.get_tensor(each) for each in names if each.startswith(prefix)}
    return _Trainers(content["adapters"][name], tensors)


def method_to_json(method: Any) -> Any:
    """A method as plain data: its name in METHODS and its fields; wrapped methods inside it likewise."""
    if type(method) not in METHODS.values():
        return list(method) if isinstance(method, tuple) else method
    name = next(name for name, kind in METHODS.items() if kind is type(method))
    return {"method": name, **{f.name: method_to_json(getattr(method, f.name)) for f in dataclasses.fields(method)}}


def method_from_json(content: Any) -> Any:
    """The reverse of `method_to_json`. Raises ConfigError for an unknown method or field."""
    if not isinstance(content, Mapping) or "method" not in content:
        return tuple(content) if isinstance(content, list) else content
    fields = dict(content)
    name = fields.pop("method")
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}: give one of {', '.join(METHODS)}")
    known = set(typing.get_type_hints(METHODS[name]))
    if unknown := sorted(set(fields) - known):
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}: its settings are {', '.join(sorted(known))}")
    required = {f.name for f in dataclasses.fields(METHODS[name]) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(fields)):
        raise ConfigError(f"{name} needs the setting {', '.join(missing)}, which has no default")
    return METHODS[name](**{key: method_from_json(value) for key, value in fields.items()})


def is_file_with(path: Path, mark: str) -> bool:
    """Whether a text file is there and holds the mark."""
    try:
        return mark in path.read_text(errors="replace")
    except OSError:
        return False


def _card(adapter: Adapter, config: AdapterConfig) -> str:
    bases = "".join(f"\n- {part.name}" for part in config.base.values())
    kinds = {name: type(method).__name__ for name, method in config.methods.items()} | {COPIES: f"trained copy of {', '.join(config.modules_to_save)}"}
    rows = "\n".join(f"| {name} | {kinds[name]} | {n:,} |" for name, n in adapter.n_parameters().items())
    task = config.task.get("task", "")
    return f"""---
{CARD_MARK}
base_model:{bases}
tags:
- adalink
- adapter
---
# Adapter{f" for {task}" if task else ""}

Trained with adalink on frozen parts, which are not in this folder: {", ".join(f"{role.replace('_', ' ')} {part.name}" for role, part in config.base.items())}.

| name | method | trained parameters |
|---|---|---|
{rows}
"""
