"""Adapter folders: adalink_config.json, adapter_model.safetensors, README.md. Strict, atomic, and bound to their frozen parts.

The config does not have peft's file name, adapter_config.json, since transformers and peft take whatever has it for a folder of peft:
so a folder may hold a model and an adapter of it. Folders written before that are read all the same.

Tensors are named by role (`adalink.image.down.weight`), not by the host's module path. The config holds a fingerprint of each
frozen part; another base is refused with a sentence that names both.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink.checkpoint.compressed import COMPRESSED_FILE, ZERO, encode_sparse, read_compressed
from adalink.checkpoint.fingerprint import FrozenPart, differences, part_from_json, part_to_json
from adalink.checkpoint.start import Start, digest_of, redrawn, start_from_json
from adalink.edit import COPIES, Adapter, Compact, Method
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from adalink.methods import METHODS

__all__ = [
    "CARD_FILE", "CONFIG_FILE", "EXTRA", "PEFT_CONFIG_FILE", "WEIGHTS_FILE", "AdapterConfig", "class_like", "config_to_json",
    "configs_to_tensor", "is_file_with", "load_weights", "local_folder", "of_base", "read_config", "save_adapter", "state_of_trained",
    "stored_tensors", "upload", "write_adapter",
]  # fmt: skip


# ----------------------------------------
# Adapter folders on the hub: fetched by name, and uploaded. Whatever the client raises becomes one sentence.


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or the downloaded one of a hub name. Raises ConfigError for a name that leads to neither."""
    if Path(folder).is_dir() or isinstance(folder, Path):
        return Path(folder)
    from huggingface_hub import snapshot_download  # ships with transformers

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.json", "*.safetensors", "*.compressed", "README.md"]))
    except Exception as error:  # of the hub's client, of the HTTP library that it happens to use, of the disk
        raise ConfigError(f"{folder} is neither a folder nor an adapter on the hub ({type(error).__name__}): check the name") from error


def upload(repository: str, private: bool, write: Callable[[Path], None]) -> str:
    """Upload the folder that `write` fills; the address of the commit comes back.

    Raises ConfigError where the hub cannot be reached or does not let us in; the folder is written first, so an adapter that
    cannot be saved creates no repository.
    """
    from huggingface_hub import HfApi  # ships with transformers

    api = HfApi()
    with TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload adapter"))
        except Exception as error:  # as above
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".")
            raise ConfigError(
                f"the adapter was not uploaded to {repository} ({type(error).__name__}: {first}): "
                "check the name, the connection, and that you are logged in (`hf auth login`)"
            ) from error


# ----------------------------------------
# What transformers' Trainer, and whoever else takes a model of transformers, asks of one: its forward's arguments, and a state dict of what is trained.


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
EXTRA = "_extra_state"  # torch's name for what a module's state dict holds beside its tensors


def of_base(name: str) -> Any:
    """A property of an adapted model: its frozen model's attribute, or an AttributeError where that has none."""
    return property(lambda self: getattr(self.base, name), doc=f"The frozen model's `{name}`.")


def class_like(wrapper: type[nn.Module], wrapped: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `wrapper` whose forward has the arguments of `wrapped`'s and its own, and which is named after both.

    Trainer reads there which columns of a data set the model takes, and which of them are labels.
    """
    if (wrapper, wrapped) in _made:
        return _made[wrapper, wrapped]
    own = inspect.signature(wrapper.forward).parameters
    theirs = inspect.signature(wrapped.forward).parameters
    named = {name: each for name, each in theirs.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    first = {name: each for name, each in own.items() if each.kind is each.POSITIONAL_OR_KEYWORD}
    keywords = {name: each.replace(kind=each.KEYWORD_ONLY, default=None) for name, each in named.items() if name not in first}
    keywords |= {name: each for name, each in own.items() if each.kind is each.KEYWORD_ONLY}
    rest = [each for each in theirs.values() if each.kind is each.VAR_KEYWORD]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper.forward(self, *args, **kwargs)

    forward.__doc__ = wrapper.forward.__doc__
    forward.__signature__ = inspect.Signature([*first.values(), *keywords.values(), *rest])  # type: ignore[attr-defined]
    name = f"Adapted{wrapped.__name__}"
    made = type(name, (wrapper,), {"forward": forward, "__doc__": wrapper.__doc__, "__module__": wrapper.__module__, "__qualname__": wrapper.__name__})
    _made[wrapper, wrapped] = made
    return made


def state_of_trained(module: nn.Module, frozen: Mapping[str, nn.Module]) -> None:
    """From now on the state dict of `module` is without those of its frozen parts (dotted name -> part), also when it is loaded.

    So a checkpoint of whatever saves `module.state_dict()` holds the adapters alone.
    """

    def left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(tuple(f"{prefix}{part}." for part in frozen))]:
            del state[name]

    def not_wanted(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        left_out(module, state, prefix, None)  # a state dict that holds them changes no frozen part

    def not_missed(module: nn.Module, keys: Any) -> None:
        known = {f"{part}.{name}" for part, one in frozen.items() for name in one.state_dict()}
        known.add(EXTRA)  # a state dict of an earlier version has none
        keys.missing_keys[:] = [key for key in keys.missing_keys if not any(key.endswith(name) and key.removesuffix(name)[-1:] in ("", ".") for name in known)]

    module.register_state_dict_post_hook(left_out)
    module.register_load_state_dict_pre_hook(not_wanted)
    module.register_load_state_dict_post_hook(not_missed)


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
    start            what its weights were before any training; None where that was not stored, or no seed gives it
    derived          of an adapter that was made of others: the verb, their folders (sources), their digests, the settings
    weights          16 hex digits of the weights in the folder (`digest_of`); empty before it is saved, and in folders of earlier versions
    """

    methods: Mapping[str, Method]
    base: Mapping[str, FrozenPart]
    task: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    start: Start | None = None
    derived: Mapping[str, Any] = field(default_factory=dict)
    weights: str = field(default="", compare=False)

    def check_base(self, present: Mapping[str, FrozenPart], folder: str, *, allow_other_base: bool = False) -> None:
        """Raise CheckpointError, saying what differs, where a frozen part is not the one that the adapter was trained on.

        allow_other_base: for who knows better: what differs is a warning.
        """
        for role, trained_on in self.base.items():
            here, what = present.get(role), role.replace("_", " ")
            found = [f"{trained_on.name} ({trained_on.fingerprint}), but this one is missing"] if here is None else list(differences(trained_on, here))
            if not found:
                if here is not None and trained_on.kind and here.kind and trained_on.kind != here.kind:
                    now = f"was trained on the {what} in {trained_on.kind}, and here it is in {here.kind}"
                    warnings.warn(f"the adapter in {folder} {now}: its answers may differ a little", stacklevel=2)
                continue
            note = f"the adapter in {folder} was trained on the {what} {'; and on the same '.join(found)}"
            if not allow_other_base or here is None:
                raise CheckpointError(
                    f"{note}: load the adapter with the parts it was trained on, or allow this one by name (allow_other_base=True, --allow_other_base)"
                )
            warnings.warn(f"{note}; it is loaded all the same", stacklevel=2)


def save_adapter(folder: Path, adapter: Adapter, config: AdapterConfig) -> None:
    """Write the folder of an adapter, its compact methods as they are written (`adalink.edit.Compact`). See `write_adapter`."""
    tensors, methods, counts = adapter.tensors(), dict(config.methods), adapter.n_parameters()
    shapes, few = {name: tensor.shape for name, tensor in tensors.items()}, dict.fromkeys(methods, "no")
    for name, method in config.methods.items():
        if isinstance(method, Compact):
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
            del methods[name], counts[name]
            if (written := method.written(name, adapter)) is not None:
                methods[name], own, few[name] = written
                counts[name] = sum(tensor.numel() for tensor in own.values())
                tensors |= own
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        config = dataclasses.replace(config, start=None)  # no seed draws a part of it
    compressed = None
    if {"zero", "start"} & set(few.values()):
        start = _drawn_again(adapter, config) if "start" in few.values() else None
        stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        compressed = encode_sparse(stored, start, config.start.digest if start and config.start else ZERO)
    write_adapter(folder, tensors, dataclasses.replace(config, methods=methods), counts, compressed=compressed)


def _drawn_again(adapter: Adapter, config: AdapterConfig) -> Mapping[str, Tensor] | None:
    """The tensors of the start; None, with a warning, where it is not known or cannot be drawn again: a trained adapter is to be saved all the same."""
    try:
        if config.start is None or adapter.copies:
            raise CheckpointError("no seed gives it, as where it began with another's weights, holds copies of modules, or leaves places out")
        return redrawn(config.start, lambda: Adapter(config.methods, adapter.anatomy)).tensors()
    except CheckpointError as error:
        warnings.warn(f"the adapter is saved whole, since its start is not known: {error}", stacklevel=3)
        return None


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: AdapterConfig, n_trained: Mapping[str, int] | None = None, *, compressed: bytes | None = None
) -> None:
    """Write an adapter folder; each file appears whole or not at all, the config last. A README.md that is not an adapter's own stays.

    n_trained   trained parameters of each method, for the model card; all that the tensors hold where none are given
    compressed  codes of the tensors, which are written in their place (`adalink.checkpoint.compressed`)

    Raises CheckpointError for a folder that holds an adapter of peft.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_file_with(folder / PEFT_CONFIG_FILE, '"peft_type"'):
        raise CheckpointError(f"{folder} holds an adapter of the peft library, whose {WEIGHTS_FILE} would be overwritten: save to another folder")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = dataclasses.replace(config, weights=digest_of(stored))
    if compressed is None:
        write_whole(folder / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    else:
        write_whole(folder / COMPRESSED_FILE, compressed)
    if not (folder / CARD_FILE).exists() or is_file_with(folder / CARD_FILE, CARD_MARK):
        write_whole(folder / CARD_FILE, _card(n_trained or _counts(stored), config).encode())
    write_whole(folder / CONFIG_FILE, (json.dumps(config_to_json(config), indent=2 if compressed is None else None) + "\n").encode())
    (folder / (COMPRESSED_FILE if compressed is None else WEIGHTS_FILE)).unlink(missing_ok=True)  # of what was there before
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
        inside = next((f"; {found.parent} has one" for found in sorted(folder.glob(f"*/{CONFIG_FILE}"))), "")
        raise CheckpointError(f"{folder} is no adapter folder: it has no {CONFIG_FILE} that can be read{inside}") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder / TRAINER_FILE} is damaged ({error}): copy or train it again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an adapter config ({error}): was it changed by hand, or cut off?") from None


def stored_tensors(folder: Path, adapter: Adapter | None = None) -> tuple[Path, Mapping[str, Tensor]]:
    """The file that holds a folder's weights, and its tensors by name. Raises CheckpointError where it is missing or damaged.

    adapter: of the folder's methods on its frozen model, of which a compressed folder's start is drawn again.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / COMPRESSED_FILE).is_file():
        return folder / COMPRESSED_FILE, _decompressed(folder, adapter)
    try:
        if not (folder / CONFIG_FILE).is_file() and (folder / TRAINER_FILE).is_file() and (found := _trainers(folder)):
            return folder / TRAINER_FILE, found.tensors
        return path, load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or train it again") from None


def _decompressed(folder: Path, adapter: Adapter | None) -> Mapping[str, Tensor]:
    path = folder / COMPRESSED_FILE
    compressed, start = read_compressed(path), read_config(folder).start
    if compressed.start == ZERO:
        return compressed.weights(None, path)
    if start is None or start.digest != compressed.start:
        named = start and start.digest
        raise CheckpointError(f"{path} holds changes of the start {compressed.start}, and its config names {named}: compress the adapter again")
    if adapter is None:
        raise CheckpointError(f"{path} holds changes of a start that is drawn on the frozen model: decompress it first (`adalink decompress`)")
    drawn = redrawn(start, lambda: Adapter(adapter.methods, adapter.anatomy, adapter.copies))
    return compressed.weights({name: tensor.detach().cpu() for name, tensor in drawn.tensors().items()}, path)


def load_weights(folder: Path, adapter: Adapter) -> None:
    """Copy the folder's tensors into the adapter. Strict: a missing, unknown or misshapen tensor is a CheckpointError, and nothing is loaded."""
    path, stored = stored_tensors(folder, adapter)
    wanted = adapter.tensors()
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
        **({"start": dataclasses.asdict(config.start)} if config.start else {}),
        **({"derived": dict(config.derived)} if config.derived else {}),
        **({"weights": config.weights} if config.weights else {}),
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
        start=start_from_json(content.get("start")),
        derived=dict(content.get("derived", {})),
        weights=str(content.get("weights", "")),
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


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers each method and the copies have."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        counts[name.split(".", 1)[0]] = counts.get(name.split(".", 1)[0], 0) + tensor.numel()
    return counts


def _card(n_trained: Mapping[str, int], config: AdapterConfig) -> str:
    bases = "".join(f"\n- {part.name}" for part in config.base.values())
    kinds = {name: type(method).__name__ for name, method in config.methods.items()} | {COPIES: f"trained copy of {', '.join(config.modules_to_save)}"}
    rows = "\n".join(f"| {name} | {kinds[name]} | {n:,} |" for name, n in n_trained.items())
    task = config.task.get("task", "")
    sources = ", ".join(f"{source} ({digest})" for source, digest in zip(config.derived.get("sources", ()), config.derived.get("digests", ()), strict=False))
    origin = f"\nMade by `adalink {config.derived['verb']}` of {sources}, with the settings {json.dumps(config.derived['settings'])}.\n" if sources else ""
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
{origin}"""
