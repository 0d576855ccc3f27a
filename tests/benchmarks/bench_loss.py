"""The loss through a frozen head: seconds and memory of each way, as ratios to the plain one.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_loss.py --targets 256 --width 512 --vocabulary 50272 --rounds 5
    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_loss.py --targets 256 --width 512 --vocabulary 150000 --rounds 5

plain     every score at once, as autograd keeps it
chunks    word_loss with a head that may be trained: chunks whose scores are made again in the backward pass
frozen    word_loss with a frozen head: the gradient is made in the forward pass
torch     torch.nn.functional.linear_cross_entropy, with chunks of its own choice, and of those that `frozen` takes

Seconds are of the processor (of the device, on a GPU), so that other work on the machine counts little. Memory is the most that was held
beside hidden states and weights, and the ways take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal.loss.language_loss import Finish, targets_at_once, word_loss

Way = Callable[[Tensor, Tensor, nn.Linear], Tensor]


def plain(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), target, reduction="sum")


def frozen(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
    return word_loss(hidden, target, head, Finish())[0]


class AnyHead(nn.Linear):
    """Not known to be a linear and no more."""


def chunks(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
    other = AnyHead.__new__(AnyHead)
    other.__dict__.update(head.__dict__)
    return word_loss(hidden, target, other, Finish())[0]


def of_torch(size: int | None) -> Way:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=size) if size else nn.LinearCrossEntropyOptions()
    return lambda hidden, target, head: nn.functional.linear_cross_entropy(hidden, head.weight, target, reduction="sum", options=options)


def reset_peak() -> int:
    """Start to measure; bytes that are held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> int:
    """The most bytes that were held since."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("targets", 256), ("width", 512), ("vocabulary", 50272), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    like = {"device": device, "dtype": getattr(torch, asked.dtype)}
    hidden = torch.randn(asked.targets, asked.width, **like).requires_grad_()
    target = torch.randint(0, asked.vocabulary, (asked.targets,), device=device)
    head = nn.Linear(asked.width, asked.vocabulary, bias=False, **like).requires_grad_(False)
    size = targets_at_once(asked.vocabulary)
    ways: dict[str, Way] = {"plain": plain, "chunks": chunks, "frozen": frozen, "torch": of_torch(None), f"torch {size}": of_torch(size)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    held: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(asked.rounds + 1):  # the first warms up
        for name, way in ways.items():
            before = reset_peak()
            took[name].append(seconds(lambda way=way: torch.autograd.grad(way(hidden, target, head), hidden)))
            held[name].append(peak() - before)
    print(f"{asked.targets} targets, width {asked.width}, {asked.vocabulary} words, {asked.dtype} on {device}, {asked.rounds} rounds; chunks of {size}")
    for name in ways:
        ratios = [plain_took / own for plain_took, own in zip(took["plain"][1:], took[name][1:], strict=True)]
        bytes_ = statistics.median(held[name][1:])
        share = statistics.median(held["plain"][1:]) / max(bytes_, 1)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:10} {statistics.median(took[name][1:]):7.3f} s   speed {statistics.median(ratios):.2f} ({spread})   {bytes_ / 2**20:7.1f} MB, {share:.1f} times less")


if __name__ == "__main__":
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:  # freed memory goes back to the system, so that the next way's peak is its own
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    main()
