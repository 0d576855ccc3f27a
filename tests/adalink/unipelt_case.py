"""One file of fixtures/unipelt as a frozen model, a method for each part that the file holds, and an adapter with its weights.

Everything is read from the file: which parts there are, their sizes and whether each has gates come from the tensors' names and shapes.
Two naming schemes occur: the authors' (prefix_gate, lora_gate) and AdapterHub's (prefix_gates.t, loras.t.gate).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, OPTConfig, OPTModel

from adalink import PREFIX, TEXT, Adapter, Anatomy, TokenMap
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.gated import Gated
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix
from adalink.methods.unipelt import SEQUENCE
from adalink.targets import find_targets

TRAINED = re.compile(r"lora|prefix|adapter_|adapters\.")
RULES = (  # the end of a name -> part, what it is
    (r"(?:prefix_enc_embed|self_prefix\.wte)\.weight$", "prefix", "shared.embed"),
    (r"self_prefix\.control_trans$", "prefix", "shared.table"),
    (r"(?:prefix_embed_MLP|control_trans)\.0\.(weight|bias)$", "prefix", r"shared.down.{0}"),
    (r"(?:prefix_embed_MLP|control_trans)\.2\.(weight|bias)$", "prefix", r"shared.up.{0}"),
    (r"prefix_gates?(?:\.t)?\.(weight|bias)$", "prefix", r"gates.{layer}.{0}"),
    (r"adapters\.t\.gate\.(weight|bias)$", "adapter", r"gates.{layer}.{0}"),
    (r"adapter_down\.0\.(weight|bias)$", "adapter", r"{layer}.down.{0}"),
    (r"adapter_up\.(weight|bias)$", "adapter", r"{layer}.up.{0}"),
    (r"(\w+)(?:\.loras\.t)?\.lora_A$", "lora", r"{layer}.{0}.down.weight"),
    (r"(\w+)(?:\.loras\.t)?\.lora_B$", "lora", r"{layer}.{0}.up.weight"),
    (r"(\w+)\.(?:lora_gate|loras\.t\.gate)\.(weight|bias)$", "lora", r"gates.{layer}.{0}.{1}"),
)


def role(name: str) -> tuple[str, str]:
    """(part, place in the part) of a trained tensor of either scheme."""
    layer = re.search(r"\.(?:layer|layers|h|block)\.(\d+)\.", "." + name)
    for pattern, part, place in RULES:
        if found := re.search(pattern, name):
            return part, place.format(*found.groups(), layer=layer.group(1) if layer else "")
    raise AssertionError(f"{name} is a trained tensor that this test cannot place")


class Case:
    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path)
        weights = self.under("w.")
        self.model = host(self.spec["config"], {k: v for k, v in weights.items() if not TRAINED.search(k)})
        self.trained = {k: v for k, v in weights.items() if TRAINED.search(k)}
        self.anatomy = Anatomy.read(self.model)
        self.adapter = Adapter(self._methods(), self.anatomy).double()
        own = dict(self.adapter.named_parameters())
        filled = {name for key, value in self.trained.items() for name, part in self.own(key, value).items() if _fill(own[name], part)}
        assert filled == set(own)
        self.n_slots = sum(slot.count for slot in self.adapter.slots)

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def token_map(self) -> TokenMap:
        """As published: padding is edited and averaged over like any other token; the mask alone hides it."""
        ids = self.tensors["in.input_ids"]
        domain = torch.cat([torch.full((len(ids), self.n_slots), PREFIX), torch.full_like(ids, TEXT)], 1)
        return TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64))

    def inputs(self) -> dict[str, Tensor]:
        padding = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0}
        given = {name: self.tensors[f"in.{name}"] for name in padding if f"in.{name}" in self.tensors}
        return {name: nn.functional.pad(value, (self.n_slots, 0), value=padding[name]) for name, value in given.items()}

    def own(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Our names -> tensors, for one of the file's. Three linears in one (GPT-2) hold queries' rows, then values'."""
        part, place = role(name)
        if part == "prefix":
            return {f"prefix.{place}": value.reshape(self._length(), -1) if place == "shared.table" else value}
        if part == "adapter":
            is_edit = "adapter" in self.gated and not place.startswith("gates")
            return {f"adapter.{place.replace('.', '.edit.', 1) if is_edit else place}": value}
        *before, layer, linear, kind, leaf = ("", *place.split("."))[-4:] if not place.startswith("gates") else ("gates", *place.split(".")[1:3], "", place.split(".")[3])
        targets = [target for target in find_targets(self.anatomy, ("query", "value")) if target.role.split(".")[:2] == [layer, linear]]
        values = value.chunk(len(targets)) if len(targets) > 1 else [value]
        if before == ["gates"]:
            return {f"lora.gates.all.{target.role}.{leaf}": one for target, one in zip(targets, values, strict=True)}
        edit = ".edit" if "lora" in self.gated else ""
        return {f"lora.all.{target.role}{edit}.{kind}.{leaf}": one for target, one in zip(targets, values, strict=True)}

    def _length(self) -> int:
        config = self.spec["config"]
        embed = next((v for k, v in self.trained.items() if role(k)[1] == "shared.embed"), None)
        return len(embed) if embed is not None else int(config["prefix_len"])

    def _methods(self) -> dict[str, Any]:
        shapes = {role(k): v.shape for k, v in self.trained.items()}
        self.gated = {part for part, place in shapes if place.startswith("gates")}
        parts: dict[str, Any] = {}
        first = {(part, place.split(".", 1)[-1]): shape for (part, place), shape in shapes.items()}
        if ("adapter", "down.weight") in first:
            parts["adapter"] = Bottleneck(width=first["adapter", "down.weight"][0])
        if ("prefix", "embed") in first or ("prefix", "table") in first:
            hidden = first.get(("prefix", "down.weight"), (1,))[0]
            parts["prefix"] = Prefix(length=self._length(), form="mlp" if ("prefix", "embed") in first else "table", init_std=0.02, hidden=hidden)
        ranks = {shape[1] for (part, place), shape in shapes.items() if part == "lora" and place.endswith("up.weight")}
        if ranks:
            (rank,) = ranks
            alpha = float(rank) if "lora" in self.gated else float(self.spec["config"]["lora_alpha"])
            parts["lora"] = LoRA(groups={"all": SEQUENCE}, rank=rank, alpha=alpha, targets=("query", "value"))
        return {name: Gated(inner=method, mean="sequence") if name in self.gated else method for name, method in parts.items()}


def host(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The frozen model in float64 with eager attention, by what its weights are called."""

    def value(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if name in config), default)

    vocabulary, width, layers, heads = value("vocab", "vocab_size"), value("hidden", "n_embd", "d"), value("layers", "n_layer"), value("heads", "n_head")
    act = value("act", default="relu").split(" ")[0]
    positions, middle = value("max_position", "n_positions", default=64), value("intermediate", "ffn", "ffn_dim")
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    eager = {"attn_implementation": "eager", "max_position_embeddings": positions}
    if any("c_attn" in name for name in weights):
        model: Any = GPT2Model(
            GPT2Config(
                vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions, activation_function=act,
                layer_norm_epsilon=value("eps", "ln_eps", "layer_norm_eps", default=1e-5), attn_implementation="eager",
            )
        )  # fmt: skip
    elif any("attention.self" in name for name in weights):
        eps = value("layer_norm_eps", "eps", default=1e-12)
        model = BertModel(
            BertConfig(**sizes, intermediate_size=middle, hidden_act=act, layer_norm_eps=eps, type_vocab_size=value("type_vocab", default=2), **eager),
            add_pooling_layer=False,
        )
    elif any("fc1" in name for name in weights):
        model = OPTModel(OPTConfig(**sizes, ffn_dim=middle, activation_function=act, word_embed_proj_dim=width, **eager))
    else:
        n_kv, eps = value("kv_heads", "n_kv", "num_key_value_heads", default=heads), value("eps", "rms_norm_eps", default=1e-6)
        model = LlamaModel(LlamaConfig(**sizes, intermediate_size=middle, num_key_value_heads=n_kv, rms_norm_eps=eps, **eager))
    missing, unexpected = model.double().load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model.eval()


def _fill(parameter: Tensor, value: Tensor) -> bool:
    with torch.no_grad():
        parameter.copy_(value)
    return True
