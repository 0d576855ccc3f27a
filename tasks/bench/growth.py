"""How the cost of a caption grows with image tokens, captions per image, the language model and the rank: both sides, each point alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from tasks.bench.clock import Finding, Needs, needs
from tasks.bench.models import Bench, Shape, Work, check_peft

__all__ = ["Point", "as_svg", "points"]


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
            what=f"{self.shape.name}, {self.work.n_patches} image tokens, {n} captions an image, rank {self.rank}: faster than peft",
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
    steps += [("captions an image", n, str(n), shape, Work(n_patches=patches, n_texts=n), rank) for n in sizes.growth_texts]
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


# ----------------------------------------
# The points of growth as one image: a column for each thing that grows, time above and memory below.


WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 210, 150, 62, 96, 40, 70  # of a panel, and around it
OURS, THEIRS, INK, FAINT = "#1d4ed8", "#b45309", "#1f2937", "#e5e7eb"


def as_svg(points: Sequence[Point], heading: str) -> str:
    """The image. heading: what was measured where."""
    axes = list(dict.fromkeys(point.axis for point in points))
    width, height = LEFT + len(axes) * (WIDTH + GAP_X), TOP + 2 * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 20, "A training step, per caption: adalink and peft, LoRA on q and v", size=14),
        _text(LEFT, 38, heading),
        *_legend(LEFT, 56),
    ]
    rows: tuple[tuple[str, Callable[[Needs], float]], ...] = (
        ("ms a caption", lambda needs: 1000 * needs.seconds),
        ("MiB a caption", lambda needs: needs.mib),
    )
    for r, (unit, read) in enumerate(rows):
        for c, axis in enumerate(axes):
            found = [point for point in points if point.axis == axis]
            parts += _panel(LEFT + c * (WIDTH + GAP_X), TOP + r * (HEIGHT + GAP_Y), found, read, axis, unit if c == 0 else "")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(x: float, y: float, points: Sequence[Point], read: Callable[[Needs], float], axis: str, unit: str) -> list[str]:
    values = {side: [read(getattr(point, side)) / point.work.n_texts for point in points] for side in ("ours", "theirs")}
    top = _ceiling(max(v for side in values.values() for v in side if v == v))
    low, high = points[0].value, points[-1].value
    across = [x + 26 + (WIDTH - 52) * ((point.value - low) / (high - low) if high > low else 0.5) for point in points]
    parts = []
    for share in (0.0, 0.5, 1.0):
        level = y + HEIGHT * (1 - share)
        parts += [
            f'<line x1="{x}" x2="{x + WIDTH}" y1="{level}" y2="{level}" stroke="{FAINT}"/>',
            _text(x - 5, level + 4, f"{top * share:g}", anchor="end"),
        ]
    parts += [_text(place, y + HEIGHT + 15, point.label, anchor="middle") for place, point in zip(across, points, strict=True)]
    parts.append(_text(x + WIDTH / 2, y + HEIGHT + 31, axis, anchor="middle", weight="bold"))
    if unit:
        parts.append(_text(x - 44, y - 14, unit, weight="bold"))
    for side, colour in (("theirs", THEIRS), ("ours", OURS)):
        places = [(place, y + HEIGHT * (1 - v / top)) for place, v in zip(across, values[side], strict=True) if v == v]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
    return parts


def _ceiling(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    scale = 1.0
    while scale * 10 <= value:
        scale *= 10
    while scale > value:
        scale /= 10
    return next(scale * step for step in (1, 2, 4, 6, 8, 10) if scale * step >= value)


def _legend(x: float, y: float) -> list[str]:
    parts = []
    for offset, colour, name in ((0, OURS, "adalink"), (80, THEIRS, "peft, one row per caption")):
        parts += [f'<circle cx="{x + offset + 4}" cy="{y - 4}" r="4" fill="{colour}"/>', _text(x + offset + 13, y, name)]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{INK}">{escape(text)}</text>'
    )
