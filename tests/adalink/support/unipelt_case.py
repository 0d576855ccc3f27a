"""One file of fixtures/unipelt as a frozen model, a method for each part that the file holds, and an adapter with its weights.

Everything is read from the file: which parts there are, their sizes and whether each has gates come from the tensors' names and shapes.
Two naming schemes occur: the authors' (prefix_gate, lora_gate) and AdapterHub's (prefix_gates.t, loras.t.gate).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hosts import host
from safetensors.torch import load_file
from torch import Tensor, nn

from adalink import PREFIX, TEXT, Adapter, Anatomy, TokenMap
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix
from adalink.methods.targets import find_targets
from adalink.methods.unipelt import SEQUENCE, Gated

TRAINED = re.compile(r"lora|prefix|adapter_|adapters\.|central_gate")
RULES = (  # the end of a name -> part, what it is
    (r"(?:prefix_enc_embed|self_prefix\.wte)\.weight$", "prefix", "shared.embed"),
    (r"self_prefix\.control_trans$", "prefix", "shared.table"),
    (r"(?:prefix_embed_MLP|control_trans)\.0\.(weight|bias)$", "prefix", r"shared.down.{0}"),
    (r"(?:prefix_embed_MLP|control_trans)\.2\.(weight|bias)$", "prefix", r"shared.up.{0}"),
    (r"prefix_gates?(?:\.t)?\.(weight|bias)$", "prefix", r"gates.{layer}.{0}"),
    (r"central_gate\.(weight|bias)$", "central", r"gates.{layer}.{0}"),
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


def read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(the .json, the .safetensors)."""
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


class Case:
    """spec: the .json; tensors: the .safetensors."""

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.spec, self.tensors = spec, tensors
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
        """Position ids, where the file has any, count every token here, the slots too: the prefix takes them out of the count."""
        padding = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0}
        given = {name: self.tensors[f"in.{name}"] for name in padding if f"in.{name}" in self.tensors}
        found = {name: nn.functional.pad(value, (self.n_slots, 0), value=padding[name]) for name, value in given.items()}
        if "in.position_ids" in self.tensors:
            before = torch.arange(self.n_slots).expand(len(found["input_ids"]), -1)
            found["position_ids"] = torch.cat([before, self.tensors["in.position_ids"] + self.n_slots], 1)
        return found

    def own(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Our names -> tensors, for one of the file's. Three linears in one (GPT-2) hold queries' rows, then values'."""
        part, place = role(name)
        if part == "prefix":
            return {f"prefix.{place}": value.reshape(self._length(), -1) if place == "shared.table" else value}
        if part == "adapter":
            is_edit = "adapter" in self.gated and not place.startswith("gates")
            return {f"adapter.{place.replace('.', '.edit.', 1) if is_edit else place}": value}
        if part == "central":
            return self._central(place, value)
        *before, layer, linear, kind, leaf = ("", *place.split("."))[-4:] if not place.startswith("gates") else ("gates", *place.split(".")[1:3], "", place.split(".")[3])
        targets = [target for target in find_targets(self.anatomy, ("query", "value")) if target.role.split(".")[:2] == [layer, linear]]
        values = value.chunk(len(targets)) if len(targets) > 1 else [value]
        if before == ["gates"]:
            return {f"lora.gates.all.{target.role}.{leaf}": one for target, one in zip(targets, values, strict=True)}
        edit = ".edit" if "lora" in self.gated else ""
        return {f"lora.all.{target.role}{edit}.{kind}.{leaf}": one for target, one in zip(targets, values, strict=True)}

    def _central(self, place: str, value: Tensor) -> dict[str, Tensor]:
        """One linear of two rows, for LoRA and the prefix of a layer; queries and values read the same, so each has the first row."""
        _, layer, leaf = place.split(".")
        targets = [target for target in find_targets(self.anatomy, ("query", "value")) if target.role.split(".")[0] == layer]
        return {f"lora.gates.all.{target.role}.{leaf}": value[:1] for target in targets} | {f"prefix.gates.{layer}.{leaf}": value[1:]}

    def gradient(self, name: str, stored: Tensor) -> Tensor:
        """Of one of the file's tensors, made of the gradients of ours."""
        found = {own: self.adapter.get_parameter(own).grad for own in self.own(name, stored)}
        assert all(value is not None for value in found.values()), f"{name} has no gradient"
        if role(name)[0] != "central":
            return torch.cat([value for value in found.values() if value is not None]).reshape(stored.shape)
        lora = torch.stack([value for own, value in found.items() if value is not None and own.startswith("lora.")]).sum(0)
        return torch.cat([lora, *(value for own, value in found.items() if value is not None and own.startswith("prefix."))])

    def _length(self) -> int:
        config = self.spec["config"]
        embed = next((v for k, v in self.trained.items() if role(k)[1] == "shared.embed"), None)
        return len(embed) if embed is not None else int(config["prefix_len"])

    def _methods(self) -> dict[str, Any]:
        shapes = {role(k): v.shape for k, v in self.trained.items()}
        self.gated = {part for part, place in shapes if place.startswith("gates")}
        self.gated |= {"lora", "prefix"} if "central" in self.gated else set()
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


def _fill(parameter: Tensor, value: Tensor) -> bool:
    with torch.no_grad():
        parameter.copy_(value)
    return True
