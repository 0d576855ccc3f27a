"""LoRA, AdaLoRA and HiRA folders of the peft library: read one as the same method on every token, or write such an adapter for peft to load.

    adapter = from_peft("their-lora", model)        # attach(model, adapter), or, with its copies of modules (a classifier's head):
    model.add_adapter(name, adapter.methods, modules_to_save=tuple(adapter.copies)).load_state_dict(adapter.state_dict())
    to_peft(adapter, model, "for-peft")             # PeftModel.from_pretrained(model, "for-peft")
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink.anatomy import Anatomy, is_conv1d
from adalink.attachment.modules_to_save import copied
from adalink.checkpoint.folder import CONFIG_FILE, PEFT_CONFIG_FILE, WEIGHTS_FILE
from adalink.edit import Adapter, Method, Placement
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from adalink.methods.budgets.adalora import AdaLoRA, Triplet
from adalink.methods.hira import Hadamard, HiRA
from adalink.methods.lora import LoRA, LowRank
from adalink.methods.targets import DOMAINS, find_targets

__all__ = ["from_peft", "renamings", "to_peft", "write_peft"]


# ----------------------------------------
# The names that modules had in earlier versions of transformers, from its own tables: what is stored under them is still read.


def renamings(model: nn.Module) -> Callable[[str], str]:
    """Maps a module's name in a file to its name in this model; a name that no table knows stays.

    Of LLaVA: `language_model.model.layers.0.mlp.up_proj` -> `model.language_model.layers.0.mlp.up_proj`. A name without the
    prefix of the model inside (a bare model's), or with one too many, is mapped too. Any other nn.Module has no earlier names.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return str
    if not isinstance(model, PreTrainedModel):
        return str
    tables = [table for table in get_model_conversion_mapping(model) if isinstance(table, WeightRenaming)]
    own: Mapping[str, Any] = model.state_dict()

    def renamed(name: str) -> str:
        key, _ = rename_source_key(f"{name}.weight", tables, [], model.base_model_prefix, own)
        return str(key).removesuffix(".weight")

    return renamed


# What is read, and what says nothing of the result; anything else that is set changes what peft computes, and is refused by name.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "modules_to_save"}
SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "hira_dropout", "init_weights", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
KINDS = {"LORA": "a LoRA", "ADALORA": "an AdaLoRA", "HIRA": "a HiRA"}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others (PiSSA, OLoRA, CorDA, LoftQ) start by changing the frozen weights
NOT_OF_ADALORA = {"alpha_pattern", "use_rslora", "lora_bias"}  # of READ
TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:lora|hira)_([ABE])(?:\.(weight|bias))?")
Tensors = Mapping[str, Mapping[str, Tensor]]  # linear -> `A.weight`, `B.weight`, `B.bias`; of AdaLoRA `E.weight` too


def from_peft(folder: str | Path, model: nn.Module) -> Adapter:
    """A LoRA, AdaLoRA or HiRA of peft as an adapter for every token of the model. One method for each rank and alpha that occurs, of AdaLoRA one.

    model: the frozen model, of the class that it was trained on. Its modules may have had other names then: those that transformers
    knows are read. Its dropout, which acts in peft's training alone, is not taken over.
    Raises CheckpointError for a damaged folder, for what has no counterpart here (DoRA, trained copies of modules, ...), and for linears
    outside the layers that adapters reach (the head; the decoder of an encoder-decoder model).
    """
    path = Path(folder)
    config, anatomy = _config(path), Anatomy.read(model)
    copies = copied(model, anatomy, [name for name in config.get("modules_to_save") or () if _has_module(model, name)])
    needed = {"A.weight", "B.weight"} | ({"E.weight"} if config["peft_type"] == "ADALORA" else set())
    tensors, written = _tensors(path, model, anatomy, copies, needed)
    methods = {"adalora": _adalora(config, anatomy, tensors)} if config["peft_type"] == "ADALORA" else _low_rank(config, anatomy, tensors, written)
    dtypes = {value.dtype for parts in tensors.values() for value in parts.values()}
    adapter = Adapter(methods, anatomy, copies).to(torch.float64 if torch.float64 in dtypes else torch.float32)
    with torch.no_grad():
        for placement in adapter.placements:
            _fill(placement, tensors[placement.port.module], path)
    return adapter


def _low_rank(config: Mapping[str, Any], anatomy: Anatomy, tensors: Tensors, written: Mapping[str, str]) -> dict[str, Method]:
    """A LoRA, or a HiRA, for each rank and alpha that occurs."""
    alike: dict[tuple[int, float, bool], list[str]] = defaultdict(list)
    for linear, parts in tensors.items():
        names = (f"{anatomy.stack}.{linear}".lstrip("."), written[linear])
        alpha = _by_pattern(config.get("alpha_pattern") or {}, names, config.get("lora_alpha", 0))
        alike[len(parts["A.weight"]), alpha, "B.bias" in parts].append(linear)
    scaling: Any = "rank_stabilized" if config.get("use_rslora") else "standard"
    return {
        f"{config['peft_type'].lower()}{i or ''}": HiRA(rank=rank, targets=_short(anatomy, linears)) if config["peft_type"] == "HIRA"
        else LoRA(rank=rank, alpha=alpha, bias="all" if bias else "none", targets=_short(anatomy, linears), scaling=scaling)
        for i, ((rank, alpha, bias), linears) in enumerate(alike.items())
    }  # fmt: skip


def _adalora(config: Mapping[str, Any], anatomy: Anatomy, tensors: Tensors) -> AdaLoRA:
    """The ranks are what the file has; the scale is that of the rank before training."""
    by_name = {target.linear.name: f"all.{target.role}" for target in find_targets(anatomy, ("all",))}
    return AdaLoRA(
        init_rank=config.get("init_r", 12), target_rank=config.get("target_r", 8), alpha=config["lora_alpha"], beta1=config.get("beta1", 0.85),
        beta2=config.get("beta2", 0.85), orthogonality=config.get("orth_reg_weight", 0.5), targets=_short(anatomy, list(tensors)),
        ranks={by_name[linear]: len(parts["A.weight"]) for linear, parts in tensors.items() if len(parts["A.weight"])},
    )  # fmt: skip


def to_peft(adapter: Adapter, model: nn.Module, folder: str | Path, *, as_lora: bool = False) -> None:
    """Write a LoRA, an AdaLoRA or a HiRA on every token as a folder that peft loads. Ranks and scales may differ from linear to linear.

    as_lora: an AdaLoRA as a LoRA with the same change, for engines that know no AdaLoRA.

    Raises ConfigError for an adapter that holds anything else, since peft knows no token domains.
    """
    stack = Anatomy.read(model).stack
    edits = {f"{stack}.{placement.port.module}".lstrip("."): _for_peft(placement, as_lora) for placement in adapter.placements}
    if len(edits) < len(adapter.placements) or len({type(edit) for edit in edits.values()}) > 1:
        raise ConfigError("peft has one LoRA or HiRA for each linear, and this adapter has two groups on one, or both: export an adapter with one group")
    kind = type(next(iter(edits.values()), None))
    tensors, settings = (_written_adalora if kind is Triplet else _written_hira if kind is Hadamard else _written_lora)(adapter, edits)
    transposed = any(is_conv1d(model.get_submodule(name)) for name in edits)
    write_peft(folder, adapter, model, tensors, target_modules=list(edits), fan_in_fan_out=transposed, **settings)


Written = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by peft's names, and settings of peft's config
PREFIX = "base_model.model."


def _written_lora(adapter: Adapter, edits: Mapping[str, Any]) -> Written:
    """The first linear's rank and alpha are the config's, and those of others patterns."""
    ranks = {name: len(edit.down.weight) for name, edit in edits.items()}
    alphas = {name: edit.scale * ranks[name] for name, edit in edits.items()}
    r, alpha = next(iter(ranks.values()), 0), next(iter(alphas.values()), 0.0)
    has_bias = any(edit.bias is not None for edit in edits.values())
    tensors: dict[str, Tensor] = {}
    for name, edit in edits.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": edit.down.weight, f"{PREFIX}{name}.lora_B.weight": edit.up.weight}
        if has_bias:  # peft scales it
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.zeros(edit.target.width) if edit.bias is None else edit.bias / edit.scale
    patterns = {"rank_pattern": {name: rank for name, rank in ranks.items() if rank != r}, "alpha_pattern": {k: v for k, v in alphas.items() if v != alpha}}
    return tensors, {"r": r, "lora_alpha": alpha, "lora_bias": has_bias, **patterns}


def _written_hira(adapter: Adapter, edits: Mapping[str, Any]) -> Written:
    """peft gives every linear of a HiRA one rank: zeros fill it."""
    r = max(len(edit.down.weight) for edit in edits.values())
    tensors: dict[str, Tensor] = {}
    for name, edit in edits.items():
        fill = r - len(edit.down.weight)
        tensors[f"{PREFIX}{name}.hira_A"] = nn.functional.pad(edit.down.weight, (0, 0, 0, fill))
        tensors[f"{PREFIX}{name}.hira_B"] = nn.functional.pad(edit.up.weight, (0, fill))
    return tensors, {"r": r, "rank_pattern": {}, "peft_type": "HIRA"}


def _written_adalora(adapter: Adapter, edits: Mapping[str, Any]) -> Written:
    """Of each linear the triplets that are left: peft scales by the rank before training. Raises ConfigError for two AdaLoRA of other scales."""
    methods = [method for method in adapter.methods.values() if isinstance(method, AdaLoRA)]
    if len({(method.init_rank, method.alpha) for method in methods}) > 1:
        raise ConfigError("peft has one AdaLoRA in an adapter, and this one has several of other scales: export it as a LoRA (as_lora=True)")
    left = {name: edit.value.detach().nonzero()[:, 0] for name, edit in edits.items()}
    tensors: dict[str, Tensor] = {}
    for name, edit in edits.items():
        rows = left[name]
        parts = {"A": edit.down.weight[rows], "E": edit.value[rows, None], "B": edit.up.weight[:, rows]}
        tensors |= {f"{PREFIX}{name}.lora_{part}": value for part, value in parts.items()}
    own = methods[0]
    return tensors, {
        "peft_type": "ADALORA", "init_r": own.init_rank, "target_r": own.target_rank, "lora_alpha": own.alpha, "total_step": own.total or 1,
        "beta1": own.beta1, "beta2": own.beta2, "orth_reg_weight": own.orthogonality, "deltaT": own.interval,
        "rank_pattern": {f"{name}.lora_E": [i < len(rows) for i in range(own.init_rank)] for name, rows in left.items()},
    }  # fmt: skip


def write_peft(folder: str | Path, adapter: Adapter, model: nn.Module, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    """Write a peft folder of these tensors, of the adapter's copies of modules, and of a config with these settings.

    Raises ConfigError for a folder that holds an adapter of this package.
    """
    copies = {f"base_model.model.{path}.{name}": value for path, copy in adapter.copies.items() for name, value in copy.state_dict().items()}
    name = getattr(getattr(model, "config", None), "name_or_path", "") or None
    config = {
        "peft_type": "LORA", "task_type": _task_type(model), "inference_mode": True, "modules_to_save": list(adapter.copies) or None,
        "base_model_name_or_path": name, **({} if settings.get("peft_type") == "HIRA" else {"lora_dropout": 0.0, "bias": "none"}), **settings,
    }  # fmt: skip
    path = Path(folder)
    if (path / CONFIG_FILE).exists():
        raise ConfigError(f"{path} holds an adapter of this package, whose {WEIGHTS_FILE} would be overwritten: export to another folder")
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in {**tensors, **copies}.items()}
    write_whole(path / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    write_whole(path / PEFT_CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _task_type(model: nn.Module) -> str | None:
    """peft's word for what the model is for; None for heads that it wraps in no class of its own."""
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if hasattr(model, "generate"):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"
    return {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}.get(kind[kind.find("For") :])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG_FILE
    try:
        config: Any = json.loads(path.read_text())
    except OSError:
        advice = ", and is an adapter of this package: load it with AdaptedModel.from_pretrained" if (folder / CONFIG_FILE).is_file() else ""
        raise CheckpointError(f"{folder} is no peft folder: it has no {PEFT_CONFIG_FILE} that can be read{advice}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): was it cut off?") from None
    config = config if isinstance(config, dict) else {}
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA", "HIRA") or (kind != "HIRA" and not isinstance(config.get("lora_alpha"), int | float)):
        raise CheckpointError(f"{path} is of the peft type {kind!r}, and only a LORA or ADALORA with its lora_alpha, or a HIRA, can be read")
    if config.get("init_lora_weights", True) not in STARTS:
        raise CheckpointError(f"{path} has init_lora_weights {config['init_lora_weights']!r}, which changes the frozen weights: convert it with peft first")
    known = (READ - NOT_OF_ADALORA if kind == "ADALORA" else READ) | SILENT | {"init_lora_weights"}
    other = {name for name, value in config.items() if value and name not in known and (name, value) != ("bias", "none")}
    if other:
        named = f"{path} uses {', '.join(sorted(other))} of peft, which {KINDS[kind]} here does not have"
        raise CheckpointError(f"{named}: its results would not be the same")
    return config


def _has_module(model: nn.Module, name: str) -> bool:
    """Whether a module's name ends so; peft names the heads of all architectures at once (classifier, score)."""
    return any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules())


def _tensors(
    folder: Path, model: nn.Module, anatomy: Anatomy, copies: Mapping[str, nn.Module], needed: set[str]
) -> tuple[Tensors, Mapping[str, str]]:
    """The tensors of each linear, and the linear's name in the file, which is an older one of the same module in some; copies are filled.

    needed: what each linear must have.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}: save it with safe_serialization, as peft does by default") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy it again") from None
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    written: dict[str, str] = {}
    linear_of = {f"{anatomy.stack}.{linear.name}".lstrip("."): linear.name for linear in anatomy.linears}
    renamed = renamings(model)
    own = {f"base_model.model.{module}.{name}": value for module, copy in copies.items() for name, value in copy.state_dict().items()}
    if missing := sorted(set(own) - set(stored)):
        raise CheckpointError(f"{path} lacks {', '.join(missing)} of the modules that its config names in modules_to_save: copy it again")
    for key, value in stored.items():
        if key in own:
            _copy_into(own[key], value, key, path)
            continue
        found = TENSOR.fullmatch(key)
        linear = found and (linear_of.get(found[1]) or linear_of.get(renamed(found[1])))
        if not found or not linear:
            raise CheckpointError(f"{path} holds {key}, which is no LoRA or HiRA of a linear inside the layers under {anatomy.stack or 'the model'}")
        tensors[linear][f"{found[2]}.{found[3] or 'weight'}"], written[linear] = value, found[1]
    incomplete = [linear for linear, parts in tensors.items() if not needed <= set(parts)]
    if incomplete or not tensors:
        raise CheckpointError(f"{path} lacks {'A, B or E' if 'E.weight' in needed else 'A or B'} of {', '.join(incomplete) or 'every linear'}: copy it again")
    return tensors, written


def _copy_into(parameter: Tensor, value: Tensor, name: str, path: Path) -> None:
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{path}: {name} is {tuple(value.shape)}, and this model needs {tuple(parameter.shape)}: load it with the model it was trained on"
        )
    parameter.copy_(value)


def _fill(placement: Placement, parts: Mapping[str, Tensor], path: Path) -> None:
    edit = placement.edit
    assert isinstance(edit, LowRank | Hadamard | Triplet)
    bias = edit.bias if isinstance(edit, LowRank) else None
    wanted = {"A.weight": edit.down.weight, "B.weight": edit.up.weight, **({"B.bias": bias} if bias is not None else {})}
    wanted |= {"E.weight": edit.value[:, None]} if isinstance(edit, Triplet) else {}
    for name, parameter in wanted.items():
        value = parts[name] * edit.scale if name == "B.bias" and isinstance(edit, LowRank) else parts[name]  # peft scales the bias with the rest
        _copy_into(parameter, value, f"{name} of {placement.port.module}", path)


def _for_peft(placement: Placement, as_lora: bool) -> LowRank | Hadamard | Triplet:
    edit = placement.edit
    if (
        not isinstance(edit, LowRank | Hadamard | Triplet)
        or set(placement.domains) != set(DOMAINS["all"])
        or edit.target.width != edit.target.linear.n_out
    ):
        raise ConfigError(
            f"{placement.role} is no LoRA, AdaLoRA or HiRA of a whole linear on every token, and nothing else can be written for peft: export an adapter of "
            "LoRA(groups={'all': ('all',)}, ...) alone"
        )
    return edit.as_lora() if as_lora and isinstance(edit, Triplet) else edit


def _by_pattern(patterns: Mapping[str, float], names: Sequence[str], default: float) -> float:
    """peft's rule: a pattern is a regular expression for the end of a module's name (any of them), on a component's boundary."""
    return next((value for pattern, value in patterns.items() if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)), default)


def _short(anatomy: Anatomy, linears: list[str]) -> tuple[str, ...]:
    """Targets for these linears: last path components where they cover the whole model, whole names elsewhere."""
    lasts = dict.fromkeys(linear.rsplit(".", 1)[-1] for linear in linears)
    same = {last: {linear.name for linear in anatomy.linears if linear.name.endswith("." + last)} for last in lasts}
    covered = {last for last, names in same.items() if names <= set(linears)}
    return (*sorted(covered), *(linear for linear in linears if linear.rsplit(".", 1)[-1] not in covered))
