"""What one GPU does: training, memory, decoding and equality of models of 1 and 8 billion drawn weights, in at most eight minutes.

    tests/benchmarks/gpu.sh [--tiny] [--minutes 8] [--out tests/benchmarks/RESULTS-GPU.md]

Each row is printed and written as it is found. A part that starts after the time is up is left out and named; so is one that needs more memory than
the card has, or a library that is not installed. --tiny: the same code on models of two layers, on a CPU, which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalink import AdaLink, Bridge, Method
from adalink.errors import AdalinkError
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import Arrange, fork_rows, pack_rows, separate_rows
from multimodal.generation.decoding import Decoding
from multimodal.model import VisionLanguageModel
from tasks.bench.clock import about, alternate, peak_mib, seconds_on
from tasks.bench.measurements import frozen_operations
from tasks.bench.models import (
    LLAMA_1B,
    LLAMA_8B,
    PAD_ID,
    SIZES,
    TINY_LLAMA,
    Bench,
    Machine,
    Shape,
    Work,
    arrange_of,
    as_batch,
    composed,
    drawn_tower,
    encoded,
    our_model,
    our_step,
    their_step,
)

RESULTS = Path(__file__).parent / "RESULTS-GPU.md"
QUANTISERS = ("", "int8", "nf4")
N_ADAPTERS = 8
ADALINK: Mapping[str, Method] = {"bridge": Bridge(kind="linear", norm="none"), "adalink": AdaLink(rank=16, modalities=("image", "text"))}
GOAL = "goals: 0.5 of the matmul rate in training (0.75 aimed at), and 4 times as fast as peft with Liger"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: shapes with the images of a training step, the side of a square matrix, and the rows and tokens of decoding."""

    shapes: tuple[tuple[Shape, int], ...] = ((LLAMA_1B, 32), (LLAMA_8B, 16))
    n_patches: int = 256
    side: int = 8192
    rows: tuple[int, ...] = (1, 32)
    n_new: int = 64
    repetitions: int = 3

    def work(self, n_images: int) -> Work:
        """Five captions of each image."""
        return Work(n_patches=self.n_patches, n_images=n_images)


TINY = Plan(shapes=((TINY_LLAMA, 2),), n_patches=9, side=64, rows=(1, 3), n_new=3, repetitions=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    part: str
    what: str
    found: str

    def __str__(self) -> str:
        return f"| {self.part} | {self.what} | {self.found} |"


Part = Callable[[], Row]


def parts(plan: Plan, machine: Machine) -> Iterator[tuple[str, str, Part]]:
    """Part, what, and how it is measured; the most telling first, and Liger last, since it changes transformers for the whole process."""
    rate = _matmul_rate(plan, machine)
    yield "card", f"product of two matrices of {plan.side} x {plan.side}", lambda: Row(part="card", what="", found=f"{rate / 1e12:.1f} TFLOP/s")
    for shape, n_images in plan.shapes:
        work = plan.work(n_images)
        for quantiser in QUANTISERS:
            base = replace(machine, quantiser=quantiser)
            what = f"{shape.name}, {quantiser or machine.dtype}, {n_images} images with 5 captions".replace("torch.", "")
            yield "training", what, lambda shape=shape, work=work, base=base: training(plan, shape, work, base, rate)
        yield "packed against peft", f"{shape.name}, {plan.n_patches} image tokens", lambda shape=shape: against_peft(plan, shape, machine)
        for n_rows in plan.rows:
            what = f"{shape.name}, {n_rows} rows, {N_ADAPTERS} adapters"
            yield "decoding", what, lambda shape=shape, n_rows=n_rows: decoding(plan, shape, machine, n_rows)
    shape = plan.shapes[0][0]
    arranged: Mapping[str, Arrange] = {"packed": pack_rows, "forked": fork_rows}
    for name, arrange in arranged.items():
        yield "equality", f"{shape.name}, {name} and separate rows", lambda arrange=arrange: equality(plan, shape, machine, machine, arrange)
    flex = replace(machine, attention="flex_attention")
    yield "equality", f"{shape.name}, packed rows, flex attention and sdpa", lambda: equality(plan, shape, flex, machine, pack_rows, pack_rows)
    work, compiled = plan.work(plan.shapes[0][1]), replace(machine, is_compiled=True)
    yield "training", f"{shape.name}, flex attention", lambda: training(plan, shape, work, flex, rate)
    yield "training", f"{shape.name}, compiled", lambda: training(plan, shape, work, compiled, rate)
    for shape, _ in plan.shapes:
        with_liger = replace(machine, has_liger=True)
        yield "packed against peft", f"{shape.name}, peft with Liger", lambda shape=shape, with_liger=with_liger: against_peft(plan, shape, with_liger)


# ----------------------------------------
# The parts.


def _matmul_rate(plan: Plan, machine: Machine) -> float:
    """Operations a second of one product of square matrices, in the models' dtype: the median of ten."""
    left, right = torch.randn(2, plan.side, plan.side, device=machine.device, dtype=machine.dtype)
    seconds = [_seconds(machine, lambda: left @ right) for _ in range(13)][3:]
    return 2 * plan.side**3 / statistics.median(seconds)


def _seconds(machine: Machine, call: Callable[[], object]) -> float:
    started = seconds_on(machine.device)
    call()
    return max(seconds_on(machine.device) - started, 1e-9)


def training(plan: Plan, shape: Shape, work: Work, machine: Machine, rate: float) -> Row:
    """Steps with LoRA of rank 8 on queries and values and a linear bridge: tokens, the share of the matmul rate, and memory."""
    _check(machine)
    model = our_model(shape, machine, drawn_tower(work.n_patches), "lora")
    features = work.features(machine)
    base = sum(_n_bytes(parameter) for parameter in model.language.model.parameters()) / 2**30
    step, batch = our_step(model, work, lambda: features), as_batch(encoded(model, work), features, arrange_of(model))
    step()
    peak_mib(machine.device, fresh=True)
    seconds = statistics.median(_seconds(machine, step) for _ in range(plan.repetitions))
    share = frozen_operations(model, batch) / seconds / rate
    peak, tokens = peak_mib(machine.device) / 1024, batch.ids.numel() / seconds
    found = f"{tokens:.0f} tokens/s read, {work.n_images * work.n_texts / seconds:.1f} captions/s, {share:.2f} of the matmul rate, "
    return Row(part="training", what="", found=f"{found}base {base:.2f} GiB, at most {peak:.2f} GiB in all")


def _n_bytes(parameter: Tensor) -> int:
    """Of a weight in memory; of a quantised one those of its parts."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    if flatten is None:
        return parameter.numel() * parameter.element_size()
    return sum(_n_bytes(getattr(parameter, name)) for name in flatten()[0])


def against_peft(plan: Plan, shape: Shape, machine: Machine) -> Row:
    """One step of four images in turns: packed rows against one row per caption through peft. Both sides must give one loss."""
    _check(machine)
    work = plan.work(4)
    features = work.features(machine)
    repeated = features.repeat_interleave(work.n_texts, 0)
    model = our_model(shape, machine, drawn_tower(work.n_patches), "lora")
    ours = our_step(model, work, lambda: features)
    theirs = their_step(model, shape, machine, work, lambda: repeated, "lora")
    turns = alternate({"adalink": ours, "peft": theirs}, plan.repetitions, machine.device, machine.dtype)
    ratio = statistics.median(turns.ratios("peft", "adalink"))
    peaks = [_peak_of(machine, side) for side in (ours, theirs)]
    each = " and ".join(f"{1000 * turns.median(side) / work.n_images / work.n_texts:.2f} ms a caption" for side in ("adalink", "peft"))
    return Row(part="", what="", found=f"{ratio:.2f} times as fast, {each}; at most {peaks[0]:.2f} and {peaks[1]:.2f} GiB with both models")


def _peak_of(machine: Machine, step: Callable[[], float]) -> float:
    peak_mib(machine.device, fresh=True)
    step()
    return peak_mib(machine.device) / 1024


@torch.no_grad()
def decoding(plan: Plan, shape: Shape, machine: Machine, n_rows: int) -> Row:
    """One token for every row with each step, each row served by one of the adapters, after prompts of an image and eight words."""
    model = composed(shape, machine, drawn_tower(plan.n_patches), ADALINK)
    names = ["bench", *(f"bench{i}" for i in range(1, N_ADAPTERS))]
    for name in names[1:]:
        model.add_adapter(name, ADALINK)
    served = [names[i % N_ADAPTERS] for i in range(n_rows)]
    work = Work(n_patches=plan.n_patches, n_texts=1, n_prompt=9, n_images=n_rows)
    batch = _prompts(model, work, machine)
    running = Decoding(model.language, model.adapted.attachment)
    token_map = model.token_map(batch, served)
    scores: list[Tensor] = []
    first = _seconds(machine, lambda: scores.append(running.join(batch, token_map, may_share=False)))

    def written(n: int) -> None:
        for _ in range(n):
            scores[:] = [running.step(scores[0].argmax(-1))]

    written(2)
    seconds = _seconds(machine, lambda: written(plan.n_new)) / plan.n_new
    found = f"{n_rows / seconds:.1f} tokens/s, {1000 * seconds:.2f} ms a token; prompts of {batch.ids.shape[1]} tokens in {1000 * first:.0f} ms"
    return Row(part="decoding", what="", found=found)


def _prompts(model: VisionLanguageModel, work: Work, machine: Machine) -> Batch:
    vocabulary = model.language.model.config.vocab_size
    rows = [model.row_encoder().prompt(texts[0].question) for texts in work.texts(vocabulary)]
    return collate(rows, range(len(rows)), work.features(machine), kind="patches", side="left", pad_id=PAD_ID).to(machine.device)


def equality(plan: Plan, shape: Shape, one: Machine, other: Machine, arrange: Arrange, beside: Arrange = separate_rows) -> Row:
    """Loss and gradients of two ways to read the same captions; rounding of the dtype is what may be left between them."""
    _check(one)
    found, wanted = (_learnt(plan, shape, machine, by) for machine, by in ((one, arrange), (other, beside)))
    loss = abs(found[0] - wanted[0]) / abs(wanted[0])
    error = (found[1] - wanted[1]).norm() / wanted[1].norm()
    is_equal = loss < 0.02 and error < 0.1
    verdict = "equal" if is_equal else "NOT EQUAL"
    return Row(part="", what="", found=f"{verdict}: loss apart by {loss:.1e}, gradients by {float(error):.1e} of their norm, in {str(one.dtype)[6:]}")


def _learnt(plan: Plan, shape: Shape, machine: Machine, arrange: Arrange) -> tuple[float, Tensor]:
    """The loss, and all gradients in one vector."""
    work = plan.work(2)
    model = our_model(shape, machine, drawn_tower(work.n_patches), "lora")
    batch = as_batch(encoded(model, work), work.features(machine), arrange).to(machine.device)
    loss = model(batch)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.adapted.active_adapter().parameters() if parameter.grad is not None]
    return float(loss.detach()), torch.cat(gradients).float().cpu()


def _check(machine: Machine) -> None:
    if machine.attention == "flex_attention" and machine.device.type != "cuda":
        raise AdalinkError("flex attention learns on a GPU alone")
    if machine.is_compiled and machine.device.type != "cuda":
        raise AdalinkError("compiling takes minutes on a CPU")
    if machine.has_liger and (machine.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None):
        raise AdalinkError("Liger-Kernel needs a GPU, and pip install liger-kernel")


# ----------------------------------------
# The run.


def measured(plan: Plan, machine: Machine, minutes: float) -> Iterator[Row]:
    """Every row, those that were not measured too, with the reason."""
    end = time.monotonic() + 60 * minutes
    for part, what, call in parts(plan, machine):
        if time.monotonic() > end:
            yield Row(part=part, what=what, found=f"not measured: the {minutes:g} minutes were over")
            continue
        try:
            found = call().found
        except (AdalinkError, ImportError) as error:
            found = f"not measured: {error}"
        except torch.OutOfMemoryError:
            found = "not measured: more memory than the card has"
        except Exception as error:  # a kernel that one card lacks must not cost the other rows; the table names it
            found = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".replace("|", "/")
        yield Row(part=part, what=what, found=found)
        gc.collect()  # hooks and modules hold each other
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write. The rows come back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="all of it in miniature, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part starts after so many")
    parser.add_argument("--out", type=Path, help="by default tests/benchmarks/RESULTS-GPU.md, and nothing with --tiny")
    asked: Any = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA here: give --tiny, which runs on a CPU")
    machine = Machine(device=torch.device("cpu" if asked.tiny else "cuda"), dtype=torch.bfloat16)
    where = about(Bench(sizes=SIZES["tiny"], machine=machine, repetitions=(TINY if asked.tiny else Plan()).repetitions))
    out = asked.out or (None if asked.tiny else RESULTS)
    head = ["# One GPU", "", "`tests/benchmarks/gpu.sh`: " + "; ".join(f"{name}: {value}" for name, value in where.items()), "", f"({GOAL})", ""]
    lines = [*head, "| part | what | found |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    rows = []
    for row in measured(TINY if asked.tiny else Plan(), machine, asked.minutes):
        print(row, flush=True)
        rows.append(row)
        if out is not None:
            out.write_text("\n".join([*lines, *map(str, rows), ""]))
    return rows


if __name__ == "__main__":
    main()
