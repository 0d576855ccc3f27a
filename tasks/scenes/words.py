"""The words of scenes: what each attribute is called, in captions, in questions and by people who answer."""

from __future__ import annotations

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
