"""Answering five questions about a picture, which is read once, against one prompt with the picture for each question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from zlib import crc32

import torch

from adalink import AdaLink, Bridge, Method
from multimodal.batch import Batch, collate
from multimodal.generate import GenerationSettings, run_generation
from multimodal.model import VisionLanguageModel
from tasks.bench.clock import alternate
from tasks.bench.composed import PAD_ID, Work, composed, drawn_tower
from tasks.bench.finding import Finding
from tasks.bench.shapes import Machine
from tasks.bench.sizes import Bench

__all__ = ["generation"]

N_QUESTION = 12
# New tokens, beams, and the target at 256 image tokens.
ASKED = ((12, 1, 1.7), (3, 1, 2.6), (12, 3, 1.5))


def generation(bench: Bench) -> Iterator[Finding]:
    """On the first language model, with every size of pictures."""
    shape, machine = bench.sizes.models[0], bench.machine
    for case in bench.sizes.captions:
        work = Work(n_patches=case.work.n_patches, n_prompt=N_QUESTION)
        methods: dict[str, Method] = {
            "bridge": Bridge(kind="linear", norm="none"),
            "adalink": AdaLink(rank=16, modalities=("image", "text")),
        }
        model = composed(shape, machine, drawn_tower(work.n_patches), methods)
        batch = _questions(model, work, machine)
        for n_new, n_beams, target in ASKED:
            settings = GenerationSettings(max_new_tokens=n_new, num_beams=n_beams)
            sides = {"adalink": _written(model, batch, settings), "transformers": _plain(model, batch, settings)}
            turns = alternate(sides, bench.repetitions, machine.device, machine.dtype, 0.0)
            yield Finding(
                part="generation",
                what=f"{shape.name}, {work.n_patches} image tokens, {work.n_texts} questions, {n_new} new tokens, {_beams(n_beams)}: faster than a prompt each",
                ratios=turns.ratios("transformers", "adalink"),
                target=target if work.n_patches == 256 else None,
                detail=f"{1000 * turns.median('adalink'):.0f} ms against {1000 * turns.median('transformers'):.0f} ms, the same tokens",
            )


def _questions(model: VisionLanguageModel, work: Work, machine: Machine) -> Batch:
    encoder, vocabulary = model.row_encoder(), model.language.model.config.vocab_size
    rows = [encoder.prompt(text.question) for texts in work.texts(vocabulary) for text in texts]
    batch = collate(rows, [0] * len(rows), work.features(machine), kind="patches", side="left", pad_id=PAD_ID)
    return batch.to(machine.device)


def _written(model: VisionLanguageModel, batch: Batch, settings: GenerationSettings) -> Callable[[], float]:
    return lambda: _as_number(model.generate_batch(batch, settings))


def _plain(model: VisionLanguageModel, batch: Batch, settings: GenerationSettings) -> Callable[[], float]:
    """transformers' own generation of the adapted model."""

    @torch.no_grad()
    def generate() -> float:
        with model.adapted.attachment.bind(model.token_map(batch)):
            ids = run_generation(model.language, batch, settings)
        texts = model.language.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
        return _as_number([text.strip() for text in texts])

    return generate


def _as_number(texts: list[str]) -> float:
    """Equal for equal texts."""
    return float(crc32("\n".join(texts).encode()))


def _beams(n: int) -> str:
    return "greedy" if n == 1 else f"{n} beams"
