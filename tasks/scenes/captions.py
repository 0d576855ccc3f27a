"""Five captions of a scene, each true, from a grammar: what is mentioned, in which order and in which words is drawn by lot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from tasks.scenes.scene import Scene, Thing, place, relation
from tasks.scenes.words import IN_PLACE, NUMBERS, RELATIONS, SHAPES, SIZES, WHERE, article, plural

__all__ = ["captions"]

N_CAPTIONS = 5


def captions(scene: Scene, rng: Random) -> tuple[str, ...]:
    """Five captions, no two alike, in small letters, each ending in a full stop."""
    made: dict[str, None] = {}
    while len(made) < N_CAPTIONS:
        pattern = rng.choices(list(_PATTERNS), list(_PATTERNS.values()))[0]
        text = pattern(scene, rng)
        if text:
            made.setdefault(f"{text}.")
    return tuple(made)


def _listed(scene: Scene, rng: Random) -> str:
    """A red star and two circles on the grass."""
    return f"{_list(scene, rng)}{_where(scene, rng, 0.7)}"


def _there_is(scene: Scene, rng: Random) -> str:
    """There are two circles and a red star on the grass."""
    listed = _list(scene, rng)
    return f"there {_verb(listed)} {listed}{_where(scene, rng, 0.6)}"


def _inverted(scene: Scene, rng: Random) -> str:
    """On the grass there is a red star."""
    listed = _list(scene, rng)
    return f"{rng.choice(WHERE[scene.background])} there {_verb(listed)} {listed}"


def _related(scene: Scene, rng: Random) -> str:
    """A red star is above a blue circle."""
    if len(scene.things) < 2:
        return ""
    a, b = rng.sample(scene.things, 2)
    way = relation(a, b)
    if not way:
        return ""
    return f"{_one(a, rng)}{rng.choice(('', ' is'))} {rng.choice(RELATIONS[way])} {_one(b, rng)}{_where(scene, rng, 0.3)}"


def _placed(scene: Scene, rng: Random) -> str:
    """A red star in the top left of the picture."""
    thing = rng.choice(scene.things)
    spot = IN_PLACE[place(thing)]
    return f"{_one(thing, rng)}{rng.choice(('', ' is', ' sits'))} {spot}{rng.choice(('', ' of the picture'))}{_where(scene, rng, 0.3)}"


def _counted(scene: Scene, rng: Random) -> str:
    """Three shapes on the grass, one of them a red star."""
    n = len(scene.things)
    if n == 1:
        return ""
    one = f", one of them {_one(rng.choice(scene.things), rng)}" if rng.random() < 0.6 else ""
    return f"{NUMBERS[n]} {rng.choice(('shapes', 'things'))}{_where(scene, rng, 1.0)}{one}"


_PATTERNS: dict[Callable[[Scene, Random], str], int] = {_listed: 6, _there_is: 3, _inverted: 3, _related: 4, _placed: 2, _counted: 1}


def _verb(listed: str) -> str:
    return "is" if listed.split()[0] in ("a", "an") else "are"


def _where(scene: Scene, rng: Random, chance: float) -> str:
    return f" {rng.choice(WHERE[scene.background])}" if rng.random() < chance else ""


def _list(scene: Scene, rng: Random) -> str:
    """Every object, one phrase for each kind: "two red circles, a star and a blue heart"."""
    groups = [_group(scene.alike(shape=shape), rng) for shape in dict.fromkeys(t.shape for t in scene.things)]
    phrases = [phrase for group in groups for phrase in group]
    rng.shuffle(phrases)
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _group(things: Sequence[Thing], rng: Random) -> list[str]:
    """Objects of one shape: each by itself where they are two of different colours, else a number and what they share."""
    if len(things) == 1 or (len(things) == 2 and things[0].colour != things[1].colour and rng.random() < 0.6):
        return [_one(thing, rng) for thing in things]
    first = things[0]
    colour = f"{first.colour} " if all(t.colour == first.colour for t in things) else ""
    size = f"{rng.choice(SIZES[first.size])} " if all(t.size == first.size for t in things) and rng.random() < 0.3 else ""
    return [f"{NUMBERS[len(things)]} {size}{colour}{plural(_usual(SHAPES[first.shape], rng))}"]


def _one(thing: Thing, rng: Random) -> str:
    size = f"{_usual(SIZES[thing.size], rng)} " if rng.random() < 0.35 else ""
    colour = f"{thing.colour} " if rng.random() < 0.92 else ""
    return article(f"{size}{colour}{_usual(SHAPES[thing.shape], rng)}")


def _usual(words: tuple[str, ...], rng: Random) -> str:
    return words[0] if len(words) == 1 or rng.random() < 0.75 else rng.choice(words[1:])
