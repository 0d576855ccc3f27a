"""Reads captions and questions of scenes back, by rules of its own, and says whether they are true of a scene."""

from __future__ import annotations

import re

from tasks.scenes.scene import Scene, Thing, place, relation

SHAPE_OF = {
    **dict.fromkeys(("circle", "ball"), "circle"),
    **dict.fromkeys(("square", "block"), "square"),
    **dict.fromkeys(("ring", "hoop"), "ring"),
    **{w: w for w in ("triangle", "star", "heart", "diamond", "cross")},
}
SIZE_OF = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
GROUND_OF = {
    "grass": ("on the grass", "on a lawn", "on green grass"),
    "sand": ("on the sand", "on a beach", "on yellow sand"),
    "sky": ("in the sky", "in a cloudy sky", "among the clouds"),
    "night": ("at night", "in the night sky", "under the stars"),
    "snow": ("in the snow", "on white snow", "on a snowy field"),
    "water": ("on the water", "in the sea", "on blue water"),
}
NUMBER_OF = {"one": 1, "two": 2, "three": 3, "four": 4}
WAY_OF = {"left of": "left", "right of": "right", "above": "above", "over": "above", "below": "below", "under": "below"}
ATTRIBUTES = rf"(?:(?P<size>{'|'.join(SIZE_OF)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?"
ONE = re.compile(rf"\ban? {ATTRIBUTES}(?P<shape>{'|'.join(SHAPE_OF)})\b")
MANY = re.compile(rf"\b(?P<number>two|three|four) {ATTRIBUTES}(?P<shape>{'|'.join(SHAPE_OF)}|shape|thing)(?:e?s)\b")
PLACE = re.compile(r"\b(?:in|at|on) the ((?:top|bottom)(?: left| right)?|left|right|middle)\b")


def matching(scene: Scene, found: re.Match[str]) -> list[Thing]:
    """The objects that a phrase may speak of."""
    shape, colour, size = SHAPE_OF.get(found["shape"], ""), found["colour"] or "", SIZE_OF.get(found["size"] or "", "")
    return [t for t in scene.things if shape in ("", t.shape) and colour in ("", t.colour) and size in ("", t.size)]


def caption_is_true(text: str, scene: Scene) -> bool:
    """Whether all that the caption says can be seen: objects, numbers, background, relation and place."""
    ones = [matching(scene, found) for found in ONE.finditer(text)]
    if not all(ones):
        return False
    for found in MANY.finditer(text):
        of_shape = [t for t in scene.things if found["shape"] in ("shape", "thing") or t.shape == SHAPE_OF[found["shape"]]]
        if not len(of_shape) == len(matching(scene, found)) == NUMBER_OF[found["number"]]:
            return False
    grounds = {ground for ground, phrases in GROUND_OF.items() for phrase in phrases if re.search(rf"\b{phrase}\b", text)}
    if grounds - {scene.background}:
        return False
    if spot := PLACE.search(text):
        return any(place(t) == spot[1] for t in ones[0])
    if way := re.search(r"\b(left of|right of|above|over|below|under) an?\b", text):
        return any(relation(a, b) == WAY_OF[way[1]] for a in ones[0] for b in ones[1] if a != b)
    return True


def true_answer(text: str, scene: Scene) -> str:
    """The answer to a question, worked out from the scene."""
    shapes = [s for s in ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross") if re.search(rf"\b{s}(e?s)?\b", text)]
    colours = [c for c in COLOURS if re.search(rf"\b{c}\b", text)]
    about = [t for t in scene.things if t.shape in shapes[:1] or (not shapes and t.colour in colours) or (not shapes and not colours)]
    if text.startswith("how many"):
        return str(len(about))
    if text.startswith(("what color", "where is")) or (text.startswith("what is the") and colours):
        assert len(about) == 1, f"{text} speaks of {len(about)} objects"
        return about[0].colour if "color" in text else place(about[0]) if text.startswith("where") else about[0].shape
    if "background" in text and text.startswith("what"):
        return scene.background
    way = next((way for words, way in WAY_OF.items() if f" {words} the " in text), "")
    if text.startswith("what is"):
        (found,) = [t for t in scene.things if t != about[0] and relation(t, about[0]) == way]
        return found.shape
    return "yes" if _holds(text, scene, about, shapes, colours, way) else "no"


def _holds(text: str, scene: Scene, about: list[Thing], shapes: list[str], colours: list[str], way: str) -> bool:
    if "background" in text:
        return text.removesuffix("?").split()[-1] == scene.background
    if number := re.search(r"\b(one|two|three|four) shapes?\b", text):
        return len(scene.things) == NUMBER_OF[number[1]]
    if way:
        # Which shape is named first decides who is seen from whom.
        first, second = sorted(shapes, key=text.index)
        (a,), (b,) = ([t for t in scene.things if t.shape == s] for s in (first, second))
        return relation(a, b) == way
    if text.startswith("is there"):
        return any(t.colour == colours[0] for t in about)
    if text.startswith("are there any"):
        return bool(about)
    assert len(about) == 1, f"{text} speaks of {len(about)} objects"
    return about[0].colour in colours or about[0].size in text
