"""Vision-language models that see already, of each family: the library's own classes and processors, with tiny random weights.

`MADE[name]()` gives a model and its processor. Sizes of images, tiles and windows are small, and such that images have unlike numbers of tokens
wherever the family allows that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import transformers as hf
from PIL import Image
from sharing import in_double
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adalink.attachment.existing import image_token_ids

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEXTS = ("a red square left of a blue circle", "what color is the square? how many circles are there?", "User: Assistant: question answer yes no be brief")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
# Each part of a message in order; IMAGE stands for what the family's template writes for an image.
_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}"
)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n" + _PARTS + "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A start token, the system message before the first question, and the assistant called model (Gemma).
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set before = messages[0].content[0].text + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set before = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ before if loop.first else '' }}"
    "{% for p in m.content %}{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Roles in words; an answer begins with a space (Idefics3, SmolVLM).
IDEFICS_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
    + _PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@cache
def _pieces() -> str:
    """The tokenizer that all families have before their own tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False))
    return str(tokenizer.to_str())


def tokenizer_of(tokens: Sequence[str], *, eos: str = EOS, named: Mapping[str, str] | None = None) -> Any:
    """A tokenizer with these special tokens; named: attributes of it that name some of them (`image_token`)."""
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_pieces()), pad_token=PAD, bos_token=BOS, eos_token=eos, extra_special_tokens=dict(named or {}),
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": [*tokens]}, replace_extra_special_tokens=False)
    return made


def language(tokenizer: Any, kind: str, **settings: Any) -> dict[str, Any]:
    """The config of a tiny decoder."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"model_type": kind, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **SMALL, "num_key_value_heads": 2, **ids, **settings}


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


# ----------------------------------------
# LLaVA and its kin.


def llava() -> tuple[Any, Any]:
    words = tokenizer_of(["<image>", *ROLES])
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    chat = CHAT.replace("IMAGE", "<image>\n")
    processor = hf.LlavaProcessor(images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat)
    vision = {"model_type": "clip_vision_model", **VISION}
    config = hf.LlavaConfig(vision_config=vision, text_config=language(words, "llama"), image_token_index=_id(words, "<image>"))
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    words = tokenizer_of(["<image>", *ROLES])
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    chat = CHAT.replace("IMAGE", "<image>\n")
    processor = hf.LlavaNextProcessor(images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat)
    vision = {"model_type": "clip_vision_model", **VISION}
    text = language(words, "mistral", sliding_window=None)
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=_id(words, "<image>"), image_grid_pinpoints=PINPOINTS)
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer_of(["<image>", "<video>", *ROLES])
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    videos = hf.LlavaOnevisionVideoProcessor(size=SQUARE)
    processor = hf.LlavaOnevisionProcessor(images, words, videos, num_image_tokens=16, chat_template=CHAT.replace("IMAGE", "<image>\n"))
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=language(words, "qwen2"), image_token_index=_id(words, "<image>"), video_token_index=_id(words, "<video>"),
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def pixtral() -> tuple[Any, Any]:
    """LLaVA with Pixtral's tower: images in rows, with a token after each."""
    words, processor = _pixtral_processor(merge=1)
    vision = {"model_type": "pixtral", **VISION, "image_size": 64, "head_dim": 8}
    text = language(words, "mistral", sliding_window=None, head_dim=8)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_id(words, "[IMG]"), vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    return hf.LlavaForConditionalGeneration(config), processor


def mistral3() -> tuple[Any, Any]:
    words, processor = _pixtral_processor(merge=2)
    vision = {"model_type": "pixtral", **VISION, "image_size": 64, "head_dim": 8}
    text = language(words, "mistral", sliding_window=None, head_dim=8)
    config = hf.Mistral3Config(vision_config=vision, text_config=text, image_token_index=_id(words, "[IMG]"), spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config), processor


def _pixtral_processor(merge: int) -> tuple[Any, Any]:
    words = tokenizer_of(["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"])
    images = hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    chat = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]" + _PARTS.replace("IMAGE", "[IMG]") + "[/INST]"
        "{% elif m.role == 'assistant' %}" + _PARTS + "{{ eos_token }}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    )
    return words, hf.PixtralProcessor(images, words, patch_size=8, spatial_merge_size=merge, chat_template=chat)


# ----------------------------------------
# Qwen: any size of image, positions in three dimensions.


def _qwen(processor_kind: str, **settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    words = tokenizer_of([*tokens.values(), *ROLES])
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 20})
    videos = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(hf, processor_kind)(images, words, videos, chat_template=chat)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, **settings}
    return words, processor, {"rope_parameters": rope, **{name: _id(words, token) for name, token in tokens.items()}}


_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def qwen2_vl() -> tuple[Any, Any]:
    words, processor, ids = _qwen("Qwen2VLProcessor")
    text = language(words, "qwen2_vl_text", rope_parameters=ids.pop("rope_parameters"))
    config = hf.Qwen2VLConfig(text_config=text, vision_config={**_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}, **ids)
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    words, processor, ids = _qwen("Qwen2_5_VLProcessor")
    text = language(words, "qwen2_5_vl_text", rope_parameters=ids.pop("rope_parameters"))
    vision = {**_QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)), processor


def qwen3_vl() -> tuple[Any, Any]:
    """With deep features: layers of the tower are added to layers of the language model."""
    words, processor, ids = _qwen("Qwen3VLProcessor", mrope_interleaved=True)
    text = language(words, "qwen3_vl_text", rope_parameters=ids.pop("rope_parameters"), head_dim=8, num_hidden_layers=3)
    vision = {**_QWEN_VISION, "depth": 3, "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)), processor


# ----------------------------------------
# Gemma: images, or whole prompts, are read both ways.


def _paligemma(kind: str, **settings: Any) -> tuple[Any, Any]:
    words = tokenizer_of([], named={"image_token": "<image>"})
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words)
    text = language(words, kind, head_dim=8, tie_word_embeddings=False, **settings)  # tied, it repeats its last token
    config = hf.PaliGemmaConfig(vision_config={**SIGLIP, "projection_dim": 32}, text_config=text, image_token_index=_id(words, "<image>"), projection_dim=32, hidden_size=32, tie_word_embeddings=False)
    return hf.PaliGemmaForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    return _paligemma("gemma")


def paligemma2() -> tuple[Any, Any]:
    return _paligemma("gemma2", sliding_window=12, query_pre_attn_scalar=8)


def gemma3() -> tuple[Any, Any]:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer_of(["<start_of_turn>", "<end_of_turn>"], named=named)
    images = hf.Gemma3ImageProcessor(size=SQUARE)
    processor = hf.Gemma3Processor(images, words, chat_template=GEMMA_CHAT, image_seq_length=4)
    kinds = ["sliding_attention", "full_attention"]
    text = language(words, "gemma3_text", head_dim=8, sliding_window=12, query_pre_attn_scalar=8, layer_types=kinds, tie_word_embeddings=False)
    ids = {"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
    config = hf.Gemma3Config(vision_config=SIGLIP, text_config=text, mm_tokens_per_image=4, tie_word_embeddings=False, **{name: _id(words, token) for name, token in ids.items()})
    model = hf.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [_id(words, EOS), _id(words, "<end_of_turn>")]
    return model, processor


# ----------------------------------------
# Idefics: an image in tiles, each of them between words of its own.

_IDEFICS_TOKENS = (
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *(f"<row_{a}_col_{b}>" for a in (1, 2) for b in (1, 2)),
)  # fmt: skip


def idefics2() -> tuple[Any, Any]:
    """Its processor has a call of its own."""
    words = tokenizer_of(["<fake_token_around_image>", "<image>", "<end_of_utterance>"], eos="<end_of_utterance>")
    images = hf.Idefics2ImageProcessor(size={"shortest_edge": 24, "longest_edge": 32}, do_image_splitting=False)
    processor = hf.Idefics2Processor(images, words, image_seq_len=4, chat_template=IDEFICS_CHAT)
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}
    text = language(words, "mistral", sliding_window=None)
    config = hf.Idefics2Config(vision_config=VISION, perceiver_config=perceiver, text_config=text, image_token_id=_id(words, "<image>"))
    return hf.Idefics2ForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    words = tokenizer_of(_IDEFICS_TOKENS, eos="<end_of_utterance>")
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS_CHAT)
    text = language(words, "llama")
    config = hf.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=_id(words, "<image>"), scale_factor=2, pad_token_id=0)
    return hf.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    words = tokenizer_of(_IDEFICS_TOKENS, eos="<end_of_utterance>")
    images = hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    videos = hf.SmolVLMVideoProcessor(size={"longest_edge": 32}, video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}})
    processor = hf.SmolVLMProcessor(images, words, videos, image_seq_len=4, chat_template=IDEFICS_CHAT)
    text = language(words, "llama")
    config = hf.SmolVLMConfig(vision_config=VISION, text_config=text, image_token_id=_id(words, "<image>"), scale_factor=2, pad_token_id=0)
    return hf.SmolVLMForConditionalGeneration(config), processor


# ----------------------------------------
# InternVL, and BLIP-2, whose image tokens come before the text.


def internvl() -> tuple[Any, Any]:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer_of(ROLES, named=named)
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = hf.InternVLProcessor(images, words, hf.InternVLVideoProcessor(size=SQUARE), image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"))
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=language(words, "qwen2"), image_token_id=_id(words, "<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5
    )
    return hf.InternVLForConditionalGeneration(config), processor


def blip2() -> tuple[Any, Any]:
    words = tokenizer_of(["<image>"])
    processor = hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), words, num_query_tokens=4)
    qformer = {"vocab_size": 64, **SMALL, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {**language(words, "opt", ffn_dim=48, word_embed_proj_dim=32), "num_key_value_heads": None}
    config = hf.Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=_id(words, "<image>"), image_text_hidden_size=16
    )
    return hf.Blip2ForConditionalGeneration(config), processor


def instructblip() -> tuple[Any, Any]:
    """Refused: an image's vectors depend on the question."""
    words = tokenizer_of(["<image>"])
    processor = hf.InstructBlipProcessor(hf.BlipImageProcessor(size=SQUARE), words, tokenizer_of([]), num_query_tokens=4)
    qformer = {"vocab_size": len(words), **SMALL, "encoder_hidden_size": 32}
    text = {**language(words, "opt", ffn_dim=48, word_embed_proj_dim=32), "num_key_value_heads": None}
    config = hf.InstructBlipConfig(vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=_id(words, "<image>"))
    return hf.InstructBlipForConditionalGeneration(config), processor


MADE: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    made.__name__: made
    for made in (
        llava, llava_next, llava_onevision, pixtral, mistral3, qwen2_vl, qwen2_5_vl, qwen3_vl, paligemma, paligemma2, gemma3, idefics2, idefics3, smolvlm, internvl,
        blip2,
    )
}  # fmt: skip


def made(name: str) -> tuple[Any, Any]:
    """A model in float64 and eval mode with weights large enough for every token to matter, and its processor. To be used inside `in_double`."""
    torch.manual_seed(1)
    with in_double():
        model, processor = MADE[name]()
        model = model.double().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            model.get_output_embeddings().weight[list(image_token_ids(model))] = 0.0  # it never writes an image
    return model, processor


def images() -> list[Image.Image]:
    """Three images of unlike shapes."""
    gray = Image.linear_gradient("L"), Image.radial_gradient("L")
    return [
        Image.merge("RGB", [gray[a].rotate(turn), gray[b], gray[c]]).resize(size)
        for a, b, c, turn, size in ((0, 1, 0, 0, (40, 30)), (1, 0, 1, 0, (70, 24)), (0, 0, 1, 90, (24, 60)))
    ]
