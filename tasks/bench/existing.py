"""Vision-language models that see already, by their sizes and with drawn weights: a training step of adalink's beside the usual one through peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from adalink import LoRA
from multimodal.batches.collate import collate, stacked
from multimodal.batches.packing import arrangement_of
from multimodal.batches.prepared import ImageBatch, Prepared
from multimodal.batches.tokenize import Row
from multimodal.existing.tower import ModelTower
from multimodal.model import VisionLanguageModel
from multimodal.template import Template
from tasks.bench.models import ALPHA, IGNORED, LLAMA_60M, PAD_ID, TINY_LLAMA, Machine, Shape, Step, Work, copied_lora, learn, new_optimizer

__all__ = ["LLAVA_60M", "QWEN2_VL_60M", "TINY_LLAVA", "TINY_QWEN2_VL", "existing_model", "existing_step", "is_existing"]

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"  # as Qwen2-VL spells them
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE, VIDEO, START, END)
LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"  # peft's target: the language model's, not the tower's
TEMPLATE = Template(prompt="<image> {question}", target="{text}", raw=True)


def _text(shape: Shape) -> dict[str, Any]:
    return {**shape.config.to_dict(), "dtype": None, "architectures": None}


def _llava(name: str, text: Shape, *, width: int, depth: int, heads: int, side: int, patch: int) -> Shape:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip
    return Shape(name=name, config=LlavaConfig(vision_config=vision, text_config=_text(text), image_token_id=SPECIAL.index(IMAGE)))


def _qwen(name: str, text: Shape, *, width: int, depth: int, heads: int, patch: int) -> Shape:
    vision = {"depth": depth, "embed_dim": width, "hidden_size": text.config.hidden_size, "num_heads": heads, "patch_size": patch, "spatial_merge_size": 2}
    each = text.config.hidden_size // text.config.num_attention_heads // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [each - 2 * (each // 3), each // 3, each // 3]}
    ids = {f"{name}_token_id": SPECIAL.index(token) for name, token in (("image", IMAGE), ("video", VIDEO), ("vision_start", START), ("vision_end", END))}
    words = {name: value for name, value in _text(text).items() if name not in ("model_type", "rope_parameters")}
    return Shape(name=name, config=Qwen2VLConfig(vision_config=vision, text_config={**words, "rope_parameters": rope}, **ids))


# The language model of 57 million parameters behind a tower of 22 million: 256 image tokens each, of 224 x 224 and of 448 x 448 pixels.
LLAVA_60M = _llava("llava60", LLAMA_60M, width=384, depth=12, heads=6, side=224, patch=14)
QWEN2_VL_60M = _qwen("qwen2vl60", LLAMA_60M, width=384, depth=12, heads=6, patch=14)
TINY_LLAVA = _llava("tiny llava", TINY_LLAMA, width=32, depth=2, heads=4, side=12, patch=4)
TINY_QWEN2_VL = _qwen("tiny qwen2vl", TINY_LLAMA, width=32, depth=2, heads=4, patch=14)


def is_existing(shape: Shape) -> bool:
    """Whether the model sees already."""
    return hasattr(shape.config, "vision_config")


def _processor(config: Any) -> Any:
    words = {word: number for number, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), config.get_text_config().vocab_size)}
    split = Tokenizer(WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=[IMAGE, VIDEO, START, END]
    )  # fmt: skip
    vision = config.vision_config
    if config.model_type == "llava":
        size = vision.image_size
        images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        counts = {"patch_size": vision.patch_size, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, image_token=IMAGE, **counts)
    sizes = {"patch_size": vision.patch_size, "merge_size": 2}
    few = {"size": {"shortest_edge": 16, "longest_edge": 2**24}}
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes, **few), tokenizer, Qwen2VLVideoProcessor(**sizes))


def _image(config: Any, work: Work) -> Image.Image:
    """An image of so many image tokens."""
    across = round(work.n_patches**0.5) * config.vision_config.patch_size * (1 if config.model_type == "llava" else 2)
    return Image.radial_gradient("L").convert("RGB").resize((across, across))


def existing_model(shape: Shape, machine: Machine, rank: int = 8) -> VisionLanguageModel:
    """The model with LoRA on queries and values of its language model, away from its start; the same weights each time."""
    torch.manual_seed(0)
    with machine.device:
        base: Any = AutoModelForImageTextToText.from_config(shape.config, dtype=machine.dtype, attn_implementation="sdpa")
    model = VisionLanguageModel.from_model(base.eval(), _processor(shape.config), template=TEMPLATE)
    model.add_adapter("bench", {"lora": LoRA(groups={"all": ("all",)}, rank=rank, alpha=ALPHA, targets=("q_proj", "v_proj"))})
    with torch.no_grad():
        for parameter in model.adapted.active_adapter().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model.to(machine.device)


def existing_step(side: str, shape: Shape, machine: Machine, work: Work, rank: int = 8, *, is_encoded: bool = True) -> Step:
    """A step of one side, on the same rows with the same weights.

    adalink  texts share their image; is_encoded: its vectors were cached, as by a run's first epoch; else the tower runs once for each image
    peft     the usual loop: one row for each text, its image through the tower for each row, logits of every token
    """
    model = existing_model(shape, machine, rank)
    tower = model.tower
    assert isinstance(tower, ModelTower)
    image = tower.preprocess(_image(shape.config, work))
    encoder, vocabulary = model.row_encoder(), shape.config.get_text_config().vocab_size
    rows = [encoder.row(text, image) for texts in work.texts(vocabulary) for text in texts]
    if side == "peft":
        return _their_step(model, shape, machine, rows, image, rank)
    arranged = list(arrangement_of(model)[0](rows))
    if is_encoded:
        image = tower.encode(ImageBatch(samples=(image,)).to(machine.device))[0]
    optimizer = new_optimizer(model.adapted.active_adapter().parameters())

    def step() -> float:
        batch = collate(arranged, [0] * len(arranged), stacked([image]), kind="patches", side="right", pad_id=PAD_ID)
        return learn(model(batch.to(machine.device)), optimizer)

    return step


def _their_step(ours: VisionLanguageModel, shape: Shape, machine: Machine, rows: Sequence[Row], image: Prepared, rank: int) -> Step:
    from peft import LoraConfig, get_peft_model  # an extra

    torch.manual_seed(0)
    with machine.device:
        base: Any = AutoModelForImageTextToText.from_config(shape.config, dtype=machine.dtype, attn_implementation="sdpa")
    model: Any = get_peft_model(base.eval().requires_grad_(False), LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=LANGUAGE))
    copied_lora(ours, model)
    ids = torch.tensor([[*row.ids, row.target[-1]] for row in rows], device=machine.device)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -len(rows[0].target) :] = ids[:, -len(rows[0].target) :]
    arguments: Mapping[str, Tensor] = {name: torch.cat([value] * len(rows)).to(machine.device) for name, value in image.inputs[0].items()}
    arguments = {name: value.to(machine.dtype) if value.is_floating_point() else value for name, value in arguments.items()}
    if shape.config.model_type != "llava":
        arguments = {**arguments, "mm_token_type_ids": (ids == SPECIAL.index(IMAGE)).long()}
    optimizer = new_optimizer(parameter for parameter in model.parameters() if parameter.requires_grad)

    def step() -> float:
        return learn(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False, **arguments).loss, optimizer)

    return step
