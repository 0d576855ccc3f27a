"""A loader over drawn images, and what it gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composed import language, tower, two_texts

from adalink import IMAGE, Slots
from multimodal.batches.collate import Batch
from multimodal.batches.packing import separate_rows
from multimodal.batches.tokenize import RowEncoder
from multimodal.data.loader import Loaded, train_loader
from multimodal.template import Template

ENCODER = RowEncoder(Template(prompt="<image><bos>question: {question} answer:"), language("opt"), [Slots(IMAGE, tower().n_patches)])
N = 7


def load(source: Any, steps: range, *, texts: Any = two_texts, batch_size: int = 2, workers: int = 0, **more: Any) -> list[Loaded]:
    loader = train_loader(
        source, texts, ENCODER, separate_rows, tower().preprocess, steps=len(steps), batch_size=batch_size, seed=5, workers=workers, **more
    )
    loader.load_state_dict({**loader.state_dict(), "position": steps.start * batch_size * more.get("world", 1)})
    return list(loader)


def equal(first: Sequence[Loaded], second: Sequence[Loaded]) -> bool:
    def same(a: Batch, b: Batch) -> bool:
        return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(vars(a).values(), vars(b).values(), strict=True))

    return len(first) == len(second) and all(same(a.batch, b.batch) for a, b in zip(first, second, strict=True) if a.batch and b.batch)


def keys(loaded: Sequence[Loaded]) -> list[str]:
    return [key for one in loaded if one.batch for key in one.batch.keys]
