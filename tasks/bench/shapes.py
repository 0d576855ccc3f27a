"""Language models by their sizes, with drawn weights: speed does not depend on what a model has learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from multimodal.language import Language, settle_tokens

__all__ = ["LLAMA_1B", "LLAMA_60M", "OPT_125M", "TINY_LLAMA", "TINY_OPT", "Machine", "Shape", "language"]

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's name in the tables, and its configuration."""

    name: str
    config: Any  # a configuration of transformers, which is untyped here


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the models are, in which dtype, whether their forward pass is compiled, and how many threads of a processor they may use."""

    device: torch.device
    dtype: torch.dtype
    is_compiled: bool = False
    n_threads: int = 1


# 57 million parameters, grouped-query attention.
LLAMA_60M = Shape(
    name="llama60",
    config=LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1664, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
OPT_125M = Shape(name="opt125", config=OPTConfig(dropout=0.0, **_IDS))
# The sizes of Llama 3.2 1B.
LLAMA_1B = Shape(
    name="llama1b",
    config=LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
TINY_LLAMA = Shape(
    name="tiny llama",
    config=LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, **_IDS,
    ),
)  # fmt: skip
TINY_OPT = Shape(
    name="tiny opt",
    config=OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
        dropout=0.0, **_IDS,
    ),
)  # fmt: skip


def language(shape: Shape, machine: Machine) -> Language:
    """A frozen language model of a shape, the same weights each time, with a tokenizer of words `w0`, `w1`, ... for every id."""
    torch.manual_seed(0)
    with machine.device:
        model: Any = AutoModelForCausalLM.from_config(shape.config, dtype=machine.dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    words = {word: number for number, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), shape.config.vocab_size)}
    split = Tokenizer(WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    settle_tokens(tokenizer, model, shape.name)
    return Language(model=model, tokenizer=tokenizer, name=shape.name)
