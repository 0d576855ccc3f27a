"""What is measured, in three sizes: `usual` is what the targets speak of, `billion` is for a GPU, `tiny` takes seconds and shows nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tasks.bench.composed import Work
from tasks.bench.shapes import LLAMA_1B, LLAMA_60M, OPT_125M, TINY_LLAMA, TINY_OPT, Machine, Shape

__all__ = ["SIZES", "Bench", "Case", "Sizes"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step, and how many times as fast and as small it should be as the peer's. None: nothing is aimed at.

    A step reads about as many image tokens whatever the size of a picture: four of 50, or one of 197 or 256.
    """

    work: Work
    faster: float | None = None
    smaller: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The language models and steps of a run of the command.

    encoders   timm names (image size) and the steps with their features; faster: against encoding each row's picture
    """

    models: tuple[Shape, ...]
    captions: tuple[Case, ...]
    questions: tuple[Case, ...]
    text_only: tuple[Case, ...]
    encoders: tuple[tuple[str, int, Case], ...]
    n_records: int = 8000
    n_pictures: int = 120
    n_answers: int = 50_000
    n_captions: int = 5000
    growth_models: tuple[Shape, ...] = ()
    growth_patches: tuple[int, ...] = (50, 128, 256, 576)
    growth_texts: tuple[int, ...] = (1, 2, 5, 10)
    growth_ranks: tuple[int, ...] = (8, 64, 256)


def _usual(models: tuple[Shape, ...], smallest: tuple[Shape, ...]) -> Sizes:
    question = {"n_prompt": 8, "n_target": 3}
    return Sizes(
        models=models,
        captions=(
            Case(work=Work(n_patches=50, n_pictures=4), faster=3, smaller=4),
            Case(work=Work(n_patches=197), faster=4, smaller=5),
            Case(work=Work(n_patches=256), faster=5, smaller=7),
        ),
        questions=(
            Case(work=Work(n_patches=50, n_pictures=4, **question), faster=3.5),
            Case(work=Work(n_patches=256, **question), faster=5),
        ),
        text_only=(Case(work=Work(n_patches=256), faster=7),),
        encoders=(
            ("vit_base_patch32_224", 224, Case(work=Work(n_patches=49, n_pictures=4), faster=3.8)),
            ("vit_small_patch14_dinov2", 224, Case(work=Work(n_patches=256), faster=5.5)),
        ),
        growth_models=smallest,
    )


SIZES = {
    "tiny": Sizes(
        models=(TINY_LLAMA, TINY_OPT),
        captions=(Case(work=Work(n_patches=9)),),
        questions=(Case(work=Work(n_patches=9, n_prompt=8, n_target=3, n_pictures=2)),),
        text_only=(Case(work=Work(n_patches=9)),),
        encoders=(("test_vit", 160, Case(work=Work(n_patches=100))),),
        n_records=64,
        n_pictures=8,
        n_answers=200,
        n_captions=20,
        growth_models=(TINY_LLAMA,),
        growth_patches=(5, 9),
        growth_texts=(1, 3),
        growth_ranks=(2, 4),
    ),
    "usual": _usual((LLAMA_60M, OPT_125M), (LLAMA_60M, OPT_125M)),
    "billion": _usual((LLAMA_1B,), (LLAMA_60M, OPT_125M, LLAMA_1B)),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run of the command."""

    sizes: Sizes
    machine: Machine = field(default_factory=lambda: Machine(device=torch.device("cpu"), dtype=torch.float32))
    repetitions: int = 5
