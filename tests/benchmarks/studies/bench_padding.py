"""Padding among the tokens of texts, with samples as they come and sorted in pools; and what a lookup of the sorted order costs.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/studies/bench_padding.py --flickr8k DATA/flickr8k --daquar DATA/daquar [--tokenizer PARTS/captions_opt_3m]

Batches are those of two epochs, in the orders that training reads. By tokens: as files are sorted; by bytes of a sample's record: as shards are. Without --tokenizer, words are those of a byte-level BPE learned from the same
texts (as good as a word each, as with the tokenizers of large models).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multimodal.batches.packing import Arrange, pack_rows, separate_rows
from multimodal.batches.tokenize import Row, RowEncoder
from multimodal.data.loader import Texts, train_loader
from multimodal.data.order import BucketedOrder, MixedOrder, Order, SampleOrder
from multimodal.data.shards.reader import encode_record
from multimodal.language import Language
from multimodal.sample import Sample
from multimodal.template import Text
from tasks.captioning import Captioning
from tasks.data.coco import read_coco_captions
from tasks.data.vqa import read_vqa
from tasks.vqa import Vqa


def language(texts: Iterator[str], tokenizer: Path | None) -> Language:
    """Words and a configuration; no weights that matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    if tokenizer is not None:
        words = AutoTokenizer.from_pretrained(tokenizer)
    else:
        learned = Tokenizer(models.BPE())
        learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<pad>", "<s>", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
        words = PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=4096)
    return Language(model=OPTForCausalLM(config), tokenizer=words, name="words")


def padding(samples: Sequence[Sample], texts: Texts, rows: Callable[[Sequence[Text]], Sequence[Row]], batch: int, order: Order) -> tuple[float, float]:
    """The shares of padding among tokens of texts, and beside 256 tokens of the image a row; in percent, over two epochs."""
    padded = tokens = n_rows = 0
    for first in range(0, 2 * len(samples) // batch * batch, batch):
        lengths = [
            len(row.ids)
            for position in range(first, first + batch)
            for row in rows(texts(samples[order.sample(position)], random.Random(position)))
        ]
        padded += max(lengths) * len(lengths) - sum(lengths)
        tokens += max(lengths) * len(lengths)
        n_rows += len(lengths)
    return 100 * padded / tokens, 100 * padded / (tokens + 256 * n_rows)


def sorted_order(lengths: Iterable[int], batch: int, pool: int) -> BucketedOrder:
    """As training sorts; the lengths are what differs."""
    note = np.fromiter(lengths, dtype=np.int64)
    return BucketedOrder(SampleOrder(len(note), 0), note, seed=0, pool=pool, batch=batch)


def lookups(n: int, batch: int, pool: int) -> None:
    """Print processor microseconds a lookup, pools among them, and milliseconds for the pool."""
    print("\n| order | samples | pool | us a lookup | ms a pool |\n|---|---|---|---|---|")
    lengths = np.random.default_rng(0).integers(20, 200, n)
    for name, order in (("one set", SampleOrder(n, 0)), ("two sets, 3 to 1", MixedOrder([n // 2, n - n // 2], [3, 1], 0))):
        for what, one in ((name, order), (f"{name}, sorted", BucketedOrder(order, lengths, seed=0, pool=pool, batch=batch))):
            one.sample(0)
            size, found = pool * batch, []
            for first in range(size, 11 * size, size):
                started = time.process_time()
                for position in range(first, first + size):
                    one.sample(position)
                found.append(time.process_time() - started)
            started = time.process_time()
            one.sample(size)  # of a pool that is not at hand
            again = time.process_time() - started
            print(f"| {what} | {n:,} | {pool} x {batch} | {1e6 * statistics.median(found) / size:.2f} | {1000 * again:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flickr8k", type=Path, required=True)
    parser.add_argument("--daquar", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photographs = read_coco_captions(images=options.flickr8k / "images", annotations=options.flickr8k / "annotations" / "captions_train.json")
    rooms = read_vqa(
        images=options.daquar / "images", questions=options.daquar / "annotations" / "OpenEnded_daquar_train_questions.json",
        annotations=options.daquar / "annotations" / "daquar_train_annotations.json", image_name="image{image_id}.jpg",
    )  # fmt: skip
    captioned, asked = ([source[i] for i in range(len(source))] for source in (photographs, rooms))
    apart = [replace(sample, key=f"{sample.key}/{k}", captions=(text,)) for sample in captioned for k, text in enumerate(sample.captions)]
    random.Random(0).shuffle(apart)
    words = language((text for sample in captioned for text in sample.captions), options.tokenizer)
    captioning, vqa = Captioning(), Vqa()
    cases: list[tuple[str, Sequence[Sample], Captioning | Vqa, Arrange]] = [
        ("Flickr8k, one row per caption, each a sample of its own", apart, captioning, separate_rows),
        ("Flickr8k, one of five captions, drawn", captioned, Captioning(captions_per_image=1), separate_rows),
        ("Flickr8k, five captions in five rows", captioned, captioning, separate_rows),
        ("Flickr8k, five captions packed", captioned, captioning, pack_rows),
        ("DAQUAR, 1 to 31 questions packed", asked, vqa, pack_rows),
        ("DAQUAR, 1 to 31 questions in as many rows", asked, vqa, separate_rows),
    ]
    print("| texts | samples | measured in | pool | as they come | sorted by tokens | sorted by bytes | by tokens, 256 image tokens a row |")
    print("|---|---|---|---|---|---|---|---|")
    for name, samples, task, arrange in cases:
        encoder = RowEncoder(task.template, words, [])
        made: dict[tuple[Text, ...], Sequence[Row]] = {}

        def rows(texts: Sequence[Text], made: Any = made, encoder: RowEncoder = encoder, arrange: Arrange = arrange) -> Sequence[Row]:
            key = tuple(texts)
            if key not in made:
                made[key] = arrange([encoder.row(text) for text in texts])
            return made[key]

        started = time.process_time()
        stream = train_loader(samples, task.texts, encoder, arrange, torch.empty_like, steps=0, batch_size=1, seed=0, workers=0)
        tokens = [stream._positions.length(sample) for sample in samples]
        seconds = time.process_time() - started
        for batch in (8, 64):
            pool = min(50, len(samples) // batch // 2)
            plain, plain_beside = padding(samples, task.texts, rows, batch, SampleOrder(len(samples), 0))
            by_tokens, beside = padding(samples, task.texts, rows, batch, sorted_order(tokens, batch, pool))
            by_bytes, _ = padding(samples, task.texts, rows, batch, sorted_order((len(encode_record(sample)) for sample in samples), batch, pool))
            print(
                f"| {name} | {len(samples):,} | {seconds:.1f} s | {pool} x {batch} | {plain:.1f} % | {by_tokens:.1f} % | {by_bytes:.1f} % "
                f"| {plain_beside:.1f} % -> {beside:.1f} % |", flush=True,
            )  # fmt: skip
    lookups(113_000, 64, 50)


if __name__ == "__main__":
    main()
