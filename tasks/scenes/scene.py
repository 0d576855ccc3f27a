"""One scene: the objects of a picture and its background, drawn by lot from a seed. Everything else is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

__all__ = ["SIDE", "Scene", "Thing", "make_scene", "place", "relation"]


# ----------------------------------------
# The words of scenes: what each attribute is called, in captions, in questions and by people who answer.


# The first word of a tuple is the usual one; captions draw it about three times in four, answers nearly always.
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond",),
    "ring": ("ring", "hoop"),
    "cross": ("cross",),
}
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
BACKGROUNDS: tuple[str, ...] = ("grass", "sand", "sky", "night", "snow", "water")
_IN: dict[str, str] = {"top": "at", "bottom": "at", "left": "on", "right": "on"}
PLACES: tuple[str, ...] = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
IN_PLACE: dict[str, str] = {spot: f"{_IN.get(spot, 'in')} the {spot}" for spot in PLACES}

WHERE: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "on a lawn", "on green grass"),
    "sand": ("on the sand", "on a beach", "on yellow sand"),
    "sky": ("in the sky", "in a cloudy sky", "among the clouds"),
    "night": ("at night", "in the night sky", "under the stars"),
    "snow": ("in the snow", "on white snow", "on a snowy field"),
    "water": ("on the water", "in the sea", "on blue water"),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE: dict[str, str] = {"left": "right", "right": "left", "above": "below", "below": "above"}
NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four")

# What another person might have said instead: a synonym, or a neighbour that the eye takes for it.
ALIKE: dict[str, tuple[str, ...]] = {
    "red": ("dark red", "orange"),
    "orange": ("yellow", "red"),
    "yellow": ("gold", "orange"),
    "green": ("dark green", "light green"),
    "blue": ("light blue", "dark blue"),
    "purple": ("violet", "pink"),
    "white": ("gray", "silver"),
    "black": ("dark", "gray"),
    "circle": ("ball", "dot"),
    "square": ("block", "box"),
    "triangle": ("pyramid", "arrow"),
    "star": ("stars", "flower"),
    "heart": ("love", "hearts"),
    "diamond": ("rhombus", "kite"),
    "ring": ("hoop", "donut"),
    "cross": ("plus", "plus sign"),
    "grass": ("lawn", "field"),
    "sand": ("beach", "desert"),
    "sky": ("clouds", "blue sky"),
    "night": ("night sky", "stars"),
    "snow": ("ice", "snowy field"),
    "water": ("sea", "ocean"),
    "top left": ("left", "top"),
    "top": ("above", "top middle"),
    "top right": ("right", "top"),
    "left": ("on left", "left side"),
    "middle": ("center", "in middle"),
    "right": ("on right", "right side"),
    "bottom left": ("left", "bottom"),
    "bottom": ("below", "bottom middle"),
    "bottom right": ("right", "bottom"),
    "yes": ("yes it is", "yeah"),
    "no": ("nope", "not really"),
}


def article(phrase: str) -> str:
    """The phrase with its indefinite article: "orange star" -> "an orange star"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(noun: str) -> str:
    """The plural of a shape's name: "cross" -> "crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


SIDE = 96  # pixels, of the square picture
CELL = 16  # pixels: centres lie near the middles of a grid of 6 x 6 cells, so that a small encoder learns to see in minutes
JITTER = 3  # pixels, either way
RADII = {"small": (10, 11), "large": (17, 18)}  # pixels; the gap between the sizes is what the eye can tell
GAP = 3  # pixels between two objects, at least
# How a number of objects splits into kinds, with its weight. Repeats are common, so that counting a kind is worth asking.
SPLITS: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {
    1: (((1,), 1),),
    2: (((1, 1), 3), ((2,), 2)),
    3: (((1, 1, 1), 2), ((2, 1), 2), ((3,), 1)),
    4: (((1, 1, 1, 1), 2), ((2, 1, 1), 2), ((2, 2), 2), ((3, 1), 2), ((4,), 1)),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: what it is, and where its centre lies (pixels from the top left corner)."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to four objects that do not touch, on a background."""

    things: tuple[Thing, ...]
    background: str

    def alike(self, *, shape: str = "", colour: str = "", size: str = "") -> tuple[Thing, ...]:
        """The objects of this shape, colour and size; an empty word means any."""
        wanted = (shape, colour, size)
        return tuple(t for t in self.things if all(not w or w == has for w, has in zip(wanted, (t.shape, t.colour, t.size), strict=True)))


def place(thing: Thing) -> str:
    """The ninth of the picture in which the centre lies: "top left", "middle", ..."""
    column, row = ((c > 0.39 * SIDE) + (c > 0.61 * SIDE) for c in (thing.x, thing.y))
    return PLACES[3 * row + column]


def relation(a: Thing, b: Thing) -> str:
    """Where a lies seen from b: "left", "right", "above", "below"; empty where no one direction is plain."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(abs(dx) - abs(dy)) < 8:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def make_scene(rng: Random) -> Scene:
    """A scene by lot. Shapes, colours and backgrounds are drawn independently, so none of them tells another."""
    n = rng.randint(1, 4)
    splits = SPLITS[n]
    counts = rng.choices([s for s, _ in splits], [w for _, w in splits])[0]
    shapes = [shape for shape, count in zip(rng.sample(list(SHAPES), len(counts)), counts, strict=True) for _ in range(count)]
    colours: list[str] = []
    for _ in shapes:
        repeat = colours and rng.random() < 0.25
        colours.append(rng.choice(colours) if repeat else rng.choice(COLOURS))
    sizes = [rng.choice(list(SIZES)) for _ in shapes]
    radii = [rng.choice(RADII[size]) for size in sizes]
    spots = _spots(rng, radii)
    things = [
        Thing(shape=shape, colour=colour, size=size, x=x, y=y, radius=radius)
        for shape, colour, size, radius, (x, y) in zip(shapes, colours, sizes, radii, spots, strict=True)
    ]
    rng.shuffle(things)
    return Scene(things=tuple(things), background=rng.choice(BACKGROUNDS))


def _spots(rng: Random, radii: list[int]) -> list[tuple[int, int]]:
    """A centre for each radius, none touching another. Starts over when the last one finds no room: sizes stay as drawn."""
    while True:
        spots: list[tuple[int, int]] = []
        for radius in radii:
            for _ in range(20):
                x, y = (_coordinate(rng, radius) for _ in "xy")
                if all((x - u) ** 2 + (y - v) ** 2 >= (radius + r + GAP) ** 2 for (u, v), r in zip(spots, radii, strict=False)):
                    spots.append((x, y))
                    break
        if len(spots) == len(radii):
            return spots


def _coordinate(rng: Random, radius: int) -> int:
    """Near the middle of a cell, and so far from the edge that the object lies within the picture."""
    near = CELL * rng.randrange(SIDE // CELL) + CELL // 2 + rng.randint(-JITTER, JITTER)
    return min(max(near, radius + 2), SIDE - radius - 3)
