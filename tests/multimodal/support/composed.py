"""Small composed models and their images: real classes, a tokenizer of known words, the embedded encoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any
from unittest import mock

import torch
from copied import copied
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from multimodal.encoders import bound_parts
from multimodal.encoders.tower import VisionTower, load_tower
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "question:", "answer:", "is", "it", "red", "?", "yes", "no", "a", "big", "cube", "ball")
ID = {word: number for number, word in enumerate(WORDS)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ("opt", "gpt2", "llama", "t5")


def tokenizer(*, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Splits at spaces; the id of a word is its place in WORDS."""
    words = Tokenizer(WordLevel(dict(ID), unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token=bos, eos_token="</s>", pad_token="<pad>")


def language(family: str, seed: int = 0) -> Language:
    """A frozen float64 language model with random weights; the encoder-decoder family has no start token."""
    return Language(model=_drawn(family, seed), tokenizer=tokenizer(bos=None if family == "t5" else "<s>"), name=f"tiny-{family}")


@copied
def _drawn(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = {
        "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=N_POSITIONS, dropout=0.1, **ids)),
        "deep_opt": lambda: OPTForCausalLM(
            OPTConfig(**{**SIZES, "num_hidden_layers": 3}, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=N_POSITIONS, **ids)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=N_POSITIONS, **ids)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, max_position_embeddings=N_POSITIONS, **ids)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **ids)),
    }[family]()
    with torch.no_grad():  # OPT starts so small that nothing would show
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if is_norm else 0.0))
    return model.double().eval().requires_grad_(False)


@cache
def tower() -> VisionTower:
    """The embedded encoder."""
    return load_tower(encoder_folder())


N_POSITIONS = tower().n_patches + 60  # room for an image and a few words
_tower_part = cache(bound_parts.encoder_part)


def compose(family: str, template: Template | None = None) -> VisionLanguageModel:
    """A model of the one tower, whose part (weights, features of a test image) is computed once."""
    with mock.patch("multimodal.model.encoder_part", _tower_part):
        return VisionLanguageModel(tower(), language(family), template or Template(prompt="<image><bos>question: {question} answer:"))


def excite(module: nn.Module, seed: int = 1) -> None:
    """Move every weight away from its start, where many methods are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)


class Drawn:
    """The first `n` scenes; those in `bad` have an image that cannot be decoded, those in `without` none."""

    def __init__(self, n: int, bad: Sequence[int] = (), without: Sequence[int] = ()) -> None:
        self.scenes, self.bad, self.without = Scenes(split="train", size=n), frozenset(bad), frozenset(without)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        sample = self.scenes[index]
        if index in self.bad or index in self.without:
            return Sample(key=sample.key, image_id=sample.image_id, media=b"no image" if index in self.bad else None, captions=sample.captions)
        return sample


def two_texts(sample: Sample, rng: random.Random) -> list[Text]:
    """Two texts about a sample, the second drawn."""
    return [Text("is it red ?", "yes"), Text("", rng.choice(["a red cube", "a big ball", "no"]))]


def patches(n: int, seed: int = 3) -> Tensor:
    """float64 [n, N, Dv] of the tower's sizes"""
    return torch.randn(n, tower().n_patches, tower().width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
