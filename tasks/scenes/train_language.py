"""Train the frozen language model of scenes: a small Llama and its own tokenizer, on text alone. It never sees a picture.

A document is what can be said of one scene: captions, and questions with their answers, `</s>` before, between and after them. So
the model learns what models of natural text learn: to go on in keeping with what was said before. With texts one by one it
learned no such thing, and in a trial an adapter that only writes its inputs got little more than a third of the CIDEr-D out of it.
"""

from __future__ import annotations

from collections import Counter
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

__all__ = ["make_tokenizer", "train_language"]

SEED = 30_001  # of the scenes told here; Scenes and the encoder draw theirs from others
END, PAD = "</s>", "<pad>"
VOCABULARY = 600
BATCH = 16
LONGEST = 192  # tokens of a document that are read


def train_language(folder: Path, *, steps: int) -> None:
    """Train for this many batches of 16 documents, then write the model and its tokenizer into the folder."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    documents = _documents(Random(SEED))
    for step in range(steps):
        ids, mask = _encode(tokenizer, [next(documents) for _ in range(BATCH)], end, pad)
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


def _documents(rng: Random) -> Iterator[list[str]]:
    """One scene's texts after another, without end: captions and questions with their usual answers, mixed or captions first."""
    while True:
        scene = make_scene(rng)
        told = [*captions(scene, rng), *captions(scene, rng)]
        answered = [*questions(scene, rng, image_id=0), *questions(scene, rng, image_id=0)]
        asked = [f"question: {q.text} answer: {Counter(q.answers).most_common(1)[0][0]}" for q in answered]
        texts = rng.sample(told, rng.randint(1, 8)) + rng.sample(asked, rng.randint(2, 6))
        if rng.random() < 0.5:
            rng.shuffle(texts)
        yield texts


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[list[str]], end: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, i64 [B, T], each text between two `</s>`, padded on the right."""
    rows = []
    for texts in documents:
        ids = [token for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in (*text, end)]
        rows.append([end, *ids][:LONGEST])
    longest = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows]), torch.tensor(mask)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over small letters: each word of scenes is about one token, and any other text can be written in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    documents = _documents(Random(SEED + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", PAD, END, "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _ in range(2_000) for text in next(documents)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, unk_token="<unk>")
