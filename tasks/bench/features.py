"""A training step on features that are kept, against encoding the picture of every row."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from torch import Tensor

from multimodal.encoders.stage import Loaded, Preprocess
from multimodal.encoders.timm import TimmEncoder
from multimodal.patch_table import PatchTable
from multimodal.vision import VisionTower
from tasks.bench.clock import alternate
from tasks.bench.finding import Finding
from tasks.bench.shapes import Machine, Shape
from tasks.bench.sides import check_peft, our_model, our_step, their_step
from tasks.bench.sizes import Bench, Case
from tasks.bench.training import against_peft

__all__ = ["features"]

TOLERANCE = 1e-3  # features are kept in float16


def features(bench: Bench) -> Iterator[Finding]:
    """Each encoder with each language model. Raises ConfigError without peft."""
    check_peft()
    for name, pixels, case in bench.sizes.encoders:
        for shape in bench.sizes.models:
            yield _end_to_end(bench, shape, drawn_encoder(name, pixels, bench.machine), case)


def drawn_encoder(name: str, pixels: int, machine: Machine) -> VisionTower:
    """A timm encoder with drawn weights, for pictures of so many pixels a side."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=pixels).to(machine.device, machine.dtype)
    return VisionTower(
        Loaded(encoder=TimmEncoder(model), preprocess=Preprocess(transform=lambda image: torch.zeros(3, pixels, pixels))), name=name
    )


def _end_to_end(bench: Bench, shape: Shape, tower: VisionTower, case: Case) -> Finding:
    work, machine = case.work, bench.machine
    side = tower.preprocess.transform(None).shape[-1]  # type: ignore[arg-type]  # it looks at no picture
    pixels = torch.randn(work.n_pictures, 3, side, side, generator=torch.Generator().manual_seed(0)).to(machine.device, machine.dtype)
    model = our_model(shape, machine, tower, "lora")
    table = PatchTable(model.encode(pixels).to("cpu", torch.float16), {})
    per_row = pixels.repeat_interleave(work.n_texts, 0)

    def kept() -> Tensor:
        return torch.stack([value for i in range(len(table)) if isinstance(value := table[i], Tensor)]).to(machine.device, machine.dtype)

    def every_row() -> Tensor:
        with torch.no_grad():
            return tower(per_row).patches

    sides = {"adalink": our_step(model, work, kept), "peft": their_step(model, shape, machine, work, every_row, "lora")}
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype, max(TOLERANCE, 2e-2 * (machine.dtype.itemsize < 4)))
    what = f"{shape.name}, {tower.name}, {work.n_patches} image tokens: kept features, end to end, faster than an encoder for every row"
    return against_peft("features", what, turns, case)
