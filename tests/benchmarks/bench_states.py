"""Steps of eP-ALM with the states of its texts kept below its lowest layer, against the same steps that run every layer.

    PYTHONPATH=. OMP_NUM_THREADS=1 nice -n 19 python tests/benchmarks/bench_states.py --model opt125 --first 6

Sides take turns in every repetition, in one process and one thread; a ratio is of the two processor seconds of one repetition. `first reading`
is a step whose texts were never read. Features are kept, so no encoder runs. Random weights of a real shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from adalink import EPALM, PERCEPT, AdaptedModel, InputSpec, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import pack_rows, separate_rows
from multimodal.batches.tokenize import Row
from multimodal.loss.hidden_states import LayersBelow, LowerStates
from multimodal.loss.language_loss import LanguageLoss
from tasks.bench.clock import alternate
from tasks.bench.models import LLAMA_60M, OPT_125M, Machine, language

FEATURES, N_TAPS, VOCABULARY = 768, 6, 32_000
SHAPES = {"opt125": OPT_125M, "llama60": LLAMA_60M}
WORDS = {"captions": (1, 12), "questions": (8, 3)}  # tokens that are read before those that are learnt, and those


def texts(kind: str, seed: int, n: int) -> list[Row]:
    """Rows of one image: the slot, a start token, and texts of lengths around the usual ones."""
    generator = torch.Generator().manual_seed(seed)
    n_read, n_learnt = WORDS[kind]
    rows = []
    for _ in range(n):
        length = n_learnt + int(torch.randint(-1, 2, (1,), generator=generator))
        ids = tuple(torch.randint(3, VOCABULARY, (n_read - 1 + length,), generator=generator).tolist())
        first = n_read
        domain = (PERCEPT, *(0,) * n_read, *(1,) * (length - 1))
        rows.append(Row((0, 1, *ids[:-1]), domain, tuple(range(first, first + length)), ids[n_read - 1 :]))
    return rows


def batch_of(kind: str, arrange: Callable[[Sequence[Row]], Sequence[Row]], n_images: int, n_texts: int) -> Batch:
    arranged = [list(arrange(texts(kind, seed, n_texts))) for seed in range(n_images)]
    image = [i for i, rows in enumerate(arranged) for _ in rows]
    taps = torch.randn(n_images, N_TAPS, FEATURES, generator=torch.Generator().manual_seed(0))
    return collate([row for rows in arranged for row in rows], image, taps, kind="taps", side="right", pad_id=0)


class Side:
    """Loss and gradients of a batch; `lower` gives what is kept of its texts."""

    def __init__(self, model: AdaptedModel, batch: Batch, lower: Callable[[], LowerStates | None]) -> None:
        assert batch.taps is not None
        self.batch, self.lower, self.loss = batch, lower, LanguageLoss(model)
        serving = model.serving(len(batch.ids))
        self.token_map = TokenMap(batch.domain, serving.row, {"image_taps": batch.taps[batch.image]}, serving=serving.serving)
        self.parameters = list(model.active_adapter().parameters())

    def __call__(self) -> float:
        self.loss.lower = self.lower()
        loss = self.loss(self.batch, self.token_map)
        self.gradients = torch.autograd.grad(loss, self.parameters)
        return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="opt125")
    parser.add_argument("--first", type=int, default=6, help="the first layer of eP-ALM's window, which ends with the last")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    shape, machine = SHAPES[asked.model], Machine(device=torch.device("cpu"), dtype=torch.float32)
    model = AdaptedModel(language(shape, machine).model, inputs={"image_taps": InputSpec(N_TAPS, FEATURES)})
    n_layers = len(model.anatomy.layers)
    model.add_adapter("epalm", {"epalm": EPALM(layers=(asked.first, n_layers), n_taps=N_TAPS, connector="shared")})
    below, row = LayersBelow(model, asked.first), int(model.rows(1))
    print(f"{shape.name}, eP-ALM in layers {asked.first} to {n_layers}, {asked.images} images with {asked.texts} texts, {asked.rounds} rounds")
    for kind in asked.kinds:
        for way, arrange in (("apart", separate_rows), ("packed", pack_rows)):
            batch = batch_of(kind, arrange, asked.images, asked.texts)
            fresh = partial(LowerStates, below, row, most=2**40)
            retained = fresh()
            sides = {"every layer": Side(model, batch, lambda: None), "first reading": Side(model, batch, fresh), "kept": Side(model, batch, lambda retained=retained: retained)}  # type: ignore[misc]
            turns = alternate(sides, asked.rounds, machine.device, machine.dtype)
            for slow, fast in pairwise(("first reading", "every layer", "kept")):
                ratios = turns.ratios(slow, fast)
                print(f"{kind:9} {way:6}  {slow} / {fast}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            off = max(float((one - other).norm() / one.norm()) for one, other in zip(sides["every layer"].gradients, sides["kept"].gradients, strict=True))
            alike = all(torch.equal(one, other) for one, other in zip(sides["first reading"].gradients, sides["kept"].gradients, strict=True))
            print(f"{kind:9} {way:6}  {turns.median('retained'):.2f} s; gradients {off:.1e} from those of every layer; kept equals first reading bit for bit: {alike}")


if __name__ == "__main__":
    main()
