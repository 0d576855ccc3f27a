"""Tiny vision-language models that see already, with their own processors, as folders in transformers' format: LLaVA's shape and Qwen2-VL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEXTS = ("a red square left of a blue circle", "what color is the square? how many circles are there?", "user assistant system question answer yes no")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_seeing(family: str, folder: Path) -> Path:
    """Write a model of this family with random weights, and its processor."""
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "qwen2_vl": _qwen2_vl}[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _words(*tokens: str) -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>", *tokens, *ROLES], pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=[*tokens, *ROLES]
    )


def _text(words: Any, **more: Any) -> dict[str, Any]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": len(words), "max_position_embeddings": 512, **SMALL, "num_key_value_heads": 2, **ids, **more}


def _llava() -> tuple[Any, Any]:
    words = _words("<image>")
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", "<image>")
    )  # fmt: skip
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 8}
    config = hf.LlavaConfig(
        vision_config=vision, text_config=_text(words, model_type="llama"), image_token_id=words.convert_tokens_to_ids("<image>")
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    tokens = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>", "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    words = _words(*tokens.values())
    size = {"shortest_edge": 64, "longest_edge": 64 * 40}
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = hf.Qwen2VLProcessor(images, words, hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2), chat_template=chat)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2}
    ids = {name: words.convert_tokens_to_ids(token) for name, token in tokens.items()}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=_text(words, rope_parameters=rope), vision_config=vision, **ids)), processor
