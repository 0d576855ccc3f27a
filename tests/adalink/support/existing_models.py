"""Tiny random vision-language models of real classes, each with a batch as its processor would make it: left-padded, some rows with two images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from copied import copied
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Gemma3Config,
    Idefics3Config,
    InstructBlipConfig,
    InternVLConfig,
    LlavaConfig,
    OPTConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
    T5Config,
)

VOCABULARY, WIDTH, IMAGE_ID, START, END = 64, 32, 63, 61, 62
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCABULARY, **SMALL, "num_key_value_heads": 2, **IDS}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"image_token_id": IMAGE_ID, "video_token_id": 60, "vision_start_token_id": START, "vision_end_token_id": END}
QFORMER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "encoder_hidden_size": 16,
    "cross_attention_frequency": 1,
}  # fmt: skip
OPT = OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, **IDS)  # fmt: skip
T5 = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: LlavaConfig(vision_config={"model_type": "clip_vision_model", **VISION}, text_config={"model_type": "llama", **TEXT}, image_token_index=IMAGE_ID),
    "qwen2_vl": lambda: Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}, text_config={**TEXT, "rope_parameters": MROPE}, **QWEN
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config={"depth": 2, "hidden_size": 16, "out_hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 24, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": MROPE}, **QWEN,
    ),
    "paligemma": lambda: PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION}, text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        image_token_index=IMAGE_ID, projection_dim=WIDTH,
    ),
    "paligemma2": lambda: PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION}, text_config={"model_type": "gemma2", **TEXT, "head_dim": 8, "sliding_window": 8},
        image_token_index=IMAGE_ID, projection_dim=WIDTH,
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config={**VISION}, text_config={**TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        image_token_index=IMAGE_ID, boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=4,
    ),
    "blip2_opt": lambda: Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=OPT, num_query_tokens=4, image_token_index=IMAGE_ID),
    "blip2_t5": lambda: Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=T5, num_query_tokens=4, image_token_index=IMAGE_ID),
    "instructblip": lambda: InstructBlipConfig(vision_config=VISION, qformer_config=QFORMER, text_config=OPT, num_query_tokens=4, image_token_index=IMAGE_ID),
    "idefics3": lambda: Idefics3Config(vision_config=VISION, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE_ID, scale_factor=1, pad_token_id=0),
    "smolvlm": lambda: SmolVLMConfig(vision_config=VISION, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE_ID, scale_factor=1, pad_token_id=0),
    "internvl": lambda: InternVLConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE_ID, image_seq_length=4,
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
ENCODER_DECODERS = ("blip2_t5",)
DECODERS = tuple(family for family in FAMILIES if family not in ENCODER_DECODERS)
ONE_PICTURE_A_ROW = ("blip2_opt", "blip2_t5", "instructblip", "paligemma", "paligemma2")


@copied
def existing(family: str, seed: int = 0) -> Any:
    """A float64 model through AutoModelForImageTextToText, with weights large enough for edits to show."""
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(CONFIGS[family]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight") and "gemma" not in type(model).__name__.lower()  # Gemma's is 1 + weight
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if family == "blip2_t5" else 0.15) + (1.0 if is_scale else 0.0))
    return model.double().eval().requires_grad_(False)


def batch(family: str, seed: int = 5, images: Sequence[int] = (1, 2, 1)) -> dict[str, Any]:
    """Rows of 4, 6 and 5 words around one or two images of 4 tokens each, left-padded; what the family's processor adds."""
    generator = torch.Generator().manual_seed(seed)
    n_images = [1] * len(images) if family in ONE_PICTURE_A_ROW else list(images)
    rows = []
    for n_words, n in zip((4, 6, 5), n_images, strict=True):
        words = torch.randint(3, 59, (n_words,), generator=generator).tolist()
        image = [START, *[IMAGE_ID] * 4, END]
        rows.append([1, *image * n, *words])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    result: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long(), **_pixels(family, n_images, generator)}
    if family.startswith("paligemma") or family == "gemma3":
        result["token_type_ids"] = (ids == IMAGE_ID).long() if family == "gemma3" else torch.zeros_like(ids)
    if family.startswith("qwen"):
        result["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    return result


def _pixels(family: str, n_images: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    n = sum(n_images)
    if family.startswith("qwen"):  # each image 4 x 4 patches of 4 x 4, twice in time; 2 x 2 of them make one token
        return {"pixel_values": torch.randn(n * 16, 3 * 2 * 4 * 4, generator=generator).double(), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}
    size = 16 if family == "internvl" else 8
    pixels = torch.randn(n, 3, size, size, generator=generator).double()
    if family == "instructblip":
        return {"pixel_values": pixels, "qformer_input_ids": torch.tensor([[5, 6]] * n)}
    if family not in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels}
    by_row = torch.zeros(len(n_images), max(n_images), 3, size, size, dtype=torch.float64)  # an all-zero image is padding there
    first = 0
    for i, count in enumerate(n_images):
        by_row[i, :count] = pixels[first : first + count]
        first += count
    return {"pixel_values": by_row}


def answers(family: str, inputs: dict[str, Any], n: int = 3, seed: int = 6) -> dict[str, Any]:
    """The inputs with an answer of `n` tokens after each prompt, labelled: what one trains on."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(3, 59, (len(inputs["input_ids"]), n), generator=generator)
    if family in ENCODER_DECODERS:
        return {**inputs, "labels": answer}
    result = dict(inputs)
    for name, value in (("input_ids", answer), ("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 1 if family.startswith("pali") else 0)):
        if name in inputs:
            more = value if isinstance(value, Tensor) else torch.full_like(answer, value)
            result[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
    result["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    return result


def excite(module: nn.Module, seed: int = 1) -> None:
    """Move every weight away from its start, where many methods are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
