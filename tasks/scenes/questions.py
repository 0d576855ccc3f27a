"""Questions about a scene, of the three VQAv2 answer types, asked so that the text of a question says little about its answer.

Yes/no: the answer is drawn first, and both sides name things by the same lot, so each text is answered "yes" half of the time.
Other: shapes, colours, backgrounds and places are drawn independently of one another.
Number: counts of a kind prefer the rarer count that the scene offers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from multimodal.sample import Question
from tasks.scenes.answers import ten_answers
from tasks.scenes.scene import Scene, Thing, place, relation
from tasks.scenes.words import BACKGROUNDS, COLOURS, NUMBERS, OPPOSITE, RELATIONS, SHAPES, article, plural

__all__ = ["questions"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, its type as VQAv2 names it (the words it begins with), and the truth."""

    text: str
    type: str
    truth: str


Asker = Callable[[Scene, Random], Asked | None]  # None where the scene does not lend itself to the question
PER_SCENE = (("yes/no", 2), ("number", 1), ("other", 2))


def questions(scene: Scene, rng: Random, *, image_id: int) -> tuple[Question, ...]:
    """Five questions, no two alike: two yes/no, one number, two others. Ids are ten times the picture's id and upwards."""
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
    said = n if truth else rng.choice([m for m in (1, 2, 3, 4) if m != n])
    verb, noun = ("is", "shape") if said == 1 else ("are", "shapes")
    return _yes_no(f"{verb} there {NUMBERS[said]} {noun}?", f"{verb} there", truth)


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
    thing, said = _lone(scene, rng), rng.choice(("small", "large"))
    return None if thing is None else _yes_no(f"is the {thing.shape} {said}?", "is the", thing.size == said)


def _is_it_beside(scene: Scene, rng: Random) -> Asked | None:
    """Is the star left of the circle?"""
    pair = _lone_pair(scene, rng)
    if pair is None:
        return None
    a, b, way = pair
    truth = rng.random() < 0.5
    said = RELATIONS[way if truth else OPPOSITE[way]][0]
    return _yes_no(f"is the {a.shape} {said} the {b.shape}?", "is the", truth)


def _is_the_background(scene: Scene, rng: Random) -> Asked:
    """Is the background grass?"""
    truth = rng.random() < 0.5
    said = scene.background if truth else rng.choice([b for b in BACKGROUNDS if b != scene.background])
    return _yes_no(f"is the background {said}?", "is the", truth)


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
