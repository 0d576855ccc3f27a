"""CPU seconds of a training step with the whole last layer, with the short one, and with activations made again too; and memory of the step.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/bench_last_layer.py --patches 256 --repetitions 5
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tasks.bench.clock import alternate, needs
from tasks.bench.models import LLAMA_60M, OPT_125M, Machine, Work, drawn_tower, our_model, our_step

SHAPES = {shape.name: shape for shape in (LLAMA_60M, OPT_125M)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default=LLAMA_60M.name)
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine, shape = Machine(device=torch.device("cpu"), dtype=torch.float32), SHAPES[given.model]
    work = Work(n_patches=given.patches, n_images=4 if given.patches == 50 else 1)
    print(f"{shape.name}, {given.patches} image tokens: {needs('adalink', shape, machine, work, 'lora').mib:.0f} MiB above the loaded model")
    model = our_model(shape, machine, drawn_tower(given.patches), "lora")
    features = work.features(machine)
    step, loss = our_step(model, work, lambda: features), model.language_loss
    base, again = loss.adapted.base, loss.activations.forwards

    def side(call: Callable[..., Any], forwards: dict[Any, Any]) -> float:
        loss.call, loss.activations.forwards = call, forwards
        return step()

    sides = {"whole": partial(side, partial(base), {}), "short": partial(side, base, {}), "short, made again": partial(side, base, again)}
    turns = alternate(sides, given.repetitions, machine.device, machine.dtype, tolerance=1.0)  # each step learns, and loses less than the one before
    for name in list(sides)[1:]:
        ratios = turns.ratios("whole", name)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name}: {spread} times as fast, {turns.median(name):.3f} s against {turns.median('whole'):.3f} s of the processor")


if __name__ == "__main__":
    main()
