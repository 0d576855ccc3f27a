"""Cases in the form of fixtures/unipelt on other families: transformers' models with LoRA, prefix and adapter as the formulas say, by plain hooks.

The prefix is concatenated to keys and values where attention is computed; nothing here uses the package under test.
"""

from __future__ import annotations

from typing import Any

import torch
from double import InDouble
from hosts import host
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WIDTH, VOCABULARY = 32, 96
GROUPED: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 40}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"num_key_value_heads": 2},
    "qwen2": GROUPED | {"num_key_value_heads": 1},
    "opt": {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40, "dropout": 0.0},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "made_llama_apl": {"kind": "llama"},
    "made_llama_ap_left": {"kind": "llama", "parts": "AP", "left": True},
    "made_qwen2_apl_left": {"kind": "qwen2", "rank": 2, "left": True},
    "made_opt_apl": {"kind": "opt", "length": 3, "width": 5},
    "made_opt_apl_without_gates": {"kind": "opt", "gates": False},
}
Weights = dict[str, Tensor]


def made(*, kind: str, parts: str = "APL", gates: bool = True, left: bool = False, length: int = 5, hidden: int = 16, rank: int = 4, width: int = 8) -> tuple[Any, Weights]:
    """(what the .json says, the tensors)."""
    torch.manual_seed(4)
    with InDouble():
        model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **KINDS[kind])).double()
        generator = torch.Generator().manual_seed(9)
        frozen = {name: _random(value.shape, generator, mean=float("norm" in name and name.endswith("weight"))) for name, value in model.state_dict().items()}
        config = {"model": kind, "heads": KINDS[kind]["num_attention_heads"], "act": "relu" if kind == "opt" else "silu", "eps": 1e-5, "max_position": 40,
                  "prefix_len": length, "lora_alpha": 16}  # fmt: skip
        model = host(config, frozen)
        model.requires_grad_(False)
        stack = "decoder.layers" if kind == "opt" else "layers"
        trained = {name: _random(shape, generator) for name, shape in _shapes(model, stack, parts, gates, length, hidden, rank, width).items()}
        tensors = {f"w.{name}": value for name, value in (frozen | trained).items()} | _inputs(generator, left)
        return {"config": config}, {name: value.detach().clone() for name, value in (tensors | _outputs(model, stack, trained, tensors)).items()}


def _random(shape: Any, generator: torch.Generator, mean: float = 0.0) -> Tensor:
    return mean + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _shapes(model: Any, stack: str, parts: str, gates: bool, length: int, hidden: int, rank: int, width: int) -> dict[str, tuple[int, ...]]:
    """AdapterHub's names."""
    layers = model.get_submodule(stack)
    n_key, pool = layers[0].self_attn.k_proj.out_features, f"{stack}.0.self_attn.prefix_tuning.pool.prefix_tunings.t.self_prefix"
    found: dict[str, tuple[int, ...]] = {f"{pool}.wte.weight": (length, WIDTH)}
    for number, (n_out, n_in) in {0: (hidden, WIDTH), 2: (2 * len(layers) * n_key, hidden)}.items():
        found |= {f"{pool}.control_trans.{number}.weight": (n_out, n_in), f"{pool}.control_trans.{number}.bias": (n_out,)}
    for i, layer in enumerate(layers):
        adapter, gated = f"{stack}.{i}.output_adapters.adapters.t", [f"{stack}.{i}.self_attn.prefix_tuning.prefix_gates.t"]
        for name, n_out, n_in in (("adapter_down.0", width, WIDTH), ("adapter_up", WIDTH, width)):
            found |= {f"{adapter}.{name}.weight": (n_out, n_in), f"{adapter}.{name}.bias": (n_out,)}
        gated.append(f"{adapter}.gate")
        for name in ("q_proj", "v_proj") if "L" in parts else ():
            loras = f"{stack}.{i}.self_attn.{name}.loras.t"
            found |= {f"{loras}.lora_A": (rank, WIDTH), f"{loras}.lora_B": (layer.self_attn.get_submodule(name).out_features, rank)}
            gated.append(f"{loras}.gate")
        found |= {f"{name}.{leaf}": shape for name in gated if gates for leaf, shape in (("weight", (1, WIDTH)), ("bias", (1,)))}
    return found


def _inputs(generator: torch.Generator, left: bool) -> Weights:
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()
    mask = mask.flip(1) if left else mask
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator) * mask
    return {"in.input_ids": ids, "in.attention_mask": mask, "in.position_ids": (mask.cumsum(1) - 1).clamp(min=0), "in.loss_weight": _random((3, 7, WIDTH), generator) * mask[..., None]}


def _outputs(model: Any, stack: str, trained: Weights, tensors: Weights) -> Weights:
    weights = {name: value.requires_grad_() for name, value in trained.items()}
    gates: Weights = {}
    layers = model.get_submodule(stack)
    keys_values = _prefix(weights, len(layers))
    at = {id(layer.self_attn): f"{stack}.{i}.self_attn.prefix_tuning.prefix_gates.t" for i, layer in enumerate(layers)}
    read: dict[int, Tensor] = {}

    def gate(name: str, x: Tensor) -> Tensor | float:
        if f"{name}.weight" not in weights:
            return 1.0
        gates[f"gate.{name}"] = torch.sigmoid(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).mean(1)
        return gates[f"gate.{name}"][:, None]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any) -> Any:
        number = list(at).index(id(module))
        opened = gate(at[id(module)], read[id(module)])
        for_all = [part.unflatten(1, (key.shape[1], -1)).transpose(0, 1).expand(len(key), -1, -1, -1) for part in keys_values[number]]
        scaled = [part * (opened if isinstance(opened, float) else opened[..., None]) for part in for_all]
        keys, values = (torch.cat(pair, 2).repeat_interleave(query.shape[1] // key.shape[1], 1) for pair in zip(scaled, (key, value), strict=True))
        scores = query @ keys.transpose(2, 3) * settings["scaling"] + nn.functional.pad(mask, (scaled[0].shape[2], 0))
        return (scores.softmax(-1) @ values).transpose(1, 2), None

    def low_rank(name: str, x: Tensor, h: Tensor) -> Tensor:
        if f"{name}.lora_A" not in weights:
            return h
        rank = len(weights[f"{name}.lora_A"])
        scale = gate(f"{name}.gate", x) if f"{name}.gate.weight" in weights else 16 / rank
        return h + scale * (x @ weights[f"{name}.lora_A"].T @ weights[f"{name}.lora_B"].T)

    def adapted(name: str, h: Tensor) -> Tensor:
        inner = torch.relu(h @ weights[f"{name}.adapter_down.0.weight"].T + weights[f"{name}.adapter_down.0.bias"])
        return h + gate(f"{name}.gate", h) * (inner @ weights[f"{name}.adapter_up.weight"].T + weights[f"{name}.adapter_up.bias"])

    for i, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda m, args, kwargs: read.update({id(m): args[0] if args else kwargs["hidden_states"]}), with_kwargs=True)
        for name in ("q_proj", "v_proj"):
            where = f"{stack}.{i}.self_attn.{name}.loras.t"
            layer.self_attn.get_submodule(name).register_forward_hook(lambda m, args, out, where=where: low_rank(where, args[0], out))
        place = f"{stack}.{i}.output_adapters.adapters.t"
        layer.register_forward_hook(lambda m, args, out, place=place: adapted(place, out) if isinstance(out, Tensor) else (adapted(place, out[0]), *out[1:]))
    ALL_ATTENTION_FUNCTIONS["prefixed"] = attention
    model.config._attn_implementation = "prefixed"
    inputs = {name.removeprefix("in."): value for name, value in tensors.items() if name in ("in.input_ids", "in.attention_mask", "in.position_ids")}
    mask = torch.ones(7, 7, dtype=torch.bool).tril() & inputs.pop("attention_mask")[:, None].bool()
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)[:, None]
    output = model(**inputs, attention_mask=additive, use_cache=False, output_hidden_states=True)
    loss = (output.last_hidden_state * tensors["in.loss_weight"]).sum()
    loss.backward()
    found = {"out.last_hidden_state": output.last_hidden_state, "out.loss": loss[None]} | gates | {f"grad.{name}": value.grad for name, value in weights.items() if value.grad is not None}
    return found | {f"out.hidden_states.{i}": value for i, value in enumerate(output.hidden_states)}


def _prefix(weights: Weights, n_layers: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, n] of each layer."""
    name = next(name.removesuffix(".wte.weight") for name in weights if name.endswith("self_prefix.wte.weight"))
    inner = torch.tanh(weights[f"{name}.wte.weight"] @ weights[f"{name}.control_trans.0.weight"].T + weights[f"{name}.control_trans.0.bias"])
    parts = (inner @ weights[f"{name}.control_trans.2.weight"].T + weights[f"{name}.control_trans.2.bias"]).chunk(2 * n_layers, 1)
    return list(zip(parts[::2], parts[1::2], strict=True))
