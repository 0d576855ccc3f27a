"""`adalink selftrain`: weights of texts against the authors' own, sessions on the scenes, what is left out, and how a run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_run import FIXED, RECIPES, adalink, refused
from safetensors.torch import load_file
from shared import fixtures_root
from torch import Tensor

from tasks.runs.selftrain import Guess, confident_at, meta_weights

FILES = sorted((fixtures_root() / "list").glob("*.json"))
STEPS = ("meta.steps1", "meta.steps2")


def divergence(given: dict[str, Tensor], down: Tensor, up: Tensor) -> Tensor:
    """float [n]: KL(teacher || student) of each unlabelled row."""
    x = given["un.x"]
    words = torch.log_softmax((x + x @ down.T @ up.T) @ given["head"].T, -1)
    return (given["un.soft"] * (given["un.soft"].log() - words)).sum(-1)


def labelled(given: dict[str, Tensor], rows: slice, down: Tensor, up: Tensor) -> Tensor:
    x = given["val.x"][rows]
    return torch.nn.functional.cross_entropy((x + x @ down.T @ up.T) @ given["head"].T, given["val.labels"][rows])


def dots(given: dict[str, Tensor], soft: Tensor | None = None) -> Tensor:
    """float [2, n]: for both look-aheads the gradient of each row's divergence times that of the labelled loss."""
    given = given if soft is None else {**given, "un.soft": soft}
    weights = [given[f"adapter.{name}"].clone().requires_grad_() for name in ("down", "up")]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights, retain_graph=True)])

    each = torch.stack([gradient(loss) for loss in divergence(given, *weights)])
    return torch.stack([each @ gradient(labelled(given, slice(start, None, 2), *weights)) for start in (0, 1)])


@pytest.mark.skipif(not FILES, reason="development data does not travel with the repository")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_weights_are_the_authors_and_those_of_a_real_look_ahead_and_turned_labels_weigh_less(path: Path) -> None:
    described, given = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    rate, n_bad, found = described["lr_of_the_look_ahead"], described["n_bad"], dots(given)
    for name, steps in zip(STEPS, (1, 2), strict=True):
        wanted = given[f"{name}.weights"]
        assert float((meta_weights(found[:steps], rate=rate, damping=1e-6) - wanted).abs().max()) < 1e-10
        ours = meta_weights(found[:steps])
        assert float(ours.sum()) == pytest.approx(1, abs=1e-12)
        assert float((ours - wanted).abs().max()) < 1e-5  # without damping: the same but for the authors' small term
        assert ours[:n_bad].mean() < ours[n_bad:].mean()
    # A step of gradient descent on one row's divergence, as far as finite differences know it.
    down, up = given["adapter.down"], given["adapter.up"]
    for row in (0, n_bad, len(found[0]) - 1):
        weights = [down.clone().requires_grad_(), up.clone().requires_grad_()]
        moves = torch.autograd.grad(divergence(given, *weights)[row], weights)
        ahead = [labelled(given, slice(0, None, 2), down - sign * 1e-5 * moves[0], up - sign * 1e-5 * moves[1]) for sign in (1, -1)]
        assert float((ahead[1] - ahead[0]) / 2e-5 - found[0][row]) == pytest.approx(0, abs=1e-5)
    torch.manual_seed(0)
    shuffled = [meta_weights(dots(given, given["un.soft"][torch.randperm(len(given["un.soft"]))])[:1]) for _ in range(20)]
    gaps = torch.stack([one[n_bad:].mean() - one[:n_bad].mean() for one in shuffled])
    assert abs(float(gaps.mean())) < float(meta_weights(found[:1])[n_bad:].mean() - meta_weights(found[:1])[:n_bad].mean())  # control: the gap is of the labels


def test_texts_that_help_nothing_weigh_nothing_and_the_others_sum_to_one() -> None:
    assert meta_weights(torch.tensor([[-1.0, -2.0]])).tolist() == [0, 0]
    assert meta_weights(torch.tensor([[-1.0, 3.0, 1.0]])).tolist() == [0, 0.75, 0.25]
    assert meta_weights(torch.tensor([[-2.0, 3.0, 2.0], [1.0, 1.0, 2.0]])).tolist() == [0, 0.5, 0.5]  # summed, then cut off at 0


def test_answers_are_learned_from_where_enough_of_the_held_out_ones_are_right() -> None:
    sure, right = [0.9, 0.8, 0.7, 0.6], [True, True, False, True]
    assert [confident_at(sure, right, share) for share in (1.0, 0.75, 0.9)] == [0.8, 0.6, 0.8]
    assert confident_at([0.9, 0.8], [False, False], 0.5) == float("inf")
    one = Guess(index=0, item=0, question="", text="a b", loss=2.0, n_tokens=4)
    assert (one.confidence("captioning"), one.confidence("vqa")) == (-0.5, pytest.approx(0.1353, abs=1e-4))


SMALL = (
    "--data.train.scenes", "train/10", "--data.val.scenes", "val/2", "--train.steps", "2", "--train.batch_size", "4", "--train.log_every", "1",
    "--generation.max_new_tokens", "3", "--unlabelled.scenes", "train/16", "--selftrain.sessions", "2",
)  # fmt: skip


def selftrained(out: Path, *more: object, task: str = "vqa") -> Any:
    return adalink("selftrain", "--config", RECIPES[task], *FIXED, *SMALL, "--out", out, *more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sessions of answers; nothing is sure after two steps, so every text is taken that is worth something."""
    out = tmp_path_factory.mktemp("self") / "run"
    done = selftrained(out, "--selftrain.precision", "0.01", "--selftrain.keep", "1", "--selftrain.weights", "meta")
    assert done.code == 0, done
    assert "best on the held-out labels: session" in done.out
    return out


def test_sessions_are_runs_and_their_labels_are_a_file_to_look_at(whole: Path) -> None:
    reached = json.loads((whole / "sessions.json").read_text())
    assert [one["session"] for one in reached] == [0, 1, 2]
    assert len({row["image"] for row in lines(whole / "held_out.jsonl")}) == 2
    assert not {row["image"] for row in lines(whole / "held_out.jsonl")} & {row["image"] for row in lines(whole / "shots.jsonl")}
    for session in (1, 2):
        learned = lines(whole / f"labels_{session}.jsonl")
        out = lines(whole / f"left_out_{session}.jsonl")
        assert len(learned) + len(out) <= 6 * 5  # of 16 images ten have labels
        assert learned
        assert {row["session"] for row in learned} == {session}
        teacher = json.loads((whole / str(session - 1) / "adapter" / "adalink_config.json").read_text())["weights"]
        assert {row["teacher"] for row in learned} == {teacher}
        assert sum(row["weight"] for row in learned) == pytest.approx(len(learned))
        assert min(row["weight"] for row in learned) > 0
        assert (whole / str(session) / "report.html").exists()
        assert set(yaml.safe_load((whole / str(session) / "config.yaml").read_text())["data"]["train"]["mix"].values()) == {50}


@pytest.mark.slow
def test_a_run_that_ended_in_a_session_goes_on_with_the_same_labels_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "2")
    labels = (again / "labels_2.jsonl").read_text()
    (again / "labels_2.jsonl").unlink()
    done = selftrained(again, "--selftrain.precision", "0.01", "--selftrain.keep", "1", "--selftrain.weights", "meta")
    assert done.code == 0, done
    assert (again / "labels_2.jsonl").read_text() == labels
    assert all(torch.equal(value, weights(whole / "2")[name]) for name, value in weights(again / "2").items())


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--selftrain.share", "0"), ("--selftrain.keep", "0")])
def test_without_texts_of_the_teacher_a_session_is_the_supervised_training(whole: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = selftrained(tmp_path / "run", *more, "--selftrain.sessions", "1")
    assert done.code == 0, done
    for session in (0, 1):
        assert all(torch.equal(value, weights(whole / "0")[name]) for name, value in weights(tmp_path / "run" / str(session)).items())
    assert not all(torch.equal(value, weights(whole / "0")[name]) for name, value in weights(whole / "1").items())  # control


@pytest.mark.slow
def test_captions_are_labelled_too(tmp_path: Path) -> None:
    done = selftrained(tmp_path / "run", "--selftrain.sessions", "1", "--selftrain.weights", "none", task="captioning")
    assert done.code == 0, done
    learned = lines(tmp_path / "run" / "labels_1.jsonl")
    assert all(row["caption"] and row["weight"] == 1 and row["confidence"] < 0 for row in learned)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--data.train.scenes", "train/7"), "self-training needs 8 labelled images or more, and data.train has 7"),
        (("--unlabelled.scenes", "val/3"), "2 of the unlabelled images are in data.val too (first: val/000000)"),
        (("--unlabelled.scenes", "train/9"), "every unlabelled image is in data.train too, so there is nothing to label"),
        (("--vqa.answers", "4"), "vqa.answers is given, and self-training learns texts that a teacher writes"),
        (("--selftrain.held_out", "1"), "leave some labelled images to learn from"),
        (("--selftrain.sessions", "0"), "selftrain.sessions is 0"),
    ],
)
def test_what_cannot_teach_itself_is_one_sentence_and_writes_nothing(more: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(selftrained(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert f"the run folder {tmp_path} is there already" in refused(selftrained(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
