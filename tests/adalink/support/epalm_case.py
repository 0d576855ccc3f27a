"""One file of fixtures/epalm, or one made in the same form: the model, the adapter and the inputs that its .json describes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fixture_file import FixtureFile
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from adalink import EPALM, PAD, PERCEPT, PROMPT, TEXT, Adapter, Anatomy, InputSpec, Method, Prompt, TokenMap
from multimodal.encoders.tower import VisionTower, load_tower

ROLES = {  # the official names of the soft prompt's tensors, and ours
    "prompt_module.prefix_embedding.0.weight": "prompt.soft.table",
    "prompt_module.prefix_embedding.1.weight": "prompt.soft.layers.0.weight",
    "prompt_module.prefix_embedding.1.bias": "prompt.soft.layers.0.bias",
    "prompt_module.prefix_embedding.3.weight": "prompt.soft.layers.2.weight",
    "prompt_module.prefix_embedding.3.bias": "prompt.soft.layers.2.bias",
}


@dataclass(frozen=True)
class Case(FixtureFile):
    """The model, its adapter and its inputs."""

    @property
    def injected(self) -> dict[int, int]:
        """Layer -> number of the tap before it."""
        return {int(layer): tap for layer, tap in self.spec["layer_to_prefix_index"].items()}

    @property
    def window(self) -> tuple[int, int]:
        return min(self.injected), max(self.injected) + 1

    @property
    def n_taps(self) -> int:
        return len(self.spec["cls_blocks_used"])

    @property
    def n_slots(self) -> int:
        return 1 + self.prompt_length

    @property
    def prompt_length(self) -> int:
        return int(self.spec["prompt_len"]) if "prompt_module.prefix_embedding.0.weight" in self.tensors else 0

    @property
    def is_exact_with_a_cache(self) -> bool:
        return self.window[1] >= self.spec["opt"]["num_hidden_layers"] - 1

    def model(self) -> OPTForCausalLM:
        sizes = dict(self.spec["opt"])
        names = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "word_embed_proj_dim",
                 "do_layer_norm_before")  # fmt: skip
        tokens = self.spec["tokens"]
        is_tied = "opt.lm_head.weight" not in self.tensors
        is_normed = "opt.model.decoder.final_layer_norm.weight" in self.tensors
        config = OPTConfig(
            **{name: sizes[name] for name in names}, activation_function=sizes.get("activation", "relu"), _remove_final_layer_norm=not is_normed,
            tie_word_embeddings=is_tied, pad_token_id=tokens["pad"], bos_token_id=tokens["bos_eos"], eos_token_id=tokens["bos_eos"], dropout=0.1,
        )  # fmt: skip
        model = OPTForCausalLM(config).double().eval()
        missing, unexpected = model.load_state_dict(self.under("opt."), strict=False)
        assert not unexpected
        assert set(missing) <= ({"lm_head.weight"} if is_tied else set())
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = sizes.get("layer_norm_eps", 1e-5)
        return model

    def methods(self, mask: str = "published") -> dict[str, Method]:
        connector = "shared" if self.spec["shared_connector"] else "per_tap"
        methods: dict[str, Method] = {"epalm": EPALM(layers=self.window, n_taps=self.n_taps, connector=connector, mask=mask)}  # type: ignore[arg-type]
        if self.prompt_length:
            form = "mlp" if self.spec["prompt_mlp"] else "table"
            methods["prompt"] = Prompt(length=self.prompt_length, init_std=1.0, form=form, positions="none")  # type: ignore[arg-type]
        return methods

    def adapter(self, model: nn.Module, mask: str = "published") -> Adapter:
        """The adapter with the fixture's weights; every tensor of the fixture that is read at all has its place."""
        vit = self.spec["vit"]
        adapter = Adapter(self.methods(mask), Anatomy.read(model, {"image_taps": InputSpec(vit["depth"], vit["embed_dim"])})).double()
        parameters = dict(adapter.named_parameters())
        named = {ours: self.tensors[official] for official, ours in self.roles().items()}
        assert set(named) == set(parameters)
        with torch.no_grad():
            for name, value in named.items():
                parameters[name].copy_(value)
        return adapter

    def roles(self) -> dict[str, str]:
        """Official name -> ours, for every trained tensor that a layer reads."""
        roles = {official: ours for official, ours in ROLES.items() if official in self.tensors}
        taps = [min(self.injected.values())] if self.spec["shared_connector"] else sorted(set(self.injected.values()))
        return roles | {f"connector.{tap}.{part}": f"epalm.tap{tap}.project.{part}" for tap in taps for part in ("weight", "bias")}

    def with_slots(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask, domain: the percept's slot and the prompt's before each row."""
        slots = torch.tensor([PERCEPT] + [PROMPT] * self.prompt_length).expand(len(ids), -1)
        domain = torch.cat([slots, torch.full_like(ids, TEXT).masked_fill(mask == 0, PAD)], 1)
        return torch.cat([torch.full_like(slots, 5), ids], 1), torch.cat([torch.ones_like(slots), mask], 1), domain

    def token_map(self, domain: Tensor, taps: Tensor) -> TokenMap:
        """taps: float64 [B, L, Dv]."""
        return TokenMap(domain, torch.zeros(len(domain), dtype=torch.int64), {"image_taps": taps}, generated=TEXT)

    def taps(self) -> Tensor:
        """float64 [B, L, Dv]: the normed class token of every block, from the images where the case has them."""
        if "in.images" in self.tensors:
            return self.tower()(self.tensors["in.images"]).pooled.transpose(0, 1)
        return self.tensors["mid.vit_cls_normed"].double().transpose(0, 1)

    def tower(self) -> VisionTower:
        """The case's encoder, float64."""
        return _tower(self.spec["vit"], self.under("vit."))

    def generations(self) -> list[tuple[str, list[int], int]]:
        """(key of the expected ids, the rows asked about, beams)."""
        found = []
        for key in sorted(self.tensors):
            if match := re.fullmatch(r"gen\.(batch|single(\d+))\.(greedy|beam(\d+))", key):
                rows = [int(match[2])] if match[2] else list(range(len(self.tensors["gen.prompt_ids"])))
                found.append((key, rows, int(match[4] or 1)))
        return found


def _tower(sizes: Mapping[str, Any], weights: dict[str, Tensor]) -> VisionTower:
    """The frozen encoder, loaded from files as a user's would be."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "in_chans")
    arguments = {name: sizes[name] for name in names if name in sizes}
    image = {"input_size": [3, sizes["img_size"], sizes["img_size"]]}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": image}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file({name: value.contiguous() for name, value in weights.items()}, Path(folder) / "model.safetensors")
        return load_tower(folder, dtype=torch.float64)
