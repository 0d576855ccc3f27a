"""A tiny LLaVA with its processor, in transformers' format: the words of the embedded scenes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tasks.scenes.parts import language_folder

__all__ = ["save_llava"]

CHAT = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def save_llava(folder: Path, seed: int = 0, std: float = 0.02) -> None:
    """Write the model and its processor. std: of its weights; large enough, and edits show in what it writes."""
    tokenizer: Any = AutoTokenizer.from_pretrained(language_folder())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", **small, "image_size": 32, "patch_size": 16}
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **small, "initializer_range": std},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
