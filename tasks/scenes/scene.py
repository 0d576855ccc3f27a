"""One scene: the objects of an image and its background, drawn from a seed. Images and texts are made from it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["SIDE", "Scene", "Thing", "draw", "make_scene", "place", "png", "relation"]


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

# The word of another person: a synonym, or a neighbour that looks alike.
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


SIDE = 96  # pixels, of the square image
CELL = 16  # pixels: centres lie near the middles of a grid of 6 x 6 cells, so that a small encoder learns to see in minutes
JITTER = 3  # pixels, either way
RADII = {"small": (10, 11), "large": (17, 18)}  # pixels; the gap between the sizes is easy to see
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
    """The ninth of the image in which the centre lies: "top left", "middle", ..."""
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
    """A scene by lot. Shapes, colours and backgrounds are drawn independently, so none of them predicts another."""
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
    """Near the middle of a cell, and so far from the edge that the object lies within the image."""
    near = CELL * rng.randrange(SIDE // CELL) + CELL // 2 + rng.randint(-JITTER, JITTER)
    return min(max(near, radius + 2), SIDE - radius - 3)


# ----------------------------------------
# A scene as an image: soft backgrounds, outlined objects with a shadow, all drawn six times as large and reduced.


FINE = 6  # supersampling: edges are smooth because each pixel is the mean of 36
TURNS = (-8, 0, 8)  # degrees; few, so that every mask is made once per process
RGB = tuple[int, int, int]

PAINTS: dict[str, tuple[RGB, RGB, RGB]] = {  # top and bottom of the body, outline
    "red": ((247, 88, 80), (208, 28, 36), (128, 10, 22)),
    "orange": ((255, 172, 66), (243, 122, 18), (150, 66, 4)),
    "yellow": ((255, 238, 110), (247, 204, 28), (146, 110, 6)),
    "green": ((82, 204, 104), (20, 140, 62), (6, 76, 34)),
    "blue": ((78, 140, 250), (28, 72, 212), (12, 34, 122)),
    "purple": ((186, 104, 226), (126, 44, 174), (68, 16, 104)),
    "white": ((255, 255, 255), (228, 230, 238), (112, 118, 134)),
    "black": ((74, 76, 86), (22, 22, 28), (176, 180, 190)),
}


def png(scene: Scene, rng: Random) -> bytes:
    """The image as PNG bytes, RGB, 96 x 96."""
    buffer = io.BytesIO()
    draw(scene, rng).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def draw(scene: Scene, rng: Random) -> Image.Image:
    """The image, RGB, 96 x 96; the lot decides what no text speaks of: the cut of the background and small turns."""
    texture = _background(scene.background)
    left, top = (rng.randint(0, texture.width - SIDE) for _ in "xy")
    image = texture.crop((left, top, left + SIDE, top + SIDE))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for thing in scene.things:
        body, outline, shadow = _masks(thing.shape, thing.radius, rng.choice(TURNS))
        corner = (thing.x - body.width // 2, thing.y - body.height // 2)
        image.paste((16, 20, 36), (corner[0] + 1, corner[1] + 2), shadow)
        image.paste(PAINTS[thing.colour][2], corner, outline)
        image.paste(_body(thing.colour, body.width), corner, body)
    return image


@lru_cache(maxsize=64)
def _body(colour: str, width: int) -> Image.Image:
    top, bottom, _ = PAINTS[colour]
    return _ramp(top, bottom, width)


def _ramp(top: RGB, bottom: RGB, side: int) -> Image.Image:
    """A square that runs from one colour at its top to another at its bottom."""
    mask = Image.linear_gradient("L").resize((side, side))
    return Image.composite(Image.new("RGB", (side, side), bottom), Image.new("RGB", (side, side), top), mask)


@lru_cache(maxsize=1024)
def _masks(shape: str, radius: int, turn: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Three masks of one width: the body inside its outline, the body with its outline, the shadow."""
    half = radius + 4  # room for the turn and for the shadow's blur
    side = 2 * half + 1
    fine = Image.new("L", (side * FINE, side * FINE))
    _trace(ImageDraw.Draw(fine), shape, side * FINE / 2, radius * FINE)
    fine = fine.rotate(turn, Image.Resampling.BICUBIC)
    inner = _shrunk(fine, FINE + 1)
    outline, body = (m.resize((side, side), Image.Resampling.BOX) for m in (fine, inner))
    return body, outline, outline.filter(ImageFilter.GaussianBlur(1.2)).point(lambda v: v * 0.38)


def _shrunk(mask: Image.Image, by: int) -> Image.Image:
    """Each pixel is the least within `by` pixels of it, rows first and then columns: what `ImageFilter.MinFilter(2 * by + 1)` gives, in a tenth of the time."""
    values = np.asarray(mask)
    for axis in (0, 1):
        padded = np.pad(values, [(by, by) if axis == one else (0, 0) for one in (0, 1)], mode="edge")
        values = np.lib.stride_tricks.sliding_window_view(padded, 2 * by + 1, axis=axis).min(axis=-1)
    return Image.fromarray(values)


def _trace(pen: ImageDraw.ImageDraw, shape: str, centre: float, r: float) -> None:
    """Draw the shape, all of whose points lie within r of the centre; areas are near to one another, so size reads alike."""

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(centre + r * x, centre + r * y) for x, y in points]

    def around(n: int, start: float, radius: float) -> list[tuple[float, float]]:
        angles = [math.radians(start + 360 * i / n) for i in range(n)]
        return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]

    if shape in ("circle", "ring"):
        pen.ellipse([centre - r * 0.94, centre - r * 0.94, centre + r * 0.94, centre + r * 0.94], fill=255)
        if shape == "ring":
            pen.ellipse([centre - r * 0.46, centre - r * 0.46, centre + r * 0.46, centre + r * 0.46], fill=0)
    elif shape == "star":
        outer, inner = around(5, -90, 1.0), around(5, -54, 0.46)
        pen.polygon(at([p for pair in zip(outer, inner, strict=True) for p in pair]), fill=255)
    elif shape == "heart":
        curve = [math.radians(d) for d in range(0, 360, 3)]
        wave = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in curve]
        pen.polygon(at([(16 * math.sin(a) ** 3 / 17, -(w + 2.5) / 17) for a, w in zip(curve, wave, strict=True)]), fill=255)
    elif shape == "cross":
        pen.polygon(at([(x, y) for x, y in _CROSS]), fill=255)
    else:
        corners = {"square": around(4, 45, 1.0), "triangle": around(3, -90, 1.0), "diamond": [(0, -1.0), (0.66, 0), (0, 1.0), (-0.66, 0)]}
        pen.polygon(at(corners[shape]), fill=255)


_A, _B = 0.3, 0.92  # half the width of an arm, and its length
_CROSS = [(-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A), (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A)]


@lru_cache(maxsize=8)
def _background(name: str) -> Image.Image:
    """A texture larger than an image, from which each image cuts its own part. Its marks come from a fixed lot."""
    rng = Random(name)
    side = 2 * SIDE
    top, bottom = _GROUND[name]
    texture = _ramp(top, bottom, side * 2)
    pen = ImageDraw.Draw(texture, "RGBA")
    for _ in range(_MARKS[name]):
        _mark(pen, name, rng, side * 2)
    if name in ("sky", "snow"):
        texture = texture.filter(ImageFilter.GaussianBlur(4))
    return texture.resize((side, side), Image.Resampling.LANCZOS)


_GROUND: dict[str, tuple[RGB, RGB]] = {
    "grass": ((150, 200, 120), (118, 178, 92)),
    "sand": ((240, 220, 172), (226, 200, 146)),
    "sky": ((142, 200, 246), (196, 228, 252)),
    "night": ((22, 26, 62), (46, 48, 98)),
    "snow": ((226, 234, 244), (244, 248, 252)),
    "water": ((70, 172, 190), (36, 132, 166)),
}
_MARKS = {"grass": 2600, "sand": 2600, "sky": 60, "night": 160, "snow": 90, "water": 420}


def _mark(pen: ImageDraw.ImageDraw, name: str, rng: Random, side: int) -> None:
    """One blade, grain, cloud, star, drift or wave."""
    x, y, t = rng.random() * side, rng.random() * side, rng.random()
    if name == "grass":
        pen.line([x, y, x + rng.uniform(-3, 3), y - 5 - 6 * t], fill=(70, 140 + int(60 * t), 50, 110), width=2)
    elif name == "sand":
        pen.ellipse([x, y, x + 2 + 2 * t, y + 2 + 2 * t], fill=(176 + int(60 * t), 140 + int(70 * t), 90, 80))
    elif name == "sky":
        for i in range(4):
            u, v, r = x + 11 * i, y - 5 * (i % 2), 9 + 8 * t
            pen.ellipse([u - r, v - r * 0.6, u + r, v + r * 0.6], fill=(255, 255, 255, 120))
    elif name == "night":
        r = 0.8 + 1.2 * t
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(250, 248, 210, 150 + int(100 * t)))
    elif name == "snow":
        pen.ellipse([x - 30, y - 6, x + 30, y + 6], fill=(196, 212, 232, 90))
    else:
        pen.arc([x, y, x + 22, y + 9], 200, 340, fill=(190, 236, 240, 110 + int(80 * t)), width=2)
