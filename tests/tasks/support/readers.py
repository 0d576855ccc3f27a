"""Encoder-only language models with random weights, in folders as transformers saves them: what a head chooses answers over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tasks.scenes.dataset import Scenes

WIDTH = 64
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 100,
    "initializer_range": 0.3,  # at BERT's own 0.02 a random attention passes hardly anything on from token to token
}  # fmt: skip


def words_of_scenes() -> tuple[str, ...]:
    """Every word and mark in the questions of some scenes."""
    scenes = Scenes(split="train", size=200)
    return tuple(sorted({word for i in range(len(scenes)) for asked in scenes[i].questions for word in re.findall(r"\w+|[^\w\s]+", asked.text)}))


def save_reader(folder: Path, family: str) -> Path:
    """A tiny model of a family with a tokenizer of the scenes' words; the folder comes back."""
    first = {"bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), "roberta": ("<s>", "<pad>", "</s>", "<unk>")}[family]
    vocabulary = {word: number for number, word in enumerate((*first, *words_of_scenes()))}
    pad, cls, sep, unk = first if family == "bert" else (first[1], first[0], first[2], first[3])
    words = Tokenizer(WordLevel(vocabulary, unk_token=unk))
    words.pre_tokenizer = Whitespace()
    own = {"bos_token": cls, "eos_token": sep} if family == "roberta" else {}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unk, cls_token=cls, sep_token=sep, pad_token=pad, **own).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(vocabulary), "pad_token_id": vocabulary[pad]}
    model: Any = (
        hf.BertModel(hf.BertConfig(**sizes))
        if family == "bert"
        else hf.RobertaModel(hf.RobertaConfig(**sizes, bos_token_id=0, eos_token_id=2))
    )
    model.save_pretrained(folder)
    return folder
