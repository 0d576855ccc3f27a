"""What a run leaves in its folder, and what evaluating its adapter again gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from cli_run import FEATURE_WIDTH, WIDTH, Done, Files, adalink, refused, train
from safetensors.torch import load_file

from multimodal.encoders.tower import load_tower
from tasks.scenes import encoder_folder, language_folder
from tasks.task import BLIND, TRAINED, UNTRAINED

ADALINK = 2 * 2 * WIDTH * 16  # 2 D R for each modality
BRIDGE = 2 * FEATURE_WIDTH + FEATURE_WIDTH * 128 + 128 + 128 * WIDTH + WIDTH  # a norm and two linears, 128 between them
OPTIONS = (
    "--data.train.scenes", "train/12", "--data.val.scenes", "val/4", "--train.steps", "6", "--train.batch_size", "4", "--train.log_every", "2",
    "--train.checkpoint_every", "4", "--generation.max_new_tokens", "4",
)  # fmt: skip


def test_a_run_folder_holds_what_was_promised(trained: tuple[Path, Done]) -> None:
    out, done = trained
    assert done.code == 0, done
    assert {path.name for path in out.iterdir()} == {"adapter", "checkpoints", "config.yaml", "metrics.json", "metrics.jsonl", "report.html", "results.json"}
    assert {path.name for path in (out / "adapter").iterdir()} == {"adalink_config.json", "adapter_model.safetensors", "README.md"}
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]


def test_the_screen_says_what_is_trained_how_it_goes_and_the_results(trained: tuple[Path, Done]) -> None:
    out, done = trained
    frozen = sum(value.numel() for value in load_file(language_folder() / "model.safetensors").values())
    frozen += sum(parameter.numel() for parameter in load_tower(encoder_folder()).parameters())
    trained, n = ADALINK + BRIDGE, ADALINK + BRIDGE + frozen
    share = f"trained: {trained:,} || all: {n:,} || trained share: {100 * trained / n:.4f} % (adalink {ADALINK:,}, bridge {BRIDGE:,})\n"
    assert done.out.startswith(share)
    assert all(row in done.out for row in (UNTRAINED, TRAINED, BLIND, "CIDEr"))
    assert done.out.endswith(f"report: {out / 'report.html'}\n")
    assert "Curve of loss in nats per token" in (out / "report.html").read_text()
    assert [line.split("  ")[0] for line in done.err.splitlines()] == ["step 1/6", "step 2/6", "step 4/6", "step 6/6"]


def test_metrics_hold_one_line_for_each_logged_step(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert all(set(line) == {"step", "loss", "rate"} for line in lines)
    assert lines[-1]["rate"] < lines[0]["rate"] == pytest.approx(0.002)


def test_metrics_hold_the_three_rows_and_the_results_are_official(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["rows"]) == [UNTRAINED, TRAINED, BLIND]
    assert (metrics["task"], metrics["headline"], metrics["items"], metrics["bad_samples"]) == ("captioning", "CIDEr", 4, [])
    assert metrics["trained_parameters"] == {"adalink": ADALINK, "bridge": BRIDGE}
    results = json.loads((run / "results.json").read_text())
    assert [row["image_id"] for row in results] == [1_000_000 + i for i in range(4)]
    assert all(set(row) == {"image_id", "caption"} for row in results)


def test_the_config_as_used_makes_the_same_run_again(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["steps"] == 6
    assert config["out"] == str(run)
    done = adalink("train", "--config", run / "config.yaml", "--out", tmp_path / "again")
    assert done.code == 0, done
    name = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()
    different = adalink("train", "--config", run / "config.yaml", "--out", tmp_path / "other", "--train.seed", "1")
    assert different.code == 0
    assert (tmp_path / "other" / name).read_bytes() != (run / name).read_bytes()


def test_evaluating_with_the_config_of_the_run_gives_its_results_beside_it(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    done = adalink("evaluate", "--config", run / "config.yaml", "--adapter", run / "adapter")
    assert done.code == 0, done
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    out = run / "evaluation"
    official = out / "captions_val_adalink_results.json"
    assert {path.name for path in out.iterdir()} == {"metrics.json", "results.json", "report.html", "config.yaml", official.name}
    assert f"official result file: {official}" in done.out
    assert json.loads(official.read_text()) == json.loads((out / "results.json").read_text()) == json.loads((run / "results.json").read_text())
    rows, again = (json.loads((folder / "metrics.json").read_text())["rows"] for folder in (run, out))
    assert again == {name: rows[name] for name in (TRAINED, BLIND)}
    shutil.rmtree(out)


def test_an_evaluation_takes_another_folder_and_other_data(run: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "out", "--data.val.scenes", "val/2", "--generation.num_beams", "2")
    assert adalink("evaluate", "--config", run / "config.yaml", "--adapter", run / "adapter", *options).code == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 2


def test_a_finished_run_resumed_is_only_evaluated_again(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    done = adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume")
    assert done.code == 0, done
    assert "step" not in done.err
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "results.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


CHANGED = [
    (("--train.seed", "1"), "train.seed was 0 and is 1"),
    (("--train.batch_size", "2"), "images in a step was 4 and is 2"),
    (("--data.train.scenes", "train/13"), "images in the data set was 12 and is 13"),
    (("--train.steps", "5"), "it was written after step 6, and this config ends at 5"),
    (("--methods.adalink.rank", "8"), f"is [16, {WIDTH}], this config makes it [8, {WIDTH}]"),
    (("--methods.prompt", "{length: 2, init_std: 0.1}"), "holds other weights than this config trains"),
]


@pytest.mark.parametrize(("options", "expected"), CHANGED, ids=[options[0] for options, _ in CHANGED])
def test_resuming_with_what_would_be_another_run_is_refused_and_harms_nothing(options: tuple[str, ...], expected: str, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    sentence = refused(adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume", *options))
    assert expected in sentence
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "metrics.json", "config.yaml", "results.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


def test_a_run_folder_that_is_taken_is_refused_and_left_alone(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "is there already: give another `out`, or --resume" in refused(train("captioning", run, small=OPTIONS))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_whose_training_images_are_all_bad_ends_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    files = Files(tmp_path / "data", n=3)
    for i in range(3):
        files.image(i).write_bytes(b"no image")
    done = train("captioning", tmp_path / "run", *files.as_data("train"), "--data.val.scenes", "val/2", "--train.steps", "3", "--train.batch_size", "2")
    assert "none of the 3 images can be used" in refused(done)
    assert "3 not an image (" in done.err
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_may_become_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train("vqa", tmp_path / "run", "--train.steps", "1", "--data.val.scenes", "val/1", small=OPTIONS).code == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_that_fails_after_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train("captioning", out, "--train.learning_rate", "1e30", "--train.clip", "0", "--train.checkpoint_every", "1", "--train.log_every", "1", small=OPTIONS)
    assert "the loss is not a number at step" in refused(done)
    assert list((out / "checkpoints").glob("step_*"))


def test_what_is_measured_is_printed_drawn_and_judged_and_the_card_names_the_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train("captioning", out, "--train.measure_every", "2", "--train.keep_best", "true", small=OPTIONS)
    assert done.code == 0, done
    measured = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "CIDEr" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert all(0 < line["val_loss"] < 20 for line in measured)
    for line in measured:
        assert f"step {line['step']}/6  validation: CIDEr {line['CIDEr']:.3f}  val_loss {line['val_loss']:.3f}" in done.err
    page = (out / "report.html").read_text()
    assert "Curve of validation loss in nats per token" in page
    assert "Curve of CIDEr" in page
    best = max(measured, key=lambda line: line["CIDEr"])  # the first of equal ones
    card = (out / "adapter" / "README.md").read_text()
    assert f"weights of step {best['step']}, the best of the run by CIDEr ({best['CIDEr']:.2f})" in card
    assert json.loads((out / "metrics.json").read_text())["rows"][TRAINED]["CIDEr"] == pytest.approx(best["CIDEr"])


def test_the_config_of_a_run_keeps_paths_that_work_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").symlink_to(language_folder())
    files.folder = Path("data")
    small = ("--train.steps", "1", "--train.batch_size", "2", "--generation.max_new_tokens", "2", "--language_model", "lm")
    assert train("captioning", Path("run"), *files.as_data("train"), *files.as_data("val"), small=small).code == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["out"] == str(tmp_path / "run")
    assert config["data"]["val"]["images"] == str(tmp_path / "data" / "pictures")
    assert (config["language_model"], config["encoder"]) == (str(tmp_path / "lm"), "scenes:encoder")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert adalink("evaluate", "--config", "../run/config.yaml", "--adapter", "../run/adapter", "--out", "again").code == 0


def test_a_resume_says_what_differs_outside_of_the_training(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    done = adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume", "--generation.num_beams", "2", "--train.learning_rate", "0.5")
    assert done.code == 0, done
    assert f"settings that are not those of {copy / 'config.yaml'}: generation.num_beams 1 -> 2\n" in done.err
    assert "settings that are not those of the checkpoint: train.learning_rate 0.002 -> 0.5\n" in done.out
    assert f"resumed after step 6 of 6, from {copy / 'checkpoints' / 'step_00000006'}\n" in done.out


def test_what_needs_no_image_is_refused_before_one_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("multimodal.feature_cache.encoding.read_pixels", read)
    for option, expected in (
        (("--train.learning_rates", "{lora: 0.1}"), "train.learning_rates names lora"), (("--train.states_gib", "1"), "train.states_gib caches the output of the layers below"),
        (("--train.patience", "2"), "train.patience judges measurements"),
        (("--train.stages", "[{trains: [prefx]}]"), "train.stages names prefx, and this adapter's methods are adalink, bridge"),
        (("--train.stages", "[{methods: [prefx]}]"), "methods is no setting of an item of train.stages: an item has trains, steps, share, learning_rate, optimizer"),
        (("--train.stages", "[{trains: [adalink], steps: 1}, {trains: [bridge], steps: 1}]", "--train.steps", "3"), "train.stages add up to 2 steps, and the run has 3"),
    ):  # fmt: skip
        assert expected in refused(train("captioning", tmp_path / "run", *option, small=OPTIONS))
    assert not (tmp_path / "run").exists()
