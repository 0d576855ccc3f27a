"""Runs of the task text from the command line: a head on an encoder-only model, label words and written labels, their files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import Done, adalink, refused
from readers import save_reader
from shared import fixtures, shared

from adalink.errors import ConfigError, DataError
from multimodal.model import VisionLanguageModel
from multimodal.sample import Question, Sample
from tasks.commands.train import results_table
from tasks.data.sources import DataConfig
from tasks.data.text import GLUE, open_glue
from tasks.runs.text_task import TextSettings, TextTask, written_score
from tasks.scenes.parts import language_folder
from tasks.task import BLIND_TEXTS, TRAINED, UNTRAINED

LORA = "{lora: {rank: 2}}"


def run(out: Path, language_model: object, train: str, val: str, *more: object, methods: str = LORA) -> Done:
    config = out.with_suffix(".yaml")
    config.write_text(
        f"task: text\nlanguage_model: {language_model}\ndata: {{train: {train}, val: {val}}}\nmethods: {methods}\ntrain: {{steps: 2, batch_size: 4}}\n"
    )
    return adalink("train", "--config", config, "--out", out, *more)


def glue(name: str) -> str:
    return f"{{glue: {fixtures('text_tasks') / 'glue' / name}}}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reader(tmp_path_factory.mktemp("bert"), "bert")


def test_a_head_is_trained_saved_and_evaluated(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(out, bert, glue("MRPC"), glue("MRPC"))
    assert done.code == 0, done
    assert "in the head: 130 (2 answers)" in done.out
    assert "loss: cross entropy in nats per question" in done.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["rows"]) == [UNTRAINED, TRAINED, BLIND_TEXTS, "always 'not_equivalent' (majority)"]
    assert list(metrics["rows"][TRAINED]) == ["f1", "accuracy", "mean"]
    assert metrics["headline"] == "f1"
    saved = json.loads((out / "adapter" / "adalink_config.json").read_text())["task"]
    assert (saved["labels"], saved["head_loss"], saved["prompt"], saved["max_tokens"]) == (["not_equivalent", "equivalent"], "softmax", "{text}{pair}", 128)
    answers = [row["answer"] for row in json.loads((out / "results.json").read_text())]
    source = open_glue(fixtures("text_tasks") / "glue" / "MRPC", "dev")
    model = VisionLanguageModel.from_pretrained(out / "adapter")
    assert model.generate(prompts=[(one.text, one.pair) for i in range(len(source)) for one in source[i].questions]) == answers
    assert "equivalent" in (out / "report.html").read_text()
    # The test split has no labels: a submission, and no score.
    again = adalink(
        "evaluate", "--adapter", out / "adapter", "--config", out / "config.yaml", "--data.val", glue("MRPC")[:-1] + ", split: test}", "--out", tmp_path / "t"
    )
    assert again.code == 0, again
    lines = (tmp_path / "t" / "MRPC.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


def test_scores_are_learned_by_squared_error_from_their_mean(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(out, bert, glue("STS-B"), glue("STS-B"), "--train.learning_rate", 1e-6)
    assert done.code == 0, done
    assert "loss: squared error in squares per question" in done.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["rows"]) == [UNTRAINED, TRAINED, BLIND_TEXTS]
    assert list(metrics["rows"][TRAINED]) == ["spearmanr", "pearson", "mean"]
    wanted = [float(row["label"]) for row in json.loads((fixtures("text_tasks") / "glue" / "expected.json").read_text())["expected"]["STS-B"]["train"]]
    model = VisionLanguageModel.from_pretrained(out / "adapter")
    assert model.head is not None
    assert model.head.linear.bias.item() == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    assert [float(row["answer"]) for row in json.loads((out / "results.json").read_text())]


@pytest.mark.parametrize("how", ["words", "write"])
def test_label_words_are_scored_or_written(how: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    table = tmp_path / "train.jsonl"
    table.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in (("a red ball", "red"), ("a blue cube", "blue")) * 3))
    done = run(out, "scenes:language", f"{{table: {table}}}", f"{{table: {table}}}", "--text.how", how, "--generation.max_new_tokens", 3)
    assert done.code == 0, done
    metrics = json.loads((out / "metrics.json").read_text())
    assert ("n_unlisted" in metrics["rows"][TRAINED]) == (how == "write")
    answers = {row["answer"] for row in json.loads((out / "results.json").read_text())}
    if how == "words":
        assert answers <= {"red", "blue"}
    else:
        assert f"{int(metrics['rows'][TRAINED]['n_unlisted'])} of 6 answers name no label (n_unlisted)" in metrics["note"]
    model = VisionLanguageModel.from_pretrained(out / "adapter", language_model=language_folder())
    assert set(model.generate(prompts=["a red ball", "a blue cube"])) == answers
    assert (model.label_words.get("default") is not None) == (how == "words")


def test_shots_and_what_comes_after_them_are_of_one_set(bert: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", bert, f"{{glue: {shared('data/sst2')}, shots: 8}}", "{after_shots: 6}", "--train.keep_best", "true", "--train.measure_every", 1)
    assert done.code == 0, done
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 6
    assert done.err.count("6,920 rows") == 2
    assert "these rows chose the weights (train.keep_best), so the metric is too good" in (tmp_path / "run" / "report.html").read_text()


def test_long_texts_are_cut_and_counted_once(bert: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", bert, glue("SST-2"), glue("SST-2"), "--text.max_tokens", 8)
    assert done.code == 0, done
    assert done.err.count("have more than 8 tokens and are cut (first: train.tsv, line 2)") == 1
    assert "of 10 have more" in done.err


# ---------------------------------------- UniPELT's published gates average over padding


def test_padded_rows_give_the_same_answer_in_every_batch_and_unpadded_ones_do_not(bert: Path, tmp_path: Path) -> None:
    def scores(pad_to: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = tmp_path / f"pad{pad_to}"
        more = ("--text.max_tokens", 24, "--text.pad_to", pad_to)
        done = run(out, bert, glue("SST-2"), glue("SST-2"), *more, methods="{unipelt: {variant: AP, mean: sequence}}")
        assert done.code == 0, done
        model = VisionLanguageModel.from_pretrained(out / "adapter")
        from multimodal.batches.collate import collate
        from multimodal.loss.answer_head import pooled_state

        rows = [model.row_encoder().prompt(text) for text in ("a red ball", "a red ball is on the blue cube and a dog is on it")]
        found = []
        with torch.no_grad():
            for part in (rows[:1], rows):
                batch = collate(part, [0] * len(part), torch.zeros(1, 0, 0), kind="patches", side="left", pad_id=0)
                found.append(pooled_state(model.adapted, model.language, batch, model.token_map(batch))[0])
        return found[0], found[1]

    alone, beside = scores(24)
    assert torch.allclose(alone, beside, atol=1e-6)
    alone, beside = scores(0)
    assert not torch.allclose(alone, beside, atol=1e-6)


# ---------------------------------------- the task without a model


def made(name: str, *answers: str | None) -> list[Sample]:
    return [
        Sample(key=str(i), image_id=i, media=None, questions=(Question(question_id=i, text=f"text {i}", answers=() if one is None else (one,)),))
        for i, one in enumerate(answers)
    ]  # fmt: skip


HANDMADE = {
    "CoLA": (["acceptable", "unacceptable"], "1\n1\t0"),
    "SST-2": (["negative", "positive"], "0\n1\t1"),
    "MRPC": (["equivalent", "not_equivalent"], "1\n1\t0"),
    "QQP": (["duplicate", "not_duplicate"], "1\n1\t0"),
    "STS-B": (["4.25", "0.1234"], "4.250\n1\t0.123"),
    "MNLI": (["neutral", "contradiction"], "neutral\n1\tcontradiction"),
    "QNLI": (["not_entailment", "entailment"], "not_entailment\n1\tentailment"),
    "RTE": (["entailment", "not_entailment"], "entailment\n1\tnot_entailment"),
    "WNLI": (["entailment", "not_entailment"], "1\n1\t0"),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_a_submission_has_the_bytes_that_the_server_takes(name: str, tmp_path: Path) -> None:
    glue_task = GLUE[name.replace("-", "").lower()]
    answers, wanted = HANDMADE[name]
    task = TextTask(labels=glue_task.labels, glue=glue_task, metrics=(glue_task.headline,))
    path = tmp_path / task.results_name("test_mismatched" if name == "MNLI" else "test", "adalink")
    assert path.name == ("MNLI-mm.tsv" if name == "MNLI" else f"{name}.tsv")
    task.write_results(path, {1: answers[1], 0: f" {answers[0]} "})
    assert path.read_bytes() == f"index\tprediction\n0\t{wanted}\n".encode()
    assert task.results_name("dev_matched", "a") == ("MNLI-m.tsv" if name == "MNLI" else path.name)


def test_an_answer_that_names_no_label_is_wrong_and_counted() -> None:
    source: Any = made("s", "yes", "no", "yes", "no")
    task = TextTask(settings=TextSettings(how="write"), labels=("no", "yes"), metrics=("f1", "accuracy"))
    score = task.score({0: "yes", 1: "maybe", 2: "", 3: " no "}, source)
    assert score.metrics == {"f1": 50.0, "accuracy": 50.0, "mean": 50.0, "n_unlisted": 2.0}
    assert score.items == {0: 100.0, 1: 0.0, 2: 0.0, 3: 100.0}
    assert score.note == "2 of 4 answers name no label (n_unlisted)"
    word, majority = task.majority(made("s", "yes", "no", "yes")) or ("", score)  # type: ignore[arg-type]
    assert (word, majority.metrics["accuracy"]) == ("yes", pytest.approx(200 / 3))
    assert majority.metrics["f1"] == pytest.approx(80.0)


def test_an_undefined_correlation_is_null_and_no_number() -> None:
    task = TextTask(metrics=("spearmanr", "pearson"))
    score = task.score({0: "2.5", 1: "2.5"}, made("s", "1", "2"))  # type: ignore[arg-type]
    assert score.metrics == {"spearmanr": None, "pearson": None, "mean": None}
    assert json.loads(json.dumps(dict(score.metrics)))["pearson"] is None
    assert results_table({"trained": score.metrics}).splitlines()[2].split() == ["trained"] + ["undefined"] * 3
    from tasks.task import Resampling

    assert score.intervals(Resampling(n_resamples=10)) == {}


def test_scores_are_written_rounded_to_a_fifth() -> None:
    assert [written_score(label) for label in ("2.57", "0", "4.9", "3.1")] == ["2.6", "0.0", "5.0" if round(24.5) == 25 else "4.8", "3.0" if round(15.5) == 15 else "3.2"]


@pytest.mark.parametrize(
    ("settings", "answers", "error", "sentence"),
    [
        ({"labels": ("yes", "no")}, ("yes", "maybe"), DataError, "has the label 'maybe', and text.labels has yes, no: mend the row"),
        ({"metrics": ("pearson",)}, ("1.5", "high"), DataError, "has the label 'high', and the metrics need numbers: write a score there"),
        ({}, ("yes", "yes"), DataError, r"has 1 different labels \(yes\): expected two or more, or give text.labels"),
        ({"metrics": ("pearson",), "how": "words"}, ("1", "2"), ConfigError, "text.how is words, and the metrics are of scores"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    settings: dict[str, Any], answers: tuple[str, ...], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    table = tmp_path / "a.jsonl"
    table.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in answers))
    with pytest.raises(error, match=sentence):
        TextTask(settings=TextSettings(**settings)).settled([DataConfig(table=table).open().source])


def test_two_sets_with_other_label_words_are_refused(tmp_path: Path) -> None:
    sources = []
    for name, labels in (("a", ("yes", "no")), ("b", ("true", "false"))):
        table = tmp_path / f"{name}.jsonl"
        table.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
        sources.append(DataConfig(table=table).open().source)
    with pytest.raises(DataError, match=r"b.jsonl, line 1 has the label 'true', and the data set before it has no, yes: mend the row, or list all words in"):
        TextTask().settled(sources)
    assert TextTask().settled(sources[:1]).labels == ("no", "yes")  # sorted
    with pytest.raises(DataError, match="the task text needs texts with labels, and the data set has images"):
        TextTask().settled([DataConfig(scenes="val/2").open().source])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"metrics": ("bleu",)}, "text.metrics has 'bleu': give some of accuracy, f1"),
        ({"metrics": ("f1", "pearson")}, "give metrics of classes .* or of scores"),
        ({"labels": ("a", "a")}, "text.labels is a, a: give two or more words, each once"),
        ({"pad_to": 64}, "text.pad_to is 64, how head and max_tokens 128: give max_tokens or more, with how: head"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TextSettings(**settings)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--encoder", "scenes:encoder"), "the task text reads no image, and encoder was given: leave it out, or give another task"),
        (("--train.features", "memory"), "the task text reads no image, and train.features was given"),
        (("--methods.bridge", "{kind: linear}"), "a bridge needs an encoder's features, and this model has none"),
        (("--methods.epalm", "{layers: [0, 1], connector: shared, n_taps: 1}"), "eP-ALM reads the input 'image_taps', and this model has none"),
        (("--text.how", "words"), "expected one that writes text; it can choose an answer: set task: vqa and vqa.answers, or text.how: head"),
    ],
)
def test_what_does_not_go_with_texts_alone_is_refused_with_one_sentence(bert: Path, options: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(run(tmp_path / "run", bert, glue("SST-2"), glue("SST-2"), *options))
    assert not (tmp_path / "run").exists()


def test_a_plan_of_texts_is_refused_with_one_sentence(bert: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", bert, glue("SST-2"), glue("SST-2"), "--dry-run")
    assert "a run of the task text has no encoder, and its memory is not planned" in refused(done)
