"""Folders with the configs of published models, in their true sizes and without weights: what a dry run of a published recipe reads."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import BertConfig, CLIPConfig, OPTConfig, PreTrainedConfig, Qwen2Config, T5Config

__all__ = ["SHAPES", "shape_folder"]

# Sizes of the models' own config.json on the hub.
SHAPES: dict[str, PreTrainedConfig] = {
    "facebook/opt-125m": OPTConfig(dtype="float16"),
    "facebook/opt-2.7b": OPTConfig(hidden_size=2560, num_hidden_layers=32, ffn_dim=10240, num_attention_heads=32, word_embed_proj_dim=2560, dtype="float16"),
    "facebook/opt-6.7b": OPTConfig(hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, num_attention_heads=32, word_embed_proj_dim=4096, dtype="float16"),
    "Qwen/Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32768, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "google/flan-t5-xl": T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0, dtype="float32",
    ),
    "google-bert/bert-base-uncased": BertConfig(dtype="float32"),
    "openai/clip-vit-large-patch14": CLIPConfig(
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": 224},
        dtype="float32",
    ),
}  # fmt: skip


def shape_folder(root: Path, name: str) -> str:
    """The folder of a published model's config, or the name itself where a library holds the shape (timm)."""
    if name not in SHAPES:
        return name
    folder = root / name.replace("/", "--")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name].to_dict()))
    return str(folder)
