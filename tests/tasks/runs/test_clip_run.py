"""Video from the command line: trained on folders of frames with another number of frames, evaluated, with cached features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_run import RECIPES, Done, adalink, refused, train
from made_clips import frame_folder
from saved_clips import save_clips

from multimodal.model import VisionLanguageModel

EPALM = json.dumps({"layers": [1, 3], "n_taps": 2, "connector": "per_tap"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and four clips with captions in COCO's layout."""
    folder, draw = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    save_clips("timesformer", folder / "encoder")
    rows = []
    for i in range(4):
        frame_folder(folder / "media" / f"clip{i}", [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(9)])
        rows.append({"id": i, "video": f"clip{i}"})
    captions = [{"id": i, "image_id": i, "caption": f"a red cube {i}"} for i in range(4)]
    (folder / "captions.json").write_text(json.dumps({"images": rows, "annotations": captions}))
    (folder / "images.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": captions[1:2]}))
    (folder / "media" / "a.png").write_bytes(next((folder / "media" / "clip0").iterdir()).read_bytes())
    return folder


def clips(root: Path, *more: object, file: str = "captions.json") -> list[object]:
    given: list[object] = ["--encoder", root / "encoder", "--train.bad_samples", "0"]
    for split in ("train", "val"):
        given += [f"--data.{split}.scenes", "null", f"--data.{split}.path", root / file, f"--data.{split}.media", root / "media"]
    return [*given, "--train.steps", "2", "--train.batch_size", "2", "--generation.max_new_tokens", "3", *more]


def run(root: Path, out: Path, *more: object, file: str = "captions.json") -> Done:
    return train("captioning", out, *clips(root, *more, file=file), small=())


def test_a_run_on_clips_is_saved_with_its_frames_and_evaluated(root: Path, tmp_path: Path) -> None:
    epalm = ("--methods.bridge", "null", "--methods.adalink", "null", "--methods.epalm", EPALM, "--frames", "8")
    done = run(root, tmp_path / "run", *epalm, "--train.draw_frames", "true", "--train.features", "encode")
    assert done.code in (0, None), done
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adalink_config.json").read_text())["task"]["frames"] == 8
    again = adalink("evaluate", "--config", tmp_path / "run" / "config.yaml", "--adapter", adapter, "--out", tmp_path / "again")
    assert again.code in (0, None), again
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "run" / "results.json").read_bytes()
    model = VisionLanguageModel.from_pretrained(adapter)
    assert model.tower.preprocess.n_frames == 8  # type: ignore[union-attr]
    files = [root / "media" / f"clip{i}" for i in range(2)]
    written = adalink("caption", *files, "--adapter", adapter)
    assert [line.split("\t")[0] for line in written.out.splitlines()] == [str(file) for file in files], written
    assert "holds no numbered frame" in refused(adalink("caption", files[0], root / "encoder", "--adapter", adapter))
    wrong = adalink("evaluate", "--config", tmp_path / "run" / "config.yaml", "--adapter", adapter, "--frames", "4")
    assert "was trained on clips with frames: 8, and this model's encoder has 4: compose it with frames=8" in refused(wrong)


def test_cached_features_of_clips_are_what_the_methods_read(root: Path, tmp_path: Path) -> None:
    epalm = ("--methods.bridge", "null", "--methods.adalink", "null", "--methods.epalm", EPALM)
    written = adalink("features", "--config", RECIPES["captioning"], *clips(root, *epalm, "--features", tmp_path / "f"))
    assert written.code in (0, None), written
    assert "2 pooled vectors" in written.err or "taps" in written.err, written.err
    done = run(root, tmp_path / "run", *epalm, "--features", tmp_path / "f", "--features_dtype", "float16", "--train.features", "encode")
    assert done.code in (0, None), done
    other = run(root, tmp_path / "other", *epalm, "--features", tmp_path / "f", "--frames", "8", "--train.features", "encode")
    assert "the features in" in refused(other)


@pytest.mark.parametrize(
    ("more", "file", "sentence"),
    [
        (("--frames", "-1"), "captions.json", "frames is -1: give how many frames an encoder of video gets of each clip"),
        (("--encoder", "scenes:encoder", "--frames", "8"), "captions.json", "takes image, which has none: leave it out"),
        (("--encoder", "scenes:encoder"), "captions.json", "is of the kind video, and the encoder takes image"),
        ((), "images.json", "is of the kind image, and the encoder takes video: give data of the kind video, or an encoder of image"),
        (("--train.draw_frames", "true", "--train.features", "memory"), "captions.json", "train.draw_frames gives each epoch other frames"),
        (("--train.draw_frames", "true", "--features", "x", "--train.features", "encode"), "captions.json", "and features is x: leave one out"),
        (("--dry-run",), "captions.json", "is an encoder of video, and only those of images are drawn without their weights"),
    ],
)
def test_what_cannot_be_is_one_sentence(more: tuple[str, ...], file: str, sentence: str, root: Path, tmp_path: Path) -> None:
    assert sentence in refused(run(root, tmp_path / "run", *more, file=file))


def test_questions_are_asked_about_a_clip(root: Path, tmp_path: Path) -> None:
    rows = [{"video": f"clip{i}", "question_id": i, "sent": "what is it?", "label": {"cube": 1.0}} for i in range(4)]
    (root / "questions.json").write_text(json.dumps(rows))
    done = train("vqa", tmp_path / "run", *clips(root, file="questions.json"), small=())
    assert done.code in (0, None), done
    assert "exact match" in (tmp_path / "run" / "metrics.json").read_text()
    asked = adalink("ask", root / "media" / "clip0", "what is it?", "how many?", "--adapter", tmp_path / "run" / "adapter")
    assert asked.code in (0, None), asked
    assert len(asked.out.splitlines()) == 2
