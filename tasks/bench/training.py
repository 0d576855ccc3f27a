"""Training throughput and memory for each caption or question, against HF peft with one row per text."""

from __future__ import annotations

import gc
from collections.abc import Iterator

from tasks.bench.clock import Turns, alternate
from tasks.bench.composed import Work, drawn_tower
from tasks.bench.finding import Finding
from tasks.bench.peak import needs
from tasks.bench.shapes import Shape
from tasks.bench.sides import Taught, check_peft, our_model, our_step, their_step
from tasks.bench.sizes import Bench, Case

__all__ = ["against_peft", "training"]


def training(bench: Bench) -> Iterator[Finding]:
    """Speed and memory of the captions on every language model; questions, and LoRA on text alone, on the first. Raises ConfigError without peft."""
    check_peft()
    sizes = bench.sizes
    taught: Taught
    for shape in sizes.models:
        for taught in ("lora", "prompt"):
            for case in sizes.captions:
                yield _speed(bench, shape, case, taught, "captions")
    for case in sizes.questions:
        yield _speed(bench, sizes.models[0], case, "lora", "questions")
    for case in sizes.text_only:
        yield _speed(bench, sizes.models[0], case, "text lora", "captions")
    for shape in sizes.models:
        for case in sizes.captions:
            yield _memory(bench, shape, case)


def _speed(bench: Bench, shape: Shape, case: Case, taught: Taught, texts: str) -> Finding:
    work, machine = case.work, bench.machine
    model = our_model(shape, machine, drawn_tower(work.n_patches), taught)
    features = work.features(machine)
    repeated = features.repeat_interleave(work.n_texts, 0)
    sides = {
        "adalink": our_step(model, work, lambda: features),
        "peft": their_step(model, shape, machine, work, lambda: repeated, taught),
    }
    turns = alternate(sides, bench.repetitions, machine.device, machine.dtype)
    del model, sides
    gc.collect()  # hooks and modules hold each other, and the next model needs their memory
    return against_peft("training", f"{shape.name}, {taught}, {work.n_patches} image tokens, {texts}: faster than peft", turns, case)


def against_peft(part: str, what: str, turns: Turns, case: Case) -> Finding:
    """A step of both sides, in figures for each text."""
    ours, theirs = (_speed_of(turns.median(side), case.work) for side in ("adalink", "peft"))
    return Finding(part=part, what=what, ratios=turns.ratios("peft", "adalink"), target=case.faster, detail=f"{ours} against {theirs}")


def _speed_of(seconds: float, work: Work) -> str:
    """Rows as the peer reads them are what both sides are paid for."""
    n_texts = work.n_texts * work.n_pictures
    tokens = n_texts * (work.n_patches + work.n_prompt + work.n_target)
    return f"{1000 * seconds / n_texts:.1f} ms a text ({tokens / seconds:.0f} tokens/s)"


def _memory(bench: Bench, shape: Shape, case: Case) -> Finding:
    ours, theirs = (needs(side, shape, bench.machine, case.work, "lora") for side in ("adalink", "peft"))
    return Finding(
        part="training",
        what=f"{shape.name}, lora, {case.work.n_patches} image tokens, captions: smaller than peft",
        ratios=(theirs.mib / ours.mib,),
        target=case.smaller,
        detail=f"{ours.mib:.0f} MiB against {theirs.mib:.0f} MiB above the loaded model",
    )
