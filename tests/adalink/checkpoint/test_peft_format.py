"""LoRA, AdaLoRA and HiRA folders, both ways, against the peft library itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_models import existing
from peft import AdaLoraConfig, HiraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import excite, rows, run, tiny
from torch import Tensor, nn

from adalink import TEXT, AdaLoRA, AdaptedModel, Adapter, Anatomy, BitFit, HiRA, LoRA, TokenMap, attach
from adalink.checkpoint.peft_format import from_peft, to_peft
from adalink.errors import CheckpointError, ConfigError

IDS, _, MASK = rows()


def theirs(family: str, folder: Path, **settings: Any) -> Tensor:
    """Saves a peft LoRA, or a HiRA, in the folder; its model's logits."""
    torch.manual_seed(0)
    kind = settings.pop("kind", LoraConfig)
    rank = {"init_r": 4, "target_r": 2, "total_step": 9} if kind is AdaLoraConfig else {"r": 4}
    config = kind(**{**rank, **({} if kind is HiraConfig else {"lora_alpha": 8}), "target_modules": "all-linear", **settings})
    model = get_peft_model(tiny(family), config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hira_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = run(model.base_model.model, IDS, MASK)
    model.save_pretrained(folder)
    return expected


def ours(model: nn.Module, adapter: Adapter) -> Tensor:
    attachment = attach(model, adapter.double().eval())
    with attachment.bind(TokenMap(torch.full_like(IDS, TEXT), torch.zeros(len(IDS), dtype=torch.int64))), torch.no_grad():
        logits = run(model, IDS, MASK)
    attachment.detach()
    return logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "every linear": ("llama", {}),
    "query and value, rank stabilised": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "ranks and alphas by pattern": ("opt", {"target_modules": ["q_proj", "fc1", "fc2"], "rank_pattern": {"fc1": 2, "layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"fc2": 3}, "lora_dropout": 0.1}),
    "a linear with a transposed weight": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "one layer": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "biases": ("opt", {"lora_bias": True, "target_modules": ["q_proj", "fc2"]}),
    "another start": ("llama", {"init_lora_weights": "gaussian"}),
    "AdaLoRA": ("llama", {"kind": AdaLoraConfig, "lora_alpha": 7}),
    "AdaLoRA, a linear with a transposed weight": ("gpt2", {"kind": AdaLoraConfig, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "HiRA": ("llama", {"kind": HiraConfig}),
    "HiRA, a linear with a transposed weight": ("gpt2", {"kind": HiraConfig, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lora_of_peft_gives_pefts_logits(name: str, tmp_path: Path) -> None:
    family, settings = SETTINGS[name]
    expected = theirs(family, tmp_path, **dict(settings))
    model = tiny(family)
    plain = run(model, IDS, MASK)
    logits = ours(model, from_peft(tmp_path, model))
    close(logits, expected)
    assert not torch.allclose(logits, plain)  # control


# The prefix of the language model's layers now, and before transformers 4.52.
EARLIER_NAMES = {
    "llava": ("model.language_model.layers", "language_model.model.layers"),
    "paligemma": ("model.language_model.layers", "language_model.model.layers"),
    "gemma3": ("model.language_model.layers", "language_model.model.layers"),
    "internvl": ("model.language_model.layers", "language_model.model.layers"),
    "qwen2_vl": ("model.language_model.layers", "model.layers"),
    "qwen2_5_vl": ("model.language_model.layers", "model.layers"),
}


@pytest.mark.parametrize("family", EARLIER_NAMES)
def test_the_names_that_modules_had_before_are_read(family: str, tmp_path: Path) -> None:
    now, before = EARLIER_NAMES[family]
    settings: dict[str, Any] = {"target_modules": rf"{now}.*(q_proj|up_proj)", "alpha_pattern": {f"{now}.1.mlp.up_proj": 3}}
    saved = get_peft_model(existing(family), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings))
    saved.save_pretrained(tmp_path)
    expected = from_peft(tmp_path, existing(family))
    rename_layers(tmp_path, now, before)
    read = from_peft(tmp_path, existing(family))
    assert read.methods == expected.methods
    assert len(read.methods) == 2  # two alphas
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_lora_of_the_model_without_its_head_is_read(tmp_path: Path) -> None:
    expected = theirs("llama", tmp_path)
    rename_layers(tmp_path, "model.layers", "layers")
    model = tiny("llama")
    close(ours(model, from_peft(tmp_path, model)), expected)


def rename_layers(folder: Path, now: str, before: str) -> None:
    """Changes the names of a peft folder, in weights and patterns."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    stored = load_file(weights)
    save_file({key.replace(f"base_model.model.{now}.", f"base_model.model.{before}."): value for key, value in stored.items()}, weights)
    assert set(load_file(weights)) != set(stored)
    content = json.loads(config.read_text())
    content["alpha_pattern"] = {key.replace(now, before): value for key, value in content["alpha_pattern"].items()}
    config.write_text(json.dumps(content))


def test_it_is_one_adapter_of_many_and_is_saved_as_such(tmp_path: Path) -> None:
    expected = theirs("llama", tmp_path / "theirs")
    model = AdaptedModel(tiny("llama"))
    read = from_peft(tmp_path / "theirs", model.base)
    model.add_adapter("theirs", read.methods).double().load_state_dict(read.state_dict())
    model.save_pretrained(tmp_path / "ours")
    close(ours(tiny("llama"), model.active_adapter()), expected)
    again = AdaptedModel(tiny("llama")).load_adapter(tmp_path / "ours", "theirs")
    assert again.methods == read.methods
    assert all(torch.equal(value, read.state_dict()[name].float()) for name, value in again.state_dict().items())


def test_an_adalora_whose_budget_peft_has_spent_gives_pefts_logits(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, target_r=1, lora_alpha=8, total_step=6, tfinal=2, target_modules=["q_proj", "fc2"])
    model: Any = get_peft_model(tiny("opt"), config).double()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]  # and not peft's ranknum, which requires a gradient too
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for step in range(6):
        optimizer.zero_grad()
        run(model.base_model.model, IDS, MASK).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.base_model.update_and_allocate(step)
    with torch.no_grad():
        expected = run(model.eval().base_model.model, IDS, MASK)
    model.save_pretrained(tmp_path)
    sizes = [len(value) for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if name.endswith("lora_E")]
    assert sum(sizes) == 4
    assert min(sizes) == 0  # a linear without a triplet
    read = from_peft(tmp_path, tiny("opt"))
    close(ours(tiny("opt"), read), expected)
    assert [len(placement.edit.value) for placement in read.placements] == [n for n in sizes if n]  # type: ignore[arg-type]


EXPORTS: dict[str, tuple[str, list[LoRA | HiRA | AdaLoRA]]] = {
    "llama": ("llama", [LoRA(groups={"all": ("all",)}, rank=4, alpha=3.5, multiplier=0.5)]),
    "gpt2": ("gpt2", [LoRA(groups={"all": ("all",)}, rank=2, alpha=4, scaling="rank_stabilized", exclude_layers=(0,))]),
    "two ranks, some biases": (
        "opt",
        [
            LoRA(groups={"all": ("all",)}, rank=2, alpha=4, targets=("query",), bias="auto"),
            LoRA(groups={"all": ("all",)}, rank=3, alpha=1, targets=("fc1",), exclude_layers=(1,)),
        ],
    ),
    "AdaLoRA": ("opt", [AdaLoRA(init_rank=3, target_rank=2, alpha=5, targets=("q_proj", "fc1"), ranks={"all.0.q_proj": 2, "all.1.q_proj": 3, "all.1.fc1": 1})]),
    "an encoder": ("t5", [LoRA(groups={"all": ("all",)}, rank=2, alpha=4)]),
    "HiRA of two ranks": ("gpt2", [HiRA(rank=2, targets=("c_attn",)), HiRA(rank=3, targets=("c_fc",))]),
}


@pytest.mark.parametrize(("name", "as_lora"), [*((name, False) for name in EXPORTS), ("AdaLoRA", True)])
def test_an_exported_lora_gives_our_logits_in_peft_and_comes_back(name: str, as_lora: bool, tmp_path: Path) -> None:
    family, methods = EXPORTS[name]
    model = tiny(family)
    adapter = Adapter({f"lora{i}": method for i, method in enumerate(methods)}, Anatomy.read(model)).double()
    excite(adapter)
    expected = ours(model, adapter)
    to_peft(adapter, model, tmp_path, as_lora=as_lora)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        close(run(loaded.base_model.model, IDS, MASK), expected)
    close(ours(model, from_peft(tmp_path, model)), expected)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "uses use_dora of peft, which a LoRA here does not have"),
    ({"modules_to_save": ["lm_head"]}, r"lacks base_model\.model\.lm_head\.weight of the modules that its config names in modules_to_save"),
    ({"bias": "all", "trainable_token_indices": [1]}, "uses bias, trainable_token_indices of peft"),
    ({"peft_type": "IA3"}, "is of the peft type 'IA3', and only a LORA or ADALORA with its lora_alpha, or a HIRA, can be read"),
    ({"lora_alpha": None}, "is of the peft type 'LORA', and only a LORA or ADALORA with its lora_alpha, or a HIRA, can be read"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which changes the frozen weights: convert it with peft first"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_what_has_no_counterpart_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs("llama", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        from_peft(tmp_path, tiny("llama"))


def test_of_an_adalora_what_peft_itself_leaves_out_is_refused_and_so_is_a_file_without_its_values(tmp_path: Path) -> None:
    theirs("llama", tmp_path, kind=AdaLoraConfig)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if not key.endswith("layers.0.mlp.up_proj.lora_E")}, weights)
    with pytest.raises(CheckpointError, match=r"lacks A, B or E of layers\.0\.mlp\.up_proj: copy it again$"):
        from_peft(tmp_path, tiny("llama"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    with pytest.raises(CheckpointError, match=r"uses use_rslora of peft, which an AdaLoRA here does not have: its results would not be the same$"):
        from_peft(tmp_path, tiny("llama"))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(CheckpointError, match=r"is no peft folder: it has no adapter_config.json"):
        from_peft(tmp_path, model)
    theirs("llama", tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    stored = load_file(weights)

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, weights)
        with pytest.raises(CheckpointError, match=message):
            from_peft(tmp_path, model)

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    refused({**stored, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "holds base_model.model.lm_head.lora_A.weight, which is no LoRA or HiRA of a linear")
    refused({key: value for key, value in stored.items() if key != f"{name}B.weight"}, r"lacks A or B of layers.0.self_attn.q_proj: copy it again")
    refused({**stored, f"{name}A.weight": torch.zeros(4, 5)}, r"A.weight of layers.0.self_attn.q_proj is \(4, 5\), and this model needs \(4, 32\)")
    weights.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="is damaged"):
        from_peft(tmp_path, model)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors: save it with safe_serialization"):
        from_peft(tmp_path, model)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        from_peft(tmp_path, model)


def test_what_peft_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    model, gpt2 = tiny("llama"), tiny("gpt2")
    lora = LoRA(groups={"all": ("all",)}, rank=2, alpha=2)

    def refused(model: nn.Module, message: str, **methods: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            to_peft(Adapter(methods, Anatomy.read(model)), model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(model, r"l.text.0.q_proj is no LoRA, AdaLoRA or HiRA of a whole linear on every token", l=LoRA(groups={"text": ("text",)}, rank=2, alpha=2))
    refused(model, r"b.all.0.q_proj is no LoRA, AdaLoRA or HiRA of a whole linear", l=lora, b=BitFit(groups={"all": ("all",)}, force_bias=True))
    refused(gpt2, r"l.all.0.c_attn.query is no LoRA, AdaLoRA or HiRA of a whole linear", l=LoRA(groups={"all": ("all",)}, rank=2, alpha=2, targets=("query",)))
    refused(model, "this adapter has two groups on one, or both: export an adapter with one group", a=lora, b=copy.copy(lora))
    two = {"a": AdaLoRA(targets=("q_proj",)), "b": AdaLoRA(targets=("v_proj",), alpha=3)}
    refused(model, r"^peft has one AdaLoRA in an adapter, and this one has several of other scales: export it as a LoRA \(as_lora=True\)$", **two)
