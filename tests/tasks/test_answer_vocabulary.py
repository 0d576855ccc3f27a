"""The answers that a head chooses among, and what each scores."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence

import pytest

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, DamagedSample, Question, Sample
from tasks.metrics.vqa import score_answers
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa, answer_vocabulary, graded_question

TEN = ("2", "2", "two", "2", "Two!", "a dog", "dog", "the dog", "cat", "bird")


def sample(*answers: Sequence[str]) -> Sample:
    questions = tuple(Question(question_id=i, text=f"what {i}?", answers=tuple(ten)) for i, ten in enumerate(answers))
    return Sample(key="0", image_id=0, image=b"", questions=questions)


def test_the_most_frequent_answers_are_taken_as_the_official_evaluation_tells_them_apart() -> None:
    found = answer_vocabulary(Vqa(answers=3), [sample(TEN, ("cat",) * 2)])
    assert found.answers == ("2", "cat", "a dog")  # five of "2" in three spellings, three of "cat", and three of "dog", none of them spelled more often
    assert answer_vocabulary(Vqa(answers=100), [sample(TEN)]).answers == ("2", "a dog", "bird", "cat")


def test_an_answer_is_spelled_as_most_people_spell_it() -> None:
    assert answer_vocabulary(Vqa(answers=2), [sample(("t-shirt",) * 6 + ("t shirt",) * 4)]).answers == ("t-shirt",)


def test_scores_are_the_official_accuracy_and_answers_outside_are_no_target() -> None:
    found = answer_vocabulary(Vqa(answers=3), [sample(TEN, ("cat",) * 2)])
    (text,) = found.texts(sample(TEN), random.Random(0))
    assert (found.n_unlisted, found.n_questions) == (0, 2)
    assert [number for number, _ in text.scores or ()] == [0, 2, 1]  # the most common answer first
    fewer = answer_vocabulary(Vqa(answers=2), [sample(TEN, ("cat",) * 9, ("bird", "owl"), ())])
    assert (fewer.answers, fewer.n_unlisted, fewer.n_questions) == (("cat", "2"), 1, 3)
    assert dict(text.scores or ()) == pytest.approx({0: 1.0, 2: 0.9, 1: 0.3})  # five people, three, one; "bird" is outside
    ladder = {n: dict(found.scores(Question(question_id=0, text="", answers=("cat",) * n + ("?",) * (10 - n)))) for n in (1, 2, 3, 4, 10)}
    assert ladder == {n: pytest.approx({1: score}) for n, score in {1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 10: 1.0}.items()}
    (unknown,) = found.texts(sample(("bird",) * 10), random.Random(0))
    assert unknown.scores == ()  # still a question to learn from: no answer is right


def test_questions_with_one_answer_have_it_as_their_target() -> None:
    found = answer_vocabulary(Vqa(answers=9), [sample(("The cat",), ("2", "two"), ("dog", "cat"))])
    assert [dict(text.scores or ()) for text in found.texts(sample(("cat",), ("2", "two"), ("dog", "cat"), ("bird",)), random.Random(0))] == [
        {found.answers.index("The cat"): 1.0},
        {found.answers.index("2"): 1.0},
        {found.answers.index("dog"): 1.0, found.answers.index("The cat"): 1.0},
        {},
    ]


def test_what_is_learnt_is_what_the_scorer_gives_for_saying_it() -> None:
    scenes = Scenes(split="train", size=8)
    found = answer_vocabulary(Vqa(answers=1000), scenes)
    for i in range(len(scenes)):
        for question in scenes[i].questions:
            for number, score in found.scores(question):
                if len(set(question.answers)) > 1:  # the official scorer normalises
                    stated = {question.question_id: found.answers[number]}
                    assert score_answers(stated, [graded_question(question)]).overall == pytest.approx(100 * score)


def test_a_vocabulary_goes_to_worker_processes_and_takes_the_questions_that_the_task_takes() -> None:
    found = answer_vocabulary(Vqa(answers=5, questions_per_image=2), Scenes(split="train", size=5))
    again = pickle.loads(pickle.dumps(found))
    scene = Scenes(split="train", size=5)[1]
    assert again.texts(scene, random.Random(3)) == found.texts(scene, random.Random(3))
    assert len(found.texts(scene, random.Random(3))) == 2


def test_samples_that_cannot_be_read_are_left_for_the_training_to_count() -> None:
    class Source:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Sample:
            if index:
                raise DamagedSample(BadSample(key="1", reason="damaged", detail="cut"))
            return sample(TEN)

    assert len(answer_vocabulary(Vqa(answers=9), Source()).answers) == 4


def test_data_without_answers_is_refused() -> None:
    with pytest.raises(DataError, match=r"the 1 training images have no answers to choose among: give VQA data with annotations, or leave out vqa\.answers"):
        answer_vocabulary(Vqa(answers=3), [sample(())])


def test_settings_that_contradict_each_other_are_refused() -> None:
    for answers in (-1, 1):
        with pytest.raises(ConfigError, match=rf"vqa.answers is {answers}: give 0 \(the answer is written\), or 2 or more to choose among"):
            Vqa(answers=answers)
    with pytest.raises(ConfigError, match="learn is drawn, and a head of 9 answers learns the scores of all ten: leave one of learn and answers out"):
        Vqa(answers=9, learn="drawn")
