"""Generation beside its plain ways, in alternated repetitions of one process: medians of the ratios within a repetition.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/bench_generate.py

A language model of Llama's kind with 57 million drawn weights, a linear bridge and AdaLink. `wall` is by the clock, `CPU` by the seconds of the
processor, which other work on the machine disturbs less. Both sides of a ratio write the same tokens; that is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import multimodal  # noqa: F401  # it makes torchvision importable, before transformers asks for it

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM

from adalink import IMAGE, TEXT, AdaLink, AdaptedModel, Bridge, InputSpec, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.tokenize import Row
from multimodal.generation.generate import GenerationSettings, run_generation, written_texts
from multimodal.language import Language

CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=512, intermediate_size=1664, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FEATURES, RANK, N_ADAPTERS = 768, 16, 8  # width of ViT-B's patches; rank of AdaLink; adapters of the mixed batch
QUESTION = (12, 9, 14, 11, 12)  # tokens of the questions about an image


@dataclass(frozen=True)
class Host:
    """The frozen model with its adapters, and what generation needs of a tokenizer."""

    adapted: AdaptedModel
    language: Language
    n_patches: int

    @staticmethod
    def made(n_patches: int) -> Host:
        torch.manual_seed(0)
        adapted = AdaptedModel(LlamaForCausalLM(CONFIG).eval(), inputs={"image": InputSpec(n_patches, FEATURES)})
        for i in range(N_ADAPTERS):
            adapted.add_adapter(f"a{i}", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=RANK, modalities=("image", "text"))})
        adapted.add_adapter("bridge_alone", {"bridge": Bridge(kind="linear")})
        tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, batch_decode=lambda ids, **_: [" ".join(map(str, row)) for row in ids])
        return Host(adapted, Language(model=adapted.base, tokenizer=tokenizer, name="llama60"), n_patches)

    def asked(self, questions: Sequence[int], image: Sequence[int], adapters: Sequence[str]) -> tuple[Batch, TokenMap]:
        """Rows of questions with so many tokens, about these images, and their map."""
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in questions]
        rows = [Row((0,) * self.n_patches + tuple(one), (IMAGE,) * self.n_patches + (TEXT,) * len(one)) for one in ids]
        patches = torch.randn(max(image) + 1, self.n_patches, FEATURES, generator=generator)
        batch = collate(rows, image, patches, kind="patches", side="left", pad_id=0)
        serving = self.adapted.serving(len(rows), adapters)
        return batch, TokenMap(batch.domain, serving.row, {"image": patches[batch.image]}, present=frozenset({IMAGE, TEXT}), serving=serving.serving)

    def shared(self, asked: tuple[Batch, TokenMap], settings: GenerationSettings) -> list[str]:
        """What adalink does."""
        return written_texts(self.language, self.adapted.attachment, *asked, settings)

    def plain(self, asked: tuple[Batch, TokenMap], settings: GenerationSettings) -> list[str]:
        """transformers' generation: one batch with a prompt of its own for each row."""
        batch, token_map = asked
        with self.adapted.attachment.bind(token_map):
            ids = run_generation(self.language, batch, settings)
        return [" ".join(map(str, row)) for row in ids[:, batch.ids.shape[1] :].tolist()]

    def forward(self, asked: tuple[Batch, TokenMap]) -> None:
        """One forward pass, all logits."""
        batch, token_map = asked
        with self.adapted.attachment.bind(token_map):
            self.adapted.base(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)


def compare(label: str, sides: dict[str, Callable[[], Any]], repetitions: int) -> None:
    """The first side's time over each other's, within repetitions in which they take turns; texts must be equal where there are any."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for n in range(repetitions + 1):
        texts = {}
        for name in list(sides)[:: 1 if n % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            texts[name] = sides[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        assert len({str(text) for text in texts.values()}) == 1, "the sides write other tokens"
    first, *others = sides
    for name in others:
        found = []
        for kind in (0, 1):
            ratios = sorted(a[kind] / b[kind] for a, b in zip(times[first][1:], times[name][1:], strict=True))  # without the warm-up
            found.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"| {label} | {first} / {name} | {found[0]} | {found[1]} | {statistics.median(b[1] for b in times[name][1:]):.3f} s |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", type=int, nargs="+", default=[256], help="image tokens of an image")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    print("| work | ratio | wall | CPU | CPU of the second |\n|---|---|---|---|---|")
    for n_patches in arguments.patches:
        with torch.no_grad():
            measure(Host.made(n_patches), arguments.repetitions)


def measure(host: Host, repetitions: int) -> None:
    """All rows of one size of images."""
    one = host.asked(QUESTION, [0] * 5, ["a0"] * 5)
    apart = (one[0].__class__(**{**vars(one[0]), "image": torch.arange(5)}), one[1])  # the same rows, not known to be about one image
    for label, settings in (("12 new", GenerationSettings(max_new_tokens=12)), ("3 new", GenerationSettings(max_new_tokens=3)),
                            ("12 new, 3 beams", GenerationSettings(max_new_tokens=12, num_beams=3)), ("3 new, 3 beams", GenerationSettings(max_new_tokens=3, num_beams=3))):  # fmt: skip
        sides = {
            "a prefill per question (transformers)": lambda settings=settings: host.plain(one, settings),
            "a prefill per question (own loop)": lambda settings=settings: host.shared(apart, settings),
            "one prefill": lambda settings=settings: host.shared(one, settings),
        }
        compare(f"P={host.n_patches}, 5 questions, {label}", {name: sides[name] for name in list(sides)[::2]}, repetitions)
        compare(f"P={host.n_patches}, 5 questions, {label}", {name: sides[name] for name in list(sides)[1:]}, repetitions)
    settings = GenerationSettings(max_new_tokens=12)
    same, mixed = (host.asked([12] * 8, range(8), names) for names in (["a0"] * 8, [f"a{i}" for i in range(8)]))
    compare(f"P={host.n_patches}, 8 rows, 12 new", {"8 adapters": lambda: len(host.shared(mixed, settings)), "1 adapter": lambda: len(host.shared(same, settings))}, repetitions)
    linked, bare, none = (host.asked([12] * 4, range(4), [name] * 4) for name in ("a0", "bridge_alone", "__base__"))
    compare(f"P={host.n_patches}, 4 rows, forward", {"bridge + AdaLink": lambda: host.forward(linked), "bridge": lambda: host.forward(bare), "frozen model": lambda: host.forward(none)}, repetitions)  # fmt: skip


if __name__ == "__main__":
    main()
