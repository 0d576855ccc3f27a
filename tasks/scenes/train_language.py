"""Train the frozen language model of scenes: a small Llama and its own tokenizer, on text alone. It never sees a picture.

Each sequence is one caption or one question with an answer, `</s>` before and after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.scenes.captions import captions
from tasks.scenes.questions import questions
from tasks.scenes.scene import make_scene

__all__ = ["train_language"]

SEED = 30_001  # of the scenes told here; Scenes and the encoder draw theirs from others
END, PAD = "</s>", "<pad>"
VOCABULARY = 600
BATCH = 192


def train_language(folder: Path, *, steps: int) -> None:
    """Train for this many batches of 192 texts, then write the model and its tokenizer into the folder."""
    torch.manual_seed(SEED)
    tokenizer = _tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    for step, texts in zip(range(steps), _batches(), strict=False):
        ids, mask = _encode(tokenizer, texts, end, pad)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"language {step + 1}/{steps} loss {loss:.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _texts(rng: Random) -> Iterator[str]:
    """Captions, and questions with the answer of one person, scene after scene, without end."""
    while True:
        scene = make_scene(rng)
        yield from captions(scene, rng)
        yield from (f"question: {q.text} answer: {rng.choice(q.answers)}" for q in questions(scene, rng, image_id=0))


def _batches() -> Iterator[list[str]]:
    """Batches of texts; each is drawn from four batches' worth, so that one scene's texts part."""
    rng = Random(SEED)
    texts = _texts(rng)
    while True:
        pool = [next(texts) for _ in range(4 * BATCH)]
        rng.shuffle(pool)
        yield from (pool[i : i + BATCH] for i in range(0, len(pool), BATCH))


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], end: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, i64 [B, T], each text between two `</s>`, padded on the right."""
    rows = [[end, *ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over small letters: each word of scenes is about one token, and any other text can be written in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = _texts(Random(SEED + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", PAD, END, "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(texts) for _ in range(20_000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, unk_token="<unk>")
