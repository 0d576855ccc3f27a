"""Composed models on drawn features: a picture of any number of image tokens, and texts of a given length about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

from adalink import Method
from multimodal.batch import Batch, collate
from multimodal.compiled import CompiledModel
from multimodal.encode import Row
from multimodal.encoders.stage import Loaded, Preprocess, Stage
from multimodal.model import VisionLanguageModel
from multimodal.packing import Arrange
from multimodal.template import Template, Text
from multimodal.vision import VisionTower
from tasks.bench.shapes import Machine, Shape, language

__all__ = ["FEATURE_WIDTH", "Work", "as_batch", "composed", "drawn_tower", "encoded"]

PAD_ID = 0
FEATURE_WIDTH = 768  # of ViT-B
TEMPLATE = Template(prompt="<image><bos>{question}", target=" {text}<eos>")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one training step learns from: pictures with their texts.

    n_patches        image tokens of a picture
    n_texts          texts about it
    n_prompt         tokens of a text that are read and not learnt, the start token among them
    n_target         tokens that are learnt, the end token among them
    n_pictures       pictures of a step
    """

    n_patches: int
    n_texts: int = 5
    n_prompt: int = 1
    n_target: int = 12
    n_pictures: int = 1

    def texts(self, vocabulary: int) -> list[list[Text]]:
        """The texts of each picture, drawn: words of ids that stand for themselves."""
        draw = Random(0)

        def words(n: int) -> str:
            return " ".join(f"w{draw.randrange(4, vocabulary)}" for _ in range(n))

        return [[Text(words(self.n_prompt - 1), words(self.n_target - 1)) for _ in range(self.n_texts)] for _ in range(self.n_pictures)]

    def features(self, machine: Machine, width: int = FEATURE_WIDTH) -> Tensor:
        """[pictures, n_patches, width], drawn."""
        drawn = torch.randn(self.n_pictures, self.n_patches, width, generator=torch.Generator().manual_seed(0))
        return drawn.to(machine.device, machine.dtype)


class _Drawn(nn.Module):
    """An encoder that gives so many patches and costs nothing: features are kept, so it is asked for their sizes alone."""

    def __init__(self, n_patches: int) -> None:
        super().__init__()
        self.patches = nn.Parameter(torch.randn(n_patches, FEATURE_WIDTH))

    def whole(self, pixels: Tensor) -> object:
        return self.last(pixels)

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        return (self.last(pixels),)

    def last(self, pixels: Tensor) -> Stage:
        return Stage(patches=self.patches.expand(len(pixels), -1, -1))


def _no_pixels(image: Image.Image) -> Tensor:
    return torch.zeros(3, 2, 2)


def drawn_tower(n_patches: int) -> VisionTower:
    """A tower of so many patches that are never computed."""
    return VisionTower(Loaded(encoder=_Drawn(n_patches), preprocess=Preprocess(transform=_no_pixels)), name="drawn")


def composed(shape: Shape, machine: Machine, tower: VisionTower, methods: Mapping[str, Method]) -> VisionLanguageModel:
    """A model with one adapter, the same weights each time. A machine that compiles does so after the adapter is attached."""
    torch.manual_seed(0)
    model = VisionLanguageModel(tower, language(shape, machine), TEMPLATE).to(machine.device)
    model.add_adapter("bench", methods)
    if machine.is_compiled:
        model.language_loss.call = CompiledModel(model.adapted)
    return model


def encoded(model: VisionLanguageModel, work: Work) -> Sequence[Sequence[Row]]:
    """The rows of each picture."""
    encoder, vocabulary = model.row_encoder(), model.language.model.config.vocab_size
    return [[encoder.row(text) for text in texts] for texts in work.texts(vocabulary)]


def as_batch(rows: Sequence[Sequence[Row]], features: Tensor, arrange: Arrange) -> Batch:
    """The batch of a training step, as the loader makes it."""
    arranged = [arrange(of_one) for of_one in rows]
    image = [number for number, of_one in enumerate(arranged) for _ in of_one]
    return collate([row for of_one in arranged for row in of_one], image, features, kind="patches", side="right", pad_id=PAD_ID)
