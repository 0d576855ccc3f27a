"""Folders with the configs of published models, in their true sizes and without weights: what a dry run of a published recipe reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as hf
from existing_families import CHAT, IDEFICS_CHAT, ROLES, tokenizer_of
from transformers import BertConfig, CLIPConfig, OPTConfig, PreTrainedConfig, Qwen2Config, T5Config

__all__ = ["EXISTING", "SHAPES", "shape_folder"]

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


# Models that see already: their sizes, and processors that count an image's tokens as theirs do, with a tokenizer of few words.


def _smolvlm() -> tuple[Any, Any]:
    words = tokenizer_of(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"], eos="<end_of_utterance>")
    images = hf.SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    videos = hf.SmolVLMVideoProcessor(size={"longest_edge": 512}, video_sampling={"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}})
    text = {
        "model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192,
    }  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16, "image_size": 512}
    config = hf.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=words.convert_tokens_to_ids("<image>"), tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    return config, hf.SmolVLMProcessor(images, words, videos, image_seq_len=64, chat_template=IDEFICS_CHAT)


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    words = tokenizer_of([*tokens.values(), *ROLES])
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "max_position_embeddings": 128000, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16", **ids)
    images, videos = hf.Qwen2VLImageProcessor(patch_size=14, merge_size=2), hf.Qwen2VLVideoProcessor(patch_size=14, merge_size=2)
    return config, hf.Qwen2_5_VLProcessor(images, words, videos, chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"))


def _paligemma2() -> tuple[Any, Any]:
    words = tokenizer_of([], named={"image_token": "<image>"})
    images = hf.SiglipImageProcessor(size={"height": 224, "width": 224})
    images.image_seq_length = 256
    text = {
        "model_type": "gemma2", "vocab_size": 257216, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 224, "vision_use_head": False, "projection_dim": 2304,
    }  # fmt: skip
    image_id = words.convert_tokens_to_ids("<image>")
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2304, hidden_size=2304, image_token_index=image_id, dtype="bfloat16")
    return config, hf.PaliGemmaProcessor(images, words)


EXISTING = {"HuggingFaceTB/SmolVLM-256M-Instruct": _smolvlm, "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl, "google/paligemma2-3b-pt-224": _paligemma2}


def shape_folder(root: Path, name: str) -> str:
    """The folder of a published model's config (and its processor, where it sees already), or the name itself where a library holds the shape (timm)."""
    if name not in SHAPES and name not in EXISTING:
        return name
    folder = root / name.replace("/", "--")
    folder.mkdir(exist_ok=True)
    if name in EXISTING:
        config, processor = EXISTING[name]()
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)
    (folder / "config.json").write_text(json.dumps(SHAPES[name].to_dict()))
    return str(folder)
