"""`vision_methods`: methods inside the encoder from the command line, trained with the others, saved in the run, loaded by every command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_run import SMALL, Done, adalink, refused, train
from safetensors.torch import load_file

from multimodal.data.feature_cache.encode import encode_all, pixel_table
from multimodal.data.images.decode import decode_image
from multimodal.sample import Sample
from tasks.captioning import Captioning
from tasks.runs.compose import compose, load_adapted
from tasks.scenes.dataset import Scenes
from tasks.serve.engine import FeatureLRU
from tasks.serve.scheduler import ServedImage
from tasks.task import BLIND, TRAINED

LORA = ("--vision_methods.lora", '{"groups": {"image": ["image"]}, "rank": 2, "alpha": 4}')
ENCODE = ("--train.features", "encode")  # the recipe keeps features
PROMPT = ("--vision_methods.prompt", "{length: 3, init_std: 0.5}")
OPTIONS = (
    *SMALL, *ENCODE, *LORA, *PROMPT, "--train.steps", "4", "--train.checkpoint_every", "2", "--train.learning_rate", "0.05", "--train.measure_every", "2",
    "--train.learning_rates", '{"vision": 0.02}',
)  # fmt: skip


def test_both_sides_are_trained_and_saved(trained: tuple[Path, Done], run: Path, tmp_path: Path) -> None:
    assert {path.name for path in (run / "adapter" / "vision").iterdir()} == {"README.md", "adalink_config.json", "adapter_model.safetensors"}
    counts = json.loads((run / "metrics.json").read_text())["trained_parameters"]
    assert {"adalink", "bridge", "vision.lora", "vision.prompt"} == set(counts)
    assert "in the encoder: " in trained[1].out
    start = train("captioning", tmp_path / "start", small=(*OPTIONS, "--train.steps", "1", "--train.learning_rates", '{"vision": 1e-30}'))
    assert start.code == 0, start
    for name in ("adapter_model.safetensors", "vision/adapter_model.safetensors"):
        before, after = (load_file(folder / "adapter" / name) for folder in (tmp_path / "start", run))
        assert not any(torch.equal(before[key], value) for key, value in after.items()), name


def test_a_plan_counts_what_the_run_trained(run: Path) -> None:
    planned = adalink("train", "--config", run / "config.yaml", "--out", run / "other", "--dry-run", "--json")
    assert planned.code == 0, planned
    counted = {method["name"]: method["trained"] for method in json.loads(planned.out)["methods"]}
    assert counted == json.loads((run / "metrics.json").read_text())["trained_parameters"]


def test_the_loaded_run_gives_the_same_captions(run: Path, tmp_path: Path) -> None:
    done = adalink("evaluate", "--config", run / "config.yaml", "--adapter", run / "adapter", "--out", tmp_path / "again")
    assert done.code == 0, done
    assert (tmp_path / "again" / "results.json").read_bytes() == (run / "results.json").read_bytes()
    rows, again = (json.loads((folder / "metrics.json").read_text())["rows"] for folder in (run, tmp_path / "again"))
    assert again == {name: rows[name] for name in (TRAINED, BLIND)}
    scene = Scenes(split="val", size=4)[1]
    assert isinstance(scene.image, bytes)
    (tmp_path / "scene.png").write_bytes(scene.image)
    stated = {row["image_id"]: row["caption"] for row in json.loads((run / "results.json").read_text())}[scene.image_id]
    caption = adalink("caption", "--adapter", run / "adapter", tmp_path / "scene.png", "--generation.max_new_tokens", 3)
    assert caption.code == 0, caption
    assert caption.out.rstrip("\n").endswith(stated)


def test_what_is_measured_is_the_encoder_as_it_is_trained(run: Path, tmp_path: Path) -> None:
    """The measurement after the last step, and not the features of the first one, is what the evaluation finds."""
    measured = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "CIDEr" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert measured[-1]["CIDEr"] == json.loads((run / "metrics.json").read_text())["rows"][TRAINED]["CIDEr"]


def test_a_resumed_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    done = adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume")
    assert done.code == 0, done
    for name in ("adapter/adapter_model.safetensors", "adapter/vision/adapter_model.safetensors", "results.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()
    other = refused(adalink("train", "--config", run / "config.yaml", "--out", copy, "--resume", "--vision_methods.prompt", "null"))
    assert "holds other weights than this config trains" in other


def test_questions_are_answered_with_an_adapted_encoder_too(tmp_path: Path) -> None:
    done = train("vqa", tmp_path / "run", *ENCODE, *LORA)
    assert done.code == 0, done
    scene = Scenes(split="val", size=4)[0]
    assert isinstance(scene.image, bytes)
    (tmp_path / "scene.png").write_bytes(scene.image)
    stated = {row["question_id"]: row["answer"] for row in json.loads((tmp_path / "run" / "results.json").read_text())}
    asked = scene.questions[0]
    answer = adalink("ask", "--adapter", tmp_path / "run" / "adapter", tmp_path / "scene.png", asked.text, "--generation.max_new_tokens", 3)
    assert (answer.code, answer.out.strip()) == (0, stated[asked.question_id])


def test_a_server_reads_pictures_through_the_adapted_encoder(run: Path) -> None:
    model, _ = load_adapted(run / "adapter", encoder=None, language_model=None)
    scenes = Scenes(split="val", size=3)
    images = [model.tower.preprocess(decode_image(scenes[i].image)) for i in range(3)]
    retained = FeatureLRU(model, 2)
    displayed, order = retained.of([[ServedImage(str(i), images[i])] for i in (0, 1, 0)])
    assert (retained.kind, order) == ("pixels", [0, 1, 0])
    assert torch.equal(displayed, torch.stack(images[:2]))
    assert torch.equal(retained.of([[ServedImage("0", None, retained.get("0"))]])[0][0], images[0])


@pytest.mark.parametrize(
    ("options", "found"),
    [(("--train.features", "memory"), "train.features is memory"), (("--features", "kept"), "features is kept")],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_features_that_change_are_not_kept(options: tuple[str, ...], found: str, dry: tuple[str, ...], tmp_path: Path) -> None:
    sentence = refused(train("captioning", tmp_path / "run", *ENCODE, *LORA, *options, *dry))
    assert sentence.startswith(f"{found}, and features of an encoder that vision_methods trains (lora) change with every step: give train.features: encode, and no folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--vision_methods.adalink", "{rank: 4, modalities: [text]}"), "is for text, answer tokens, and a vision encoder has image tokens"),
        (("--vision_methods.lora", '{"groups": {"image": ["image"]}, "rank": 2, "alpha": 4, "targets": ["q_proj"]}'), "no linear of this model is named q_proj"),
        (("--vision_methods.bridge", "{kind: linear}"), "a bridge needs an encoder's features, and this model has none"),
        (("--vision_methods.prefx", "{}"), "there is no setting vision_methods.prefx: the nearest is vision_methods.prefix"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_does_not_fit_the_encoder_is_one_sentence(option: tuple[str, str], sentence: str, dry: tuple[str, ...], tmp_path: Path) -> None:
    assert sentence in refused(train("captioning", tmp_path / "run", *ENCODE, *option, *dry))


def test_exports_do_not_drop_an_adapted_encoder(run: Path, tmp_path: Path) -> None:
    out = train("captioning", tmp_path / "run", "--methods.bridge", "null", "--methods.adalink", "{rank: 2, modalities: [text]}", *ENCODE, *LORA)
    assert out.code == 0, out
    sentence = refused(adalink("export", "folded", "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "out"))
    assert "has an adapted encoder, which a language model's folder cannot hold: export one without" in sentence


class Damaged:
    """Four scenes; the image of the second cannot be decoded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        scene = Scenes(split="val", size=4)[index]
        return replace(scene, image=b"no image") if index == 1 else scene


def test_pixels_stand_where_features_would() -> None:
    """A table of pixels has the bad samples and the order of a table of features."""
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template)
    table = pixel_table(Damaged(), model.tower.preprocess, label="")
    assert (len(table), table.usable(), list(table.bad), table.shape) == (4, [0, 2, 3], [1], (3, 96, 96))
    chosen = table.only([1, 3])
    assert (len(chosen), list(chosen.bad), chosen[0]) == (2, [0], table.bad[1])
    last, again = chosen[1], table[3]
    assert isinstance(last, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert torch.equal(last, again)
    frozen = encode_all(model, Damaged())
    assert (frozen.usable(), frozen.bad[1].reason) == (table.usable(), table.bad[1].reason)
