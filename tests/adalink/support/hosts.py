"""A frozen model of a real class, made from the weights that a fixture holds.

Sizes are read off the weights' names and shapes; what shapes do not tell (heads, activation, eps) is read off the .json, whatever it calls it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from double import FREQUENCIES, set_frequencies
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

HEADS = ("heads", "n_head", "n_heads", "num_heads", "num_attention_heads")
EPS = ("layer_norm_eps", "layernorm_eps", "ln_eps", "rms_norm_eps", "norm_eps", "layer_norm_epsilon", "eps")
ACTIVATION = ("act", "hidden_act", "activation_function", "activation", "feed_forward_proj", "mlp_act")
HEAD_DIM = ("head_dim", "d_kv")


def host(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The model in float64, in eval mode, with eager attention: with a head where the weights are those of a model that has one."""
    kind = _kind(config, weights)
    sizes = {"bert": _bert, "roberta": _bert, "gpt2": _gpt2, "opt": _opt, "t5": _t5}.get(kind, _llama)(config, weights)
    tied = config.get("tied_head", config.get("tied_lm_head", config.get("tie_word_embeddings", "lm_head.weight" not in weights)))
    made = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tied)
    has_head = "lm_head.weight" in weights or any(name.startswith(("transformer.", "model.", "decoder.block")) for name in weights)
    bare = {"add_pooling_layer": False} if kind in ("bert", "roberta") else {}
    maker: Any = AutoModel if not has_head else AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    frequencies = {name: value for name, value in weights.items() if name.endswith(FREQUENCIES)}
    weights = {name: value for name, value in weights.items() if name not in frequencies}
    model = maker.from_config(made, attn_implementation="eager", **({} if has_head else bare)).double()
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert set(missing) <= {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}, missing
    assert not unexpected, unexpected
    for module in model.modules():
        if kind == "opt" and isinstance(module, nn.LayerNorm):  # OPT has no setting for it
            module.eps = _stated(config, EPS, 1e-5)
    set_frequencies(model, frequencies)
    return model.eval()


def _kind(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """transformers' name of the architecture: said by the file, or seen in the names of its weights."""
    stated = str(config.get("model_type", config.get("model", config.get("text_kind", "")))).lower()
    for kind in ("roberta", "bert", "gpt2", "opt", "t5", "qwen2", "mistral", "llama"):
        if stated.startswith(kind):
            return kind
    seen = {"c_attn": "gpt2", "relative_attention_bias": "t5", "attention.self": "bert", "fc1": "opt", "q_proj.bias": "qwen2"}
    return next((kind for part, kind in seen.items() if any(part in name for name in weights)), "llama")


def _gpt2(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = _shape(weights, r"wte\.weight")
    return {
        "vocab_size": vocabulary, "n_embd": width, "n_layer": _layers(weights), "n_head": _stated(config, HEADS), "n_inner": _shape(weights, r"c_fc\.weight")[1],
        "n_positions": _shape(weights, r"wpe\.weight")[0], "activation_function": _act(config, "gelu_new"), "layer_norm_epsilon": _stated(config, EPS, 1e-5),
    }  # fmt: skip


def _opt(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, narrow = _shape(weights, r"embed_tokens\.weight")
    is_normed = any(re.search(r"decoder\.final_layer_norm|^final_layer_norm", name) for name in weights)
    return {
        "vocab_size": vocabulary, "word_embed_proj_dim": narrow, "hidden_size": _shape(weights, r"k_proj\.weight")[1], "ffn_dim": _shape(weights, r"fc1\.weight")[0],
        "num_hidden_layers": _layers(weights), "num_attention_heads": _stated(config, HEADS), "max_position_embeddings": _shape(weights, r"embed_positions\.weight")[0] - 2,
        "activation_function": _act(config, "relu"), "do_layer_norm_before": config.get("do_layer_norm_before", True), "_remove_final_layer_norm": not is_normed,
    }  # fmt: skip


def _bert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = _shape(weights, r"word_embeddings\.weight")
    return {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": _layers(weights), "num_attention_heads": _stated(config, HEADS),
        "intermediate_size": _shape(weights, r"intermediate\.dense\.weight")[0], "max_position_embeddings": _shape(weights, r"position_embeddings\.weight")[0],
        "type_vocab_size": _shape(weights, r"token_type_embeddings\.weight")[0], "hidden_act": _act(config, "gelu"), "layer_norm_eps": _stated(config, EPS, 1e-12),
    }  # fmt: skip


def _t5(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = _shape(weights, r"(shared|embed_tokens)\.weight")
    heads = _shape(weights, r"relative_attention_bias\.weight")
    is_gated = any("wi_0" in name for name in weights)
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": _shape(weights, r"SelfAttention\.q\.weight")[0] // heads[1], "num_heads": heads[1],
        "relative_attention_num_buckets": heads[0], "d_ff": _shape(weights, r"DenseReluDense\.wo\.weight")[1], "num_layers": _layers(weights),
        "feed_forward_proj": _act(config, "gated-gelu" if is_gated else "relu"), "layer_norm_epsilon": _stated(config, EPS, 1e-6), "decoder_start_token_id": 0,
    }  # fmt: skip


def _llama(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = _shape(weights, r"embed_tokens\.weight")
    heads = _stated(config, HEADS)
    head = _stated(config, HEAD_DIM, _shape(weights, r"q_proj\.weight")[0] // heads)
    positions = next((value for name, value in config.items() if "position" in name and isinstance(value, int)), 2048)
    settings = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": _layers(weights), "num_attention_heads": heads, "max_position_embeddings": positions,
        "num_key_value_heads": _shape(weights, r"k_proj\.weight")[0] // head, "intermediate_size": _shape(weights, r"up_proj\.weight")[0],
        "hidden_act": _act(config, "silu"), "rms_norm_eps": _stated(config, EPS, 1e-6), "rope_theta": _stated(config, ("rope_theta", "theta", "rope_base"), 10000.0),
    }  # fmt: skip
    settings["attention_bias"] = any("o_proj.bias" in name for name in weights)
    return settings | ({} if head * heads == width else {"head_dim": head}) | ({"sliding_window": config["sliding_window"]} if "sliding_window" in config else {})


def _shape(weights: Mapping[str, Tensor], pattern: str) -> torch.Size:
    return next(value.shape for name, value in weights.items() if re.search(rf"(^|\.){pattern}$", name))


def _layers(weights: Mapping[str, Tensor]) -> int:
    """Of the first stack, which is the encoder's where there are two."""
    found = [re.search(r"(?:^|\.)(?:layer|layers|h|block)\.(\d+)\.", name) for name in weights]
    return 1 + max(int(match[1]) for match in found if match)


def _stated(config: Mapping[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    found = next((config[name] for name in names if config.get(name) is not None), default)
    assert found is not None, f"the .json says none of {', '.join(names)}"
    return found


def _act(config: Mapping[str, Any], default: str) -> str:
    """`gelu (erf)` is transformers' gelu."""
    return str(_stated(config, ACTIVATION, default)).split(" ")[0].split("(")[0]

