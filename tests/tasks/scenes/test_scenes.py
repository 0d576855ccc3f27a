"""The data set of scenes: the same from the same seed, true, varied, and hard to answer blind."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise

import pytest
from PIL import Image
from scenes_facts import caption_is_true, true_answer

from adalink.errors import ConfigError
from tasks.scenes import Scenes
from tasks.scenes.scene import SIDE, Scene
from tasks.scenes.texts import questions

N = 300


@pytest.fixture(scope="module")
def val() -> Scenes:
    return Scenes(split="val", size=N)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_split_or_index_gives_others(val: Scenes) -> None:
    assert val[3] == Scenes(split="val", size=4)[3] == pickle.loads(pickle.dumps(val))[3]
    others = [val[4], Scenes(split="train", size=N)[3], Scenes(split="val", size=N, seed=1)[3]]
    assert all(other.image != val[3].image and other.captions != val[3].captions for other in others)


def test_a_sample_stays_what_it_was_when_it_was_first_written_down() -> None:
    sample = Scenes(split="train", size=1)[0]
    assert (sample.key, sample.image_id) == ("train/000000", 0)
    assert sample.captions[0] == "a large purple cross is under a large red square on the sand."
    assert sample.questions[0].text == "is the cross below the square?"


def test_every_sample_has_a_picture_five_captions_and_five_questions_of_ten_answers(val: Scenes) -> None:
    for sample in (val[i] for i in range(50)):
        assert isinstance(sample.image, bytes)
        image = Image.open(io.BytesIO(sample.image))
        assert (image.size, image.mode, image.format) == ((SIDE, SIDE), "RGB", "PNG")
        assert len(set(sample.captions)) == 5
        assert len({q.text for q in sample.questions}) == 5
        assert all(len(q.answers) == 10 and q.text.startswith(q.question_type) for q in sample.questions)
        assert Counter(q.answer_type for q in sample.questions) == {"yes/no": 2, "number": 1, "other": 2}


def test_ids_are_of_one_sample_only() -> None:
    splits = [Scenes(split="train", size=N), Scenes(split="val", size=N)]
    samples = [split[i] for split in splits for i in range(60)]
    assert len({s.image_id for s in samples}) == len({s.key for s in samples}) == 120
    assert len({q.question_id for s in samples for q in s.questions}) == 600


def test_captions_are_true_of_their_scene_and_seldom_of_the_next(val: Scenes) -> None:
    scenes = [val.scene(i) for i in range(N)]
    note = [val[i].captions for i in range(N)]
    wrong = [text for scene, texts in zip(scenes, note, strict=True) for text in texts if not caption_is_true(text, scene)]
    assert wrong == []
    by_chance = [caption_is_true(text, scene) for scene, texts in zip(scenes[1:], note, strict=False) for text in texts]
    assert sum(by_chance) / len(by_chance) < 0.05


def test_most_people_give_the_true_answer_and_some_disagree(val: Scenes) -> None:
    agreed = []
    for i in range(N):
        for question in val[i].questions:
            answer, votes = Counter(question.answers).most_common(1)[0]
            assert answer == true_answer(question.text, val.scene(i)), question.text
            agreed.append(votes == 10)
    assert 0.5 < sum(agreed) / len(agreed) < 0.7


def test_captions_vary_in_words_and_order(val: Scenes) -> None:
    texts = [text for i in range(N) for text in val[i].captions]
    assert len({re.sub(r"[.,]", "", w) for text in texts for w in text.split()}) > 70
    assert len(set(texts)) > 0.85 * len(texts)
    starts = Counter(text.split()[0] for text in texts)
    assert len(starts) > 8
    assert starts.most_common(1)[0][1] < 0.6 * len(texts)


@cache
def _asked(split: str, n: int) -> list[tuple[str, str, str]]:
    """(answer type, question, most common answer), without the images."""
    scenes = Scenes(split=split, size=n)  # type: ignore[arg-type]
    asked = [q for i in range(n) for q in questions(scenes.scene(i), scenes._lot(i, "questions"), image_id=i)]
    return [(q.answer_type, q.text, Counter(q.answers).most_common(1)[0][0]) for q in asked]


def test_the_text_of_a_question_tells_little_of_its_answer() -> None:
    stated: dict[str, Counter[str]] = defaultdict(Counter)
    for _, text, answer in _asked("train", 6000):
        stated[text][answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for kind, text, answer in _asked("val", 2000):
        right[kind].append(bool(stated[text]) and stated[text].most_common(1)[0][0] == answer)
    accuracy = {kind: sum(r) / len(r) for kind, r in right.items()}
    assert accuracy["yes/no"] < 0.54
    assert accuracy["number"] < 0.40
    assert accuracy["other"] < 0.20


def test_yes_and_no_are_even_whatever_the_question_begins_with() -> None:
    stated: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, text, answer in _asked("train", 6000):
        if kind == "yes/no":
            stated[" ".join(text.split()[:2])][answer] += 1
            stated[re.sub(r"^is the (\w+) .*", r"\1", text)][answer] += 1
    shares = {start: answers["yes"] / answers.total() for start, answers in stated.items() if answers.total() > 300}
    assert len(shares) >= 4
    assert all(0.42 < share < 0.58 for share in shares.values()), shares


def test_objects_lie_within_the_picture_and_do_not_touch() -> None:
    for index in range(200):
        things = Scenes(split="train", size=200).scene(index).things
        assert all(t.radius < c < SIDE - t.radius for t in things for c in (t.x, t.y))
        for i, a in enumerate(things):
            assert all((a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2 for b in things[i + 1 :])


def test_numbers_of_objects_sizes_and_backgrounds_are_even() -> None:
    scenes: list[Scene] = [Scenes(split="train", size=4000).scene(i) for i in range(4000)]
    counts = [Counter(len(s.things) for s in scenes), Counter(s.background for s in scenes), Counter(t.size for s in scenes for t in s.things)]
    for count in counts:
        assert all(abs(n * len(count) / count.total() - 1) < 0.12 for n in count.values()), count


def test_a_wrong_split_or_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="no split 'test': the splits are 'train' and 'val'"):
        Scenes(split="test", size=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size of Scenes is 0: give a number of images from 1 to 1,000,000"):
        Scenes(split="val", size=0)


def test_an_index_outside_raises_as_sequences_do(val: Scenes) -> None:
    with pytest.raises(IndexError, match=f"index {N} is outside of these {N} scenes"):
        val[N]
    assert len(list(pairwise(iter(val)))) == N - 1  # iteration ends by it
