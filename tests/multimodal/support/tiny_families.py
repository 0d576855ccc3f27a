"""A tiny float64 model of the real class of every family that texts are packed or forked in."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY, WIDTH, N_LAYERS = 64, 32, 2
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = {"n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

# name -> class, what its config is given, and how exactly float64 is kept: most norms of the first column compute in float32
SETTINGS: dict[str, tuple[str, dict[str, Any], float]] = {
    "opt": ("OPT", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 128}, 1e-10),
    "gpt2": ("GPT2", GPT, 1e-10),
    "gpt_neox": ("GPTNeoX", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 128}, 1e-10),
    "phi": ("Phi", GATED, 1e-10),
    "stablelm": ("StableLm", GATED, 1e-10),
    "falcon": ("Falcon", {**SIZES, "alibi": False, "new_decoder_architecture": False}, 1e-10),
    "biogpt": ("BioGpt", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 128}, 1e-10),
    "llama": ("Llama", GATED, 1e-6),
    "mistral": ("Mistral", {**GATED, "sliding_window": None}, 1e-6),
    "mistral_window": ("Mistral", {**GATED, "sliding_window": 6}, 1e-6),
    "qwen2": ("Qwen2", GATED, 1e-6),
    "qwen2_window": ("Qwen2", {**GATED, **WINDOWED, "use_sliding_window": True}, 1e-6),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 8}, 1e-6),
    "gemma": ("Gemma", {**GATED, "head_dim": 8}, 1e-6),
    "gemma2": ("Gemma2", {**GATED, "head_dim": 8, **WINDOWED, "query_pre_attn_scalar": 8}, 1e-6),
    "gemma3": ("Gemma3", {**GATED, "head_dim": 8, **WINDOWED, "query_pre_attn_scalar": 8}, 1e-6),
    "phi3": ("Phi3", GATED, 1e-6),
    "phi3_window": ("Phi3", {**GATED, "sliding_window": 6}, 1e-6),
    "olmo2": ("Olmo2", GATED, 1e-6),
    "smollm3": ("SmolLM3", GATED, 1e-6),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}, 1e-10),
    "gpt_neo": ("GPTNeo", {"hidden_size": WIDTH, "num_layers": N_LAYERS, "num_heads": 4, "attention_types": [[["global"], 2]], "max_position_embeddings": 128}, 1e-10),
    "xglm": ("XGLM", {"d_model": WIDTH, "ffn_dim": 48, "num_layers": N_LAYERS, "attention_heads": 4, "max_position_embeddings": 128}, 1e-10),
    # Not packed.
    "gpt_neo_local": (
        "GPTNeo",
        {"hidden_size": WIDTH, "num_layers": N_LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6, "max_position_embeddings": 128},
        1e-10,
    ),
    "falcon_alibi": ("Falcon", {**SIZES, "alibi": True, "new_decoder_architecture": False}, 1e-6),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": N_LAYERS, "n_head": 4}, 1e-6),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_heads": 4, "n_layers": N_LAYERS, "max_seq_len": 128, "expansion_ratio": 2}, 1e-6),
    "olmo": ("Olmo", GATED, 1e-6),
    "cohere": ("Cohere", GATED, 1e-6),
    "mamba": ("Mamba", {"hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "state_size": 8}, 1e-6),
}

# Masks or positions of their own, where rows are most easily taken for something else.
HARD = ("mistral_window", "qwen2_window", "gemma2", "gemma3", "gpt_neo", "falcon_alibi", "bloom", "mamba")


def tiny_of(name: str, attention: str = "sdpa") -> Any:
    """The frozen model. Random weights far from a model's own start, so that everything it does shows."""
    kind, settings, _ = SETTINGS[name]
    text = {"Gemma3": "Gemma3Text"}.get(kind, kind)
    torch.manual_seed(0)
    config = getattr(transformers, f"{text}Config")(vocab_size=VOCABULARY, **settings, **IDS)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.double().eval().requires_grad_(False)
