"""`connector` and `connector_methods`: the connector of a model that sees already, trained from the command line, saved in the run, loaded by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_run import SMALL, adalink, refused
from existing_families import MADE
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from multimodal.data.images.decode import decode_image
from tasks.runs.compose import load_adapted
from tasks.scenes.dataset import Scenes
from tasks.serve.engine import FeatureLRU
from tasks.serve.scheduler import ServedImage
from tasks.task import TRAINED

SETTINGS = (
    *SMALL, "--task", "vqa", "--methods.lora", "{rank: 2}", "--train.steps", "4", "--train.checkpoint_every", "2", "--train.learning_rate", "0.05",
    "--train.log_every", "1",
)  # fmt: skip
TRAINED_COPY = ("--connector", "trained", "--train.learning_rates", "{modules_to_save: 0.01}")
METHODS = ("--connector_methods.lora", "{rank: 2}", "--train.learning_rates", "{connector: 0.02}")
QUESTION = Scenes(split="val", size=4)[0].questions[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA."""
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    for part in MADE["llava"]():
        part.save_pretrained(out)
    return out


@pytest.fixture(scope="module", params=[TRAINED_COPY, METHODS], ids=["trained", "methods"])
def run(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    done = adalink("train", "--model", folder, *SETTINGS, *request.param, "--out", out)
    assert done.code == 0, done
    return out


def files(run: Path) -> list[Path]:
    return [path.relative_to(run) for path in sorted((run / "adapter").rglob("*.safetensors"))]


def test_the_connector_is_trained_with_the_language_model(run: Path, folder: Path) -> None:
    counts = json.loads((run / "metrics.json").read_text())["trained_parameters"]
    assert set(counts) in ({"lora", "modules_to_save"}, {"lora", "connector.lora"})
    stored = {name: value for file in files(run) for name, value in load_file(run / file).items()}
    assert all(bool(value.any()) for name, value in stored.items() if name.endswith("up.weight"))
    frozen = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    copies = {name.removeprefix("modules_to_save."): value for name, value in stored.items() if name.startswith("modules_to_save.")}
    assert not any(torch.equal(value, frozen[name]) for name, value in copies.items())


def test_a_resumed_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    done = adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume")
    assert done.code == 0, done
    for name in (*files(run), "results.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()
    other = refused(adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume", "--connector", "frozen", "--connector_methods.lora", "null", "--train.learning_rates", "{}"))
    assert "holds other weights than this config trains" in other


def test_every_command_reads_it(run: Path, tmp_path: Path) -> None:
    done = adalink("evaluate", "--config", run / "config.yaml", "--adapter", run / "adapter", "--out", tmp_path / "again")
    assert done.code == 0, done
    rows, again = (json.loads((one / "metrics.json").read_text())["rows"] for one in (run, tmp_path / "again"))
    assert again[TRAINED] == rows[TRAINED]
    results = {row["question_id"]: row["answer"] for row in json.loads((run / "results.json").read_text())}
    image = Scenes(split="val", size=4)[0].image
    assert isinstance(image, bytes)
    (tmp_path / "scene.png").write_bytes(image)
    answer = adalink("ask", "--adapter", run / "adapter", tmp_path / "scene.png", QUESTION.text, "--generation.max_new_tokens", 3)
    assert (answer.code, answer.out.strip()) == (0, results[QUESTION.question_id].strip())


def test_a_merged_model_has_the_trained_connector(run: Path, tmp_path: Path) -> None:
    done = adalink("export", "merged", "--adapter", run / "adapter", "--out", tmp_path / "merged")
    if (run / "adapter" / "connector").exists():
        assert "has methods on its connector, which a language model's folder cannot hold: export one without" in refused(done)
        return
    assert done.code == 0, done
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    torch.testing.assert_close(merged.state_dict()[name], stored[f"modules_to_save.{name}"])


def test_a_server_caches_images_beside_their_features(run: Path) -> None:
    model, _ = load_adapted(run / "adapter")
    cached = FeatureLRU(model, 2)
    read = model.tower.preprocess(decode_image(Scenes(split="val", size=4)[0].image))
    displayed, _ = cached.of([[ServedImage("0", read)]])
    (one,) = displayed.samples  # type: ignore[union-attr]
    assert one.inputs
    assert one.vectors is not None
    assert one.nbytes > one.vectors.nbytes


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--connector", "trained", "--connector_methods.lora.rank", "2"), "connector is trained, and connector_methods (lora) would act on its frozen weights"),
        (("--connector_methods.lora.rank", "2", "--features", "kept"), "features is kept, and features of a trained connector (connector_methods: lora) change"),
        (("--connector_methods.prompt.length", "2"), "prompt adds tokens to a row, and a connector reads none"),
    ],
)
def test_what_a_connector_cannot_have_is_refused(given: tuple[str, ...], sentence: str, folder: Path, tmp_path: Path) -> None:
    assert refused(adalink("train", "--model", folder, *SETTINGS, *given, "--out", tmp_path / "run")).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_it_is_trained_beside_the_tower(folder: Path, tmp_path: Path) -> None:
    tower = ("--vision_methods.lora", "{groups: {image: [image]}, rank: 2}")
    done = adalink("train", "--model", folder, *SETTINGS, "--train.steps", "1", *tower, "--connector", "trained", "--out", tmp_path / "run")
    assert done.code == 0, done
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["trained_parameters"]) == {"lora", "modules_to_save", "vision.lora"}


def test_it_is_trained_without_other_methods(folder: Path, tmp_path: Path) -> None:
    settings = [one for one in SETTINGS if one not in ("--methods.lora", "{rank: 2}")]
    done = adalink("train", "--model", folder, *settings, "--train.steps", "1", "--connector", "trained", "--out", tmp_path / "run")
    assert done.code == 0, done
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["trained_parameters"]) == {"modules_to_save"}
    done = adalink("export", "merged", "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "merged")
    assert done.code == 0, done
    frozen = refused(adalink("train", "--model", folder, *settings, "--out", tmp_path / "none"))
    assert frozen.startswith("the config names no method: under `methods:`, give one or more of ")


def test_a_composed_model_has_a_bridge(tmp_path: Path) -> None:
    done = adalink("train", "--encoder", "scenes:encoder", "--language_model", "scenes:language", *SETTINGS, "--connector", "trained", "--out", tmp_path / "run")
    assert refused(done).startswith("connector was given without model: the connector of a composed model is a method, bridge, and trained; leave it out")
