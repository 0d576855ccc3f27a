"""Tiny random models of the ways in which images reach words: by an id, by a mask, by cross-attention, among the words, or in an encoder alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE_ID = 60
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "max_position_embeddings": 64, **SMALL, **IDS}
LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}  # four patches, and a class token before them
PIXELS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VQ = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
WORDS = {"<image>": IMAGE_ID, **{f"IMGIMG{a}{b}Z": 10 + 4 * i + j for i, a in enumerate("ABCD") for j, b in enumerate("ABCD")}}


def git() -> Any:
    return hf.GitForCausalLM(hf.GitConfig(vision_config=VISION, **TEXT))


def idefics(resampler: bool = False) -> Any:
    vision = {"embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    perceiver = {"use_resampler": resampler, "resampler_depth": 2, "resampler_head_dim": 8, "resampler_n_heads": 2, "resampler_n_latents": 4}
    config = hf.IdeficsConfig(**TEXT, additional_vocab_size=0, cross_layer_interval=1, use_resampler=resampler, vision_config=vision, perceiver_config=perceiver)
    return hf.IdeficsForVisionText2Text(config)


def _blip() -> Any:
    text = {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16, "sep_token_id": 2, "is_decoder": True}
    return hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)


def chameleon() -> Any:
    return hf.ChameleonForConditionalGeneration(hf.ChameleonConfig(**{**TEXT, "max_position_embeddings": 96}, num_key_value_heads=4, vocabulary_map=WORDS, vq_config=VQ))


def kosmos2() -> Any:
    text = {"vocab_size": 64, "max_position_embeddings": 64, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, **IDS}
    return hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4))


def florence2() -> Any:
    text = {
        "model_type": "bart", "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, **IDS, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    vision = {
        "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2], "depths": [1, 1], "window_size": 2, "patch_size": [3, 3], "patch_stride": [4, 2], "patch_padding": [1, 1],
        "patch_prenorm": [False, True], "projection_dim": 32, "max_position_embeddings": 8, "max_temporal_embeddings": 4,
    }  # fmt: skip
    return hf.Florence2ForConditionalGeneration(hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE_ID, is_encoder_decoder=True))


def fuyu() -> Any:
    config = hf.FuyuConfig(**TEXT, image_size=16, patch_size=8, num_channels=3, image_token_id=IMAGE_ID, text_config={"model_type": "persimmon", **TEXT})
    return hf.FuyuForCausalLM(config)


def pix2struct() -> Any:
    text = {"vocab_size": 64, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 14, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 8}
    return hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(text_config=text, vision_config=vision, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))


def trocr_like() -> Any:
    decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return hf.VisionEncoderDecoderModel(config=config)


def vilt() -> Any:
    return hf.ViltForQuestionAnswering(hf.ViltConfig(**TEXT, image_size=16, patch_size=8, max_image_length=-1))


def llava() -> Any:
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config={"model_type": "clip_vision_model", **VISION}, text_config=LLAMA, image_token_id=IMAGE_ID))


def llava_of_no_id() -> Any:
    model = llava()
    model.config.image_token_id = None
    return model


ids_and_pixels: Callable[[Tensor], dict[str, Any]] = lambda ids: {"input_ids": ids, "pixel_values": PIXELS}
# name -> model, number of its image's tokens in the row, and what a call is given beside (or in place of) the ids
MODELS: dict[str, tuple[Callable[[], Any], int, Callable[[Tensor], dict[str, Any]]]] = {
    "git": (git, 0, ids_and_pixels),
    "idefics": (idefics, 0, lambda ids: {"input_ids": ids, "pixel_values": PIXELS[:, None], "image_attention_mask": torch.ones(*ids.shape, 1)}),
    "idefics_resampled": (
        lambda: idefics(resampler=True), 0, lambda ids: {"input_ids": ids, "pixel_values": PIXELS[:, None], "image_attention_mask": torch.ones(*ids.shape, 1)},
    ),
    "blip": (lambda: hf.BlipForConditionalGeneration(_blip()), 0, ids_and_pixels),
    "blip_vqa": (lambda: hf.BlipForQuestionAnswering(_blip()), 0, lambda ids: {**ids_and_pixels(ids), "labels": torch.full_like(ids, 7)}),
    "chameleon": (chameleon, 64, ids_and_pixels),
    "kosmos2": (kosmos2, 4, lambda ids: {**ids_and_pixels(ids), "image_embeds_position_mask": (ids == IMAGE_ID).long()}),
    "florence2": (florence2, 5, lambda ids: {"input_ids": ids, "pixel_values": PIXELS, "decoder_input_ids": ids[:, :2]}),
    "fuyu": (fuyu, 4, lambda ids: {"input_ids": ids, "image_patches": torch.rand(1, 4, 192)}),
    "pix2struct": (pix2struct, 0, lambda ids: {"flattened_patches": torch.rand(1, 8, 16) + 1, "labels": ids}),
    "trocr_like": (trocr_like, 0, lambda ids: {"pixel_values": PIXELS, "labels": ids}),
    "vilt": (vilt, 0, ids_and_pixels),
    "llava": (llava, 4, ids_and_pixels),
    "llava_of_no_id": (llava_of_no_id, 4, ids_and_pixels),
}  # fmt: skip


def made(name: str) -> Any:
    """The model in eval mode, with weights large enough for edits to show."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def row(name: str, n_words: int) -> tuple[Tensor, dict[str, Any]]:
    """ids, int64 [1, T]: a start token, the image's, and words; and the arguments of a call."""
    _, n_image, arguments = MODELS[name]
    ids = torch.tensor([[1, *[IMAGE_ID] * n_image, *range(33, 33 + n_words - 1)]])
    torch.manual_seed(1)
    return ids, arguments(ids)
