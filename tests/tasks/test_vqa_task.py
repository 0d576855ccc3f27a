from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from adalink.errors import ConfigError, DataError
from multimodal.sample import Question, Sample
from multimodal.template import Text
from tasks.data.reader import Official
from tasks.data.sources import DataConfig
from tasks.metrics.bootstrap import Resampling
from tasks.runs.results import write_metrics
from tasks.task import TRAINED, Asked
from tasks.vqa import Vqa, most_common

RED = Question(question_id=1, text="is it red?", answers=("yes",) * 7 + ("no",) * 3, question_type="is it", answer_type="yes/no")
MANY = Question(question_id=2, text="how many?", answers=("2",) * 5 + ("3",) * 5, question_type="how many", answer_type="number")
BARE = Question(question_id=3, text="why?")
SCENE = Sample(key="a", image_id=5, image=b"", questions=(RED, MANY, BARE))


def test_the_most_common_answer_is_learnt_and_the_first_of_them_on_a_tie() -> None:
    assert Vqa().texts(SCENE, random.Random(0)) == [Text("is it red?", "yes", task="is it"), Text("how many?", "2", task="how many")]
    assert most_common(MANY) == "2"
    assert most_common(Question(question_id=4, text="", answers=("b", "a", "b", "a"))) == "b"


def test_drawn_answers_come_as_often_as_people_gave_them() -> None:
    task = Vqa(learn="drawn")
    answers = [task.texts(SCENE, random.Random(seed))[0].target for seed in range(500)]
    assert set(answers) == {"yes", "no"}
    assert 0.6 < answers.count("yes") / 500 < 0.8
    assert task.texts(SCENE, random.Random(3)) == task.texts(SCENE, random.Random(3))


def test_a_few_questions_are_drawn_and_unanswered_ones_never() -> None:
    drawn = [Vqa(questions_per_image=1).texts(SCENE, random.Random(seed)) for seed in range(20)]
    assert {texts[0].question for texts in drawn} == {"is it red?", "how many?"}
    assert all(len(texts) == 1 for texts in drawn)


def test_every_question_is_asked_with_its_id() -> None:
    assert Vqa().asked(SCENE) == [Asked(1, "is it red?"), Asked(2, "how many?"), Asked(3, "why?")]


def test_accuracy_is_the_official_one_overall_and_per_type() -> None:
    score = Vqa().score({1: "no", 2: "3"}, [SCENE])
    # 3 of 10 said no: each of the ten subsets of nine holds 2 or 3 of them: 3 x 2/3 + 7 x 1 of ten. 5 of 10 said 3.
    assert score.items == {1: pytest.approx(90.0), 2: pytest.approx(100.0)}
    assert score.metrics == {"accuracy": pytest.approx(95.0), "accuracy (yes/no)": pytest.approx(90.0), "accuracy (number)": pytest.approx(100.0)}
    assert Vqa().score({1: "green", 2: "3"}, [SCENE]).metrics["accuracy"] == pytest.approx(50.0)
    assert Vqa().score({1: "yes"}, [SCENE]).metrics["accuracy"] == pytest.approx(100.0)
    assert score.scorer != Vqa(scorer="normalized").score({1: "no"}, [SCENE]).scorer


ONE = Sample(
    key="b",
    image_id=6,
    image=b"",
    questions=(
        Question(question_id=7, text="which organ?", answers=("liver",), answer_type="other"),
        Question(question_id=8, text="is it?", answers=("yes",), answer_type="yes/no"),
    ),
)


def test_data_with_one_answer_each_is_judged_by_the_exact_match_and_says_so(tmp_path: Path) -> None:
    score = Vqa().score({7: "The liver.", 8: "no"}, [ONE])
    exact = {"exact match": 50.0, "exact match (other)": 100.0, "exact match (yes/no)": 0.0}
    assert score.metrics == {**exact, "accuracy": 0.0, "accuracy (other)": 0.0, "accuracy (yes/no)": 0.0}
    assert (score.headline, score.items) == ("exact match", {7: 100.0, 8: 0.0})
    assert list(score.intervals(Resampling(n_resamples=5))) == list(exact)
    assert "2 of 2 questions (first: question 7, with 1)" in score.note
    write_metrics(tmp_path / "metrics.json", Vqa(), {TRAINED: score}, items=2, trained={}, seconds=1, bad=())
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["headline"], written["note"]) == ("exact match", score.note)
    assert written["scorers"]["exact match"].startswith("exact match with one of the answers")
    assert written["scorers"]["accuracy"].startswith("VQA accuracy, official")


def test_the_exact_match_can_be_asked_for() -> None:
    score = Vqa(scorer="exact").score({1: "Yes!", 2: "4"}, [SCENE])
    assert score.metrics == {"exact match": 50.0, "exact match (yes/no)": 100.0, "exact match (number)": 0.0}
    assert score.note == Vqa().score({1: "yes", 2: "2"}, [SCENE]).note == ""


def test_what_cannot_be_scored_is_one_sentence() -> None:
    for predictions in ({}, {99: "yes"}, {3: "because"}):
        with pytest.raises(DataError, match="these questions cannot be scored: none was predicted, or the data set has no answers"):
            Vqa().score(predictions, [SCENE])
    with pytest.raises(DataError, match="the data set has no question, and the task vqa needs them"):
        Vqa().score({}, [Sample(key="a", image_id=0, image=SCENE.image, captions=("a cat",))])


def test_the_official_result_file(tmp_path: Path) -> None:
    Vqa().write_results(tmp_path / "results.json", {1: "yes", 2: "3"})
    assert json.loads((tmp_path / "results.json").read_text()) == [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "3"}]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"questions_per_image is -1: give 0 \(all\) or more"):
        Vqa(questions_per_image=-1)
    with pytest.raises(ConfigError, match="of ten answers, 'all' cannot be trained on: give common or drawn"):
        Vqa(learn="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no scorer 'mine': give one of official, normalized, exact, anls, relaxed, choice"):
        Vqa(scorer="mine")  # type: ignore[arg-type]


def test_the_benchmark_names_the_scorer_and_its_own_ids_where_the_config_names_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    rows = [{"question": "date?", "file_path": "1.png", "answers": ["1/8/93"], "question_id": f"x{k}"} for k in range(2)]
    (tmp_path / "train_task_3.json").write_text(json.dumps({"data": rows}))
    opened = DataConfig(path=tmp_path / "train_task_3.json", limit=1).open()
    score = Vqa().score({0: "1/8/1993", 1: "1/8/93"}, opened.source)
    assert (score.headline, score.metrics["ANLS"], score.note) == ("ANLS", 87.5, "")
    assert score.resampled is not None
    assert Vqa(scorer="exact").score({0: "1/8/93"}, opened.source).metrics["exact match"] == 100
    Vqa().write_results(tmp_path / "out.json", {0: "a", 1: "b"}, opened.official)
    assert json.loads((tmp_path / "out.json").read_text()) == [{"question_id": "x0", "answer": "a"}, {"question_id": "x1", "answer": "b"}]
    aokvqa = Official(id_name="question_id", text_name="direct_answer", ids={0: "22M"})
    Vqa().write_results(tmp_path / "out.json", {0: "cab"}, aokvqa)
    assert json.loads((tmp_path / "out.json").read_text()) == {"22M": {"direct_answer": "cab"}}
