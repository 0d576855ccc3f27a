"""How the cost of a caption grows with image tokens, captions per picture, the language model and the rank: both sides, each point alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tasks.bench.composed import Work
from tasks.bench.finding import Finding
from tasks.bench.peak import Needs, needs
from tasks.bench.shapes import Shape
from tasks.bench.sides import check_peft
from tasks.bench.sizes import Bench

__all__ = ["Point", "points"]

N_PATCHES = 256  # where something else grows


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step. axis: what grows; value: how large it is; label: of the value, where it is no number of interest."""

    axis: str
    value: float
    label: str
    shape: Shape
    work: Work
    rank: int
    ours: Needs
    theirs: Needs

    @property
    def finding(self) -> Finding:
        """The row of the table."""
        n = self.work.n_texts
        return Finding(
            part="growth",
            what=f"{self.shape.name}, {self.work.n_patches} image tokens, {n} captions a picture, rank {self.rank}: faster than peft",
            ratios=(self.theirs.seconds / self.ours.seconds,),
            detail=f"{1000 * self.ours.seconds / n:.1f} ms and {self.ours.mib / n:.1f} MiB a caption against "
            f"{1000 * self.theirs.seconds / n:.1f} ms and {self.theirs.mib / n:.1f} MiB",
        )


def points(bench: Bench) -> Iterator[Point]:
    """Every point as it is found: a LoRA step in a process of its own for each side. Raises ConfigError without peft."""
    check_peft()
    sizes = bench.sizes
    shape, patches, rank = sizes.growth_models[0], min(N_PATCHES, sizes.growth_patches[-1]), sizes.growth_ranks[0]
    usual = Work(n_patches=patches)
    steps = [("image tokens", n, str(n), shape, Work(n_patches=n), rank) for n in sizes.growth_patches]
    steps += [("captions a picture", n, str(n), shape, Work(n_patches=patches, n_texts=n), rank) for n in sizes.growth_texts]
    steps += [("language model", i, other.name, other, usual, rank) for i, other in enumerate(sizes.growth_models)]
    steps += [("rank", i, str(other), shape, usual, other) for i, other in enumerate(sizes.growth_ranks)]
    known: dict[tuple[str, Work, int], tuple[Needs, Needs]] = {}  # the usual step is on every axis
    for axis, value, label, model, work, of_rank in steps:
        key = (model.name, work, of_rank)
        if key not in known:
            ours, theirs = (needs(side, model, bench.machine, work, "lora", of_rank, bench.repetitions) for side in ("adalink", "peft"))
            known[key] = ours, theirs
        ours, theirs = known[key]
        yield Point(axis=axis, value=value, label=label, shape=model, work=work, rank=of_rank, ours=ours, theirs=theirs)
