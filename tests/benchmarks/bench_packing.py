"""Steps of training on images with several captions: separate rows, packed rows, forked rows, and adapters on text only.

    PYTHONPATH=. OMP_NUM_THREADS=1 nice -n 19 python tests/benchmarks/bench_packing.py --patches 50 256 --texts 5
    PYTHONPATH=. OMP_NUM_THREADS=1 nice -n 19 python tests/benchmarks/bench_packing.py --patches 50 --row-tokens 256 512 1024 --images 8

The second is of images with 1 to 12 texts each, packed: one image a row against several, in rows of up to so many tokens.

Sides take turns in every repetition, in one process and one thread; a ratio is of the two processor seconds of one repetition, since other
work on the machine would change the clock's. Random weights of a real shape.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import nn

from adalink import IMAGE, AdaLink, AdaptedModel, Bridge, InputSpec, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import fork_rows, joined_rows, pack_rows, separate_rows
from multimodal.batches.prefix_sharing import trained_domains
from multimodal.batches.tokenize import Row
from multimodal.loss.language_loss import LanguageLoss

FEATURES = 768


def llama() -> nn.Module:
    """57 million parameters, 12 layers, grouped queries, a tied head of 32,000 words."""
    from transformers import LlamaConfig, LlamaForCausalLM  # after multimodal, which lets torchvision be imported

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1664, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).float()


def captions(patches: int, texts: int, seed: int) -> list[Row]:
    """Rows of one image: its slots, a start token, and captions of 9 to 15 tokens."""
    generator = torch.Generator().manual_seed(seed)
    head, domain = (0,) * patches + (1,), (IMAGE,) * patches + (0,)
    rows = []
    for _ in range(texts):
        length = int(torch.randint(9, 16, (1,), generator=generator))
        text = tuple(torch.randint(3, 32_000, (length,), generator=generator).tolist())
        rows.append(Row(head + text[:-1], domain + (1,) * (length - 1), tuple(range(patches, patches + length)), text))
    return rows


def numbers_of_texts(images: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, 12) for _ in range(images)]


def ragged(patches: int, images: int, seed: int, row_tokens: int = 0) -> Batch:
    """Packed rows of images with 1 to 12 texts each; several images a row where `row_tokens` says how long one may be."""
    rows = [pack_rows(captions(patches, n, 1000 * seed + i))[0] for i, n in enumerate(numbers_of_texts(images, seed))]
    image = list(range(images))
    if row_tokens:
        rows, image = joined_rows(rows, image, row_tokens)
    features = torch.randn(images, patches, FEATURES, generator=torch.Generator().manual_seed(9))
    return collate(rows, image, features, kind="patches", side="right", pad_id=0)


def batch_of(arrange: Callable[[Sequence[Row]], Sequence[Row]], patches: int, texts: int, images: int) -> Batch:
    arranged = [arrange(captions(patches, texts, seed)) for seed in range(images)]
    image = [i for i, rows in enumerate(arranged) for _ in rows]
    features = torch.randn(images, patches, FEATURES, generator=torch.Generator().manual_seed(9))
    return collate([row for rows in arranged for row in rows], image, features, kind="patches", side="right", pad_id=0)


def step(model: AdaptedModel, loss: LanguageLoss, batch: Batch) -> float:
    """Processor seconds of a forward and a backward pass, the bridge and the adapter's gradients among them."""
    assert batch.patches is not None
    started = time.process_time()
    image = batch.patches[batch.image] if batch.token_image is None else batch.patches
    token_map = TokenMap(batch.domain, model.rows(len(batch.ids)), {"image": image}, entry=batch.token_image)
    loss(batch, token_map).backward()
    seconds = time.process_time() - started
    model.active_adapter().zero_grad()
    return seconds


def measure(patches: int, texts: int, images: int, repetitions: int) -> None:
    model = AdaptedModel(llama(), inputs={"image": InputSpec(patches, FEATURES)})
    adapter = model.add_adapter("a", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=16, modalities=("image", "text"))})
    loss = LanguageLoss(model)
    bridge, image = adapter.get_submodule("bridge"), adapter.get_submodule("adalink.image")
    sides: dict[str, tuple[Batch, bool]] = {
        "one row per caption": (batch_of(separate_rows, patches, texts, images), False),
        "packed": (batch_of(pack_rows, patches, texts, images), False),
        "forked": (batch_of(fork_rows, patches, texts, images), False),
        "text only: one row per caption": (batch_of(separate_rows, patches, texts, images), True),
    }
    for part in (bridge, image):
        part.requires_grad_(False)
    frozen = trained_domains(adapter)
    sides["text only: packed after a frozen beginning"] = batch_of(partial(pack_rows, trained=frozen), patches, texts, images), True
    sides["text only: forked after a frozen beginning"] = batch_of(partial(fork_rows, trained=frozen), patches, texts, images), True
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, (batch, text_only) in sides.items():
            for part in (bridge, image):
                part.requires_grad_(not text_only)
            seconds = step(model, loss, batch)
            if repetition:  # the first warms up
                found[name].append(seconds)
    print(f"\n### {patches} image tokens, {texts} captions an image, {images} images a step\n", flush=True)
    print("| rows | ms per caption | times as fast | from | to |\n|---|---|---|---|---|")
    for name, seconds in found.items():
        ratios = sorted(base / own for base, own in zip(found["one row per caption"], seconds, strict=True))
        print(f"| {name} | {1000 * median(seconds) / (texts * images):.0f} | {median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |", flush=True)


def measure_joined(patches: int, images: int, row_tokens: Sequence[int], repetitions: int) -> None:
    """Each repetition draws other images, the same for all sides."""
    model = AdaptedModel(llama(), inputs={"image": InputSpec(patches, FEATURES)})
    model.add_adapter("a", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=16, modalities=("image", "text"))})
    loss = LanguageLoss(model)
    found: dict[int, list[float]] = {limit: [] for limit in (0, *row_tokens)}
    for repetition in range(repetitions + 1):
        for limit, seconds in found.items():
            took = step(model, loss, ragged(patches, images, repetition, limit))
            if repetition:  # the first warms up
                seconds.append(took)
    print(f"\n### {patches} image tokens, 1 to 12 texts an image, {images} images a step\n", flush=True)
    print("| rows of up to | rows a step | padding | ms per text | times as fast | from | to |\n|---|---|---|---|---|---|---|")
    for limit, seconds in found.items():
        batches = [ragged(patches, images, seed, limit) for seed in range(1, 51)]
        padding = 1 - sum(int(one.attention_mask.sum()) for one in batches) / sum(one.ids.numel() for one in batches)
        n_rows = sum(len(one.ids) for one in batches) / len(batches)
        n_texts = sum(sum(numbers_of_texts(images, seed)) for seed in range(1, repetitions + 1))
        ratios = sorted(base / own for base, own in zip(found[0], seconds, strict=True))
        name = f"{limit} tokens" if limit else "one image"
        print(f"| {name} | {n_rows:.1f} | {100 * padding:.1f} % | {1000 * sum(seconds) / n_texts:.0f} ", end="")
        print(f"| {median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--patches", type=int, nargs="+", default=[50, 256])
    parser.add_argument("--texts", type=int, nargs="+", default=[5])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[])
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for patches in options.patches:
        if options.row_tokens:
            measure_joined(patches, options.images, options.row_tokens, options.repetitions)
            continue
        for texts in options.texts:
            measure(patches, texts, options.images, options.repetitions)


if __name__ == "__main__":
    main()
