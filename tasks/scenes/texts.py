"""Five captions of a scene, each true, from a grammar: what is mentioned, in which order and in which words is drawn by lot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from multimodal.sample import Question
from tasks.scenes.scene import (
    ALIKE,
    BACKGROUNDS,
    COLOURS,
    IN_PLACE,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    WHERE,
    Scene,
    Thing,
    article,
    place,
    plural,
    relation,
)

__all__ = ["captions", "questions", "ten_answers"]


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
    """A red star in the top left of the image."""
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


# ----------------------------------------
# Ten answers to a question, as ten people give them: mostly one answer, at times a synonym, a near count or a slip.


N_PEOPLE = 10
ALL_AGREE = 0.6  # share of the questions that ten people answer alike
DISSENT = (1, 1, 1, 2, 2, 3)  # how many of the ten say otherwise, where they do not agree


def ten_answers(truth: str, rng: Random) -> tuple[str, ...]:
    """Ten answers, at least seven of them the true one."""
    n = 0 if rng.random() < ALL_AGREE else rng.choice(DISSENT)
    answers = [_otherwise(truth, rng) for _ in range(n)] + [truth] * (N_PEOPLE - n)
    rng.shuffle(answers)
    return tuple(answers)


def _otherwise(truth: str, rng: Random) -> str:
    """What a person says who does not give the usual answer."""
    if truth.isdigit():
        count = int(truth)
        return rng.choice((str(count + 1), str(max(count - 1, 0)), NUMBERS[count]))
    if truth in ("yes", "no") and rng.random() < 0.6:
        return "no" if truth == "yes" else "yes"
    return rng.choice(ALIKE[truth])


# ----------------------------------------
# Questions about a scene, of the three VQAv2 answer types, asked so that the text of a question says little about its answer.
#
# Yes/no: the answer is drawn first, and both sides name things by the same lot, so each text is answered "yes" half of the time.
# Other: shapes, colours, backgrounds and places are drawn independently of one another.
# Number: counts of a kind prefer the rarer count that the scene offers.


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, its type as VQAv2 names it (the words it begins with), and the truth."""

    text: str
    type: str
    truth: str


Asker = Callable[[Scene, Random], Asked | None]  # None where the scene does not lend itself to the question
PER_SCENE = (("yes/no", 2), ("number", 1), ("other", 2))


def questions(scene: Scene, rng: Random, *, image_id: int) -> tuple[Question, ...]:
    """Five questions, no two alike: two yes/no, one number, two others. Ids are ten times the image's id and upwards."""
    made: dict[str, Question] = {}
    for answer_type, wanted in PER_SCENE:
        target = len(made) + wanted
        while len(made) < target:
            asked = rng.choice(_ASKERS[answer_type])(scene, rng)
            if asked is None or asked.text in made:
                continue
            made[asked.text] = Question(
                question_id=10 * image_id + len(made),
                text=asked.text,
                answers=ten_answers(asked.truth, rng),
                question_type=asked.type,
                answer_type=answer_type,
            )
    return tuple(made.values())


def _yes_no(text: str, kind: str, truth: bool) -> Asked:
    return Asked(text=text, type=kind, truth="yes" if truth else "no")


def _is_there(scene: Scene, rng: Random) -> Asked:
    """Is there a red star?"""
    has = {(t.colour, t.shape) for t in scene.things}
    truth = rng.random() < 0.5
    lacks = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in has]
    near = [(c, s) for c, s in lacks if scene.alike(colour=c) or scene.alike(shape=s)]  # hard: half of the pair is there
    colour, shape = rng.choice(sorted(has) if truth else near if rng.random() < 0.5 else lacks)
    return _yes_no(f"is there {article(f'{colour} {shape}')}?", "is there a", truth)


def _are_there_any(scene: Scene, rng: Random) -> Asked:
    """Are there any stars?"""
    truth = rng.random() < 0.5
    shape = rng.choice([s for s in SHAPES if bool(scene.alike(shape=s)) == truth])
    return _yes_no(f"are there any {plural(shape)}?", "are there any", truth)


def _are_there_so_many(scene: Scene, rng: Random) -> Asked:
    """Are there three shapes?"""
    n, truth = len(scene.things), rng.random() < 0.5
    stated = n if truth else rng.choice([m for m in (1, 2, 3, 4) if m != n])
    verb, noun = ("is", "shape") if stated == 1 else ("are", "shapes")
    return _yes_no(f"{verb} there {NUMBERS[stated]} {noun}?", f"{verb} there", truth)


def _is_it_coloured(scene: Scene, rng: Random) -> Asked | None:
    """Is the star red?"""
    thing = _lone(scene, rng)
    if thing is None:
        return None
    truth = rng.random() < 0.5
    colour = thing.colour if truth else rng.choice([c for c in COLOURS if c != thing.colour])
    return _yes_no(f"is the {thing.shape} {colour}?", "is the", truth)


def _is_it_sized(scene: Scene, rng: Random) -> Asked | None:
    """Is the star small?"""
    thing, stated = _lone(scene, rng), rng.choice(("small", "large"))
    return None if thing is None else _yes_no(f"is the {thing.shape} {stated}?", "is the", thing.size == stated)


def _is_it_beside(scene: Scene, rng: Random) -> Asked | None:
    """Is the star left of the circle?"""
    pair = _lone_pair(scene, rng)
    if pair is None:
        return None
    a, b, way = pair
    truth = rng.random() < 0.5
    stated = RELATIONS[way if truth else OPPOSITE[way]][0]
    return _yes_no(f"is the {a.shape} {stated} the {b.shape}?", "is the", truth)


def _is_the_background(scene: Scene, rng: Random) -> Asked:
    """Is the background grass?"""
    truth = rng.random() < 0.5
    stated = scene.background if truth else rng.choice([b for b in BACKGROUNDS if b != scene.background])
    return _yes_no(f"is the background {stated}?", "is the", truth)


def _how_many(scene: Scene, rng: Random) -> Asked:
    """How many shapes are there?"""
    text = rng.choice(("how many shapes are there?", "how many shapes are in the picture?", "how many things can you see?"))
    return Asked(text=text, type="how many", truth=str(len(scene.things)))


def _how_many_of(scene: Scene, rng: Random) -> Asked:
    """How many stars are there?"""
    return _count(rng, {plural(s): len(scene.alike(shape=s)) for s in SHAPES})


def _how_many_coloured(scene: Scene, rng: Random) -> Asked:
    """How many red shapes are there?"""
    return _count(rng, {f"{c} shapes": len(scene.alike(colour=c)) for c in COLOURS})


def _count(rng: Random, counts: dict[str, int]) -> Asked:
    weights = (1, 2, 4, 8, 12)
    offered = sorted(set(counts.values()))
    n = rng.choices(offered, [weights[c] for c in offered])[0]
    kind = rng.choice([k for k, c in counts.items() if c == n])
    return Asked(text=f"how many {kind} {rng.choice(('are there', 'can you see'))}?", type="how many", truth=str(n))


def _what_colour(scene: Scene, rng: Random) -> Asked | None:
    """What color is the star?"""
    thing = _lone(scene, rng)
    return None if thing is None else Asked(text=f"what color is the {thing.shape}?", type="what color is the", truth=thing.colour)


def _what_shape(scene: Scene, rng: Random) -> Asked | None:
    """What is the red shape?"""
    found = [t for t in scene.things if len(scene.alike(colour=t.colour)) == 1]
    if not found:
        return None
    thing = rng.choice(found)
    return Asked(text=f"what is the {thing.colour} shape?", type="what is the", truth=thing.shape)


def _what_is_beside(scene: Scene, rng: Random) -> Asked | None:
    """What is left of the star?"""
    pair = _lone_pair(scene, rng)
    if pair is None:
        return None
    a, b, way = pair
    if sum(relation(t, b) == way for t in scene.things if t != b) != 1:
        return None
    return Asked(text=f"what is {rng.choice(RELATIONS[way])} the {b.shape}?", type="what is", truth=a.shape)


def _what_background(scene: Scene, rng: Random) -> Asked:
    """What is in the background?"""
    text, kind = rng.choice((("what is in the background?", "what is in the"), ("what is the background?", "what is the")))
    return Asked(text=text, type=kind, truth=scene.background)


def _where_is(scene: Scene, rng: Random) -> Asked | None:
    """Where is the star?"""
    thing = _lone(scene, rng)
    return None if thing is None else Asked(text=f"where is the {thing.shape}?", type="where is the", truth=place(thing))


_ASKERS: dict[str, tuple[Asker, ...]] = {
    "yes/no": (_is_there, _are_there_any, _are_there_so_many, _is_it_coloured, _is_it_sized, _is_it_beside, _is_the_background),
    "number": (_how_many, _how_many_of, _how_many_coloured),
    "other": (_what_colour, _what_colour, _what_shape, _what_is_beside, _what_background, _where_is),
}


def _lone(scene: Scene, rng: Random) -> Thing | None:
    """An object that its shape alone names."""
    found = [t for t in scene.things if len(scene.alike(shape=t.shape)) == 1]
    return rng.choice(found) if found else None


def _lone_pair(scene: Scene, rng: Random) -> tuple[Thing, Thing, str] | None:
    """Two objects that their shapes name, and where the first lies seen from the second."""
    found = [t for t in scene.things if len(scene.alike(shape=t.shape)) == 1]
    if len(found) < 2:
        return None
    a, b = rng.sample(found, 2)
    way = relation(a, b)
    return (a, b, way) if way else None
