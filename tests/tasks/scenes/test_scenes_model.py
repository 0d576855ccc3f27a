"""The model that sees, made of the frozen parts of scenes: transformers loads its folder, and every command of a run takes it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from time import process_time

import pytest
import torch
from cli_run import adalink
from PIL import Image
from shared import ROOT
from transformers import AutoModelForImageTextToText, AutoProcessor

from multimodal.batches.collate import collate, stacked
from multimodal.model import VisionLanguageModel
from multimodal.template import Text
from multimodal.training.settings import TrainSettings
from tasks.scenes import Scenes
from tasks.scenes.model import assemble, train_connector
from tasks.scenes.model import main as make_model
from tasks.task import BLIND, TRAINED, UNTRAINED

SAMPLE = Scenes(split="val", size=1)[0]
QUESTION = SAMPLE.questions[0].text
VQA = ("--task", "vqa", "--vqa.template", "{prompt: '<image>{question}', target: '{text}'}", "--data.val.scenes", "val/3", "--generation.max_new_tokens", "3")


@pytest.fixture(scope="module")
def composed() -> tuple[VisionLanguageModel, torch.nn.Sequential]:
    """The composed model, whose connector learnt for two steps."""
    return train_connector(TrainSettings(steps=2, batch_size=2), images=4)


@pytest.fixture(scope="module")
def folder(composed: tuple[VisionLanguageModel, torch.nn.Sequential], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    for part in assemble(*composed):
        part.save_pretrained(out)
    return out


def test_the_folder_says_of_an_image_what_the_composed_model_says(composed: tuple[VisionLanguageModel, torch.nn.Sequential], folder: Path) -> None:
    whole, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
    assert isinstance(SAMPLE.image, bytes)
    image = Image.open(io.BytesIO(SAMPLE.image)).convert("RGB")
    model = composed[0].eval()
    read = model.tower.preprocess(image)
    row = model.row_encoder().row(Text("", SAMPLE.captions[0]), read)
    batch = collate([row], [0], stacked([read]), kind="pixels", side="right", pad_id=1)
    turns = [
        {"role": "user", "content": [{"type": "image", "image": image}]},
        {"role": "assistant", "content": [{"type": "text", "text": SAMPLE.captions[0]}]},
    ]
    found = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    n_image = model.tower.n_patches
    assert found["input_ids"][0, :n_image].tolist() == [processor.image_token_id] * n_image
    assert found["input_ids"][0, n_image:-1].tolist() == batch.ids[0, n_image:].tolist()
    labels = found["input_ids"].masked_fill(torch.arange(found["input_ids"].shape[1]) <= n_image, -100)
    with torch.no_grad():
        expected, loss = model(batch), whole(**found, labels=labels).loss
    assert float(loss) == pytest.approx(float(expected), rel=2e-3)  # two words more, which no text holds


def test_every_command_of_a_run_takes_the_folder(folder: Path, tmp_path: Path) -> None:
    methods = ("--methods.adalink", "{rank: 4, modalities: [image, text]}", "--train.learning_rate", "0.02", "--train.log_every", "1")
    out, image = tmp_path / "run", tmp_path / "scene.png"
    done = adalink(
        "train", "--model", folder, *VQA, *methods, "--data.train.scenes", "train/4", "--train.steps", "8", "--train.batch_size", "4", "--out", out
    )  # fmt: skip
    assert done.code == 0, done
    losses = [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    again = tmp_path / "again"
    done = adalink("evaluate", "--config", out / "config.yaml", "--adapter", out / "adapter", "--out", again)
    assert done.code == 0, done
    assert json.loads((again / "metrics.json").read_text())["rows"]["trained adapter"] == rows["trained adapter"]
    assert isinstance(SAMPLE.image, bytes)
    image.write_bytes(SAMPLE.image)
    done = adalink("ask", "--adapter", out / "adapter", image, QUESTION)
    assert done.code == 0, done
    assert done.out.strip() == json.loads((again / "results.json").read_text())[0]["answer"]


@pytest.mark.slow
@pytest.mark.timeout(7200)  # only ends a hang: minutes on two free cores
def test_adapters_of_the_tutorial_depend_on_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the tutorial in full: their tables are printed, and are those of the page and of tests/benchmarks/RESULTS.md."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "examples" / "docs" / "tutorials" / "existing.md").read_text()
    (config,) = re.findall(r"<!-- file: seeing.yaml -->\n```yaml\n(.*?)```", page, flags=re.DOTALL)
    Path("seeing.yaml").write_text(config)
    make_model(["--out", "scenes-model"])
    rows = {}
    for task, more in (("vqa", ()), ("captioning", ("--train.epochs", "1"))):
        done = adalink("train", "--config", "seeing.yaml", "--task", task, *more, "--out", task)
        assert done.code == 0, done
        with capsys.disabled():
            print(f"\n{task}, {process_time():.0f} seconds of the processor so far\n{done.out}")
        rows[task] = json.loads(Path(task, "metrics.json").read_text())["rows"]
    accuracy, cider = ({row: values[name] for row, values in rows[task].items()} for task, name in (("vqa", "accuracy"), ("captioning", "CIDEr")))
    assert accuracy[TRAINED] >= accuracy[BLIND] + 20
    assert accuracy[TRAINED] >= accuracy[UNTRAINED] + 4
    assert cider[TRAINED] >= 3 * cider[BLIND]
