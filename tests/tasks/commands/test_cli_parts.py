"""Frozen parts and adapters that do not exist, do not fit, or are damaged: one sentence each, and no run folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_run import RECIPES, SMALL, WIDTH, Done, adalink, refused, train
from PIL import Image
from safetensors.torch import load_file, save_file

from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE
from multimodal.batches.collate import Batch
from multimodal.generation.generate import GenerationChoice, GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.scenes import encoder_folder, language_folder
from tasks.scenes.dataset import Scenes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a captioning run and a vqa run."""
    folder = tmp_path_factory.mktemp("runs")
    for task in RECIPES:
        assert train(task, folder / task).code == 0
    return folder


@pytest.fixture
def adapter(runs: Path, tmp_path: Path) -> Path:
    """A captioning adapter to damage."""
    return Path(shutil.copytree(runs / "captioning" / "adapter", tmp_path / "adapter"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    image = Scenes(split="val", size=1)[0].image
    assert isinstance(image, bytes)
    path.write_bytes(image)
    return path


def caption(adapter: Path, *images: Path, options: tuple[object, ...] = ()) -> Done:
    return adalink("caption", "--adapter", adapter, "--generation.max_new_tokens", "3", *options, *images)


UNKNOWN = [
    ("--encoder", "scenes:encodr", "there is no embedded part 'scenes:encodr': there are scenes:encoder and scenes:language"),
    ("--encoder", "org/no-such-encoder", "cannot load the vision encoder 'org/no-such-encoder'"),
    ("--encoder", "timm:vit_foo", "timm has no model 'vit_foo'; the nearest names are"),
    ("--encoder", "open_clip:ViT-B-99/foo", "open_clip has no model 'ViT-B-99'"),
    ("--encoder", "./no-such-folder", "'./no-such-folder' should be a folder with a model's files, found nothing there"),
    ("--encoder", "scenes:language", "with the input input_ids, expected one that takes pixel_values"),
    ("--layer", "-9", "layer=-9 is not in the encoder"),
    ("--layer", "0", "layer=0 is not in the encoder"),
    ("--language_model", "scenes:lm", "there is no embedded part 'scenes:lm'"),
    ("--language_model", "org/no-such-lm", "cannot load the language model 'org/no-such-lm'"),
    ("--language_model", "no-such-lm", "cannot load the language model 'no-such-lm'"),
    ("--language_model", "/no/such/folder", "'/no/such/folder' should be a folder with a model's files, found nothing there"),
    ("--language_model", "scenes:encoder", "expected one that writes text"),
]


@pytest.mark.parametrize(("option", "value", "expected"), UNKNOWN, ids=[f"{option[2:]}={value}" for option, value, _ in UNKNOWN])
def test_an_unknown_encoder_or_language_model_is_one_sentence(option: str, value: str, expected: str, tmp_path: Path) -> None:
    sentence = refused(train("captioning", tmp_path / "run", f"{option}={value}"))
    assert expected in sentence
    assert not (tmp_path / "run").exists()


def test_a_part_without_its_weights_is_one_sentence(tmp_path: Path) -> None:
    for part, option in ((language_folder(), "--language_model"), (encoder_folder(), "--encoder")):
        broken = tmp_path / option
        shutil.copytree(part, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "cannot be read" in refused(train("captioning", tmp_path / "run", option, broken))
        weights.unlink()
        refused(train("captioning", tmp_path / "run", option, broken))
        assert not (tmp_path / "run").exists()


def test_learning_rates_of_a_method_that_is_not_used_are_refused(tmp_path: Path) -> None:
    sentence = refused(train("captioning", tmp_path / "run", "--train.learning_rates", "{lora: 0.1}"))
    assert sentence == "train.learning_rates names lora, and this adapter's methods are adalink, bridge"
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_not_installed_are_refused(tmp_path: Path) -> None:
    sentence = refused(train("captioning", tmp_path / "run", "--train.trackers", "[wandb]"))
    assert sentence.startswith("train.trackers names wandb, and no such package is here: pip install 'adalink[trackers]'")
    assert not (tmp_path / "run").exists()


def test_a_saved_adapter_captions_and_answers(runs: Path, photo: Path) -> None:
    done = caption(runs / "captioning" / "adapter", photo)
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) == 1
    two = caption(runs / "captioning" / "adapter", photo, photo)
    assert two.out == f"{photo}\t{done.out}" * 2
    answered = adalink("ask", "--adapter", runs / "vqa" / "adapter", photo, "how many circles are there?", "--generation.max_new_tokens", "3")
    assert (answered.code, answered.err) == (0, "")
    assert answered.out.strip()
    question = "what is in the middle?"
    several = adalink("ask", "--adapter", runs / "vqa" / "adapter", photo, question, "how many circles are there?", "--generation.max_new_tokens", "3")
    assert several.out.splitlines()[1] == f"how many circles are there?\t{answered.out.strip()}"
    assert several.out.startswith(f"{question}\t")


def test_many_pictures_are_captioned_in_parts_and_in_order(runs: Path, tmp_path: Path) -> None:
    paths = []
    for i in range(18):
        image = Scenes(split="val", size=18)[i].image
        assert isinstance(image, bytes)
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(image)
    done = caption(runs / "captioning" / "adapter", *paths)
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert [line[0] for line in lines] == [str(path) for path in paths]
    assert caption(runs / "captioning" / "adapter", paths[17]).out.strip() == lines[17][1]


def test_a_folder_and_a_pattern_stand_for_their_images(runs: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some [images]"
    folder.mkdir()
    for name in ("b.PNG", "a.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("no image")
    adapter = runs / "captioning" / "adapter"
    expected = [str(folder / "a.png"), str(folder / "b.PNG")]
    for given in (folder, tmp_path / "*" / "?.[pP][nN][gG]"):
        assert [line.split("\t")[0] for line in caption(adapter, given).out.splitlines()] == expected
    (tmp_path / "empty").mkdir()
    assert f"the folder {tmp_path / 'empty'} holds no image" in refused(caption(adapter, tmp_path / "empty"))
    assert refused(caption(adapter, tmp_path / "*.jpg")) == f"no file matches {tmp_path / '*.jpg'}: check the pattern"


def test_one_question_about_several_images_and_several_about_each(runs: Path, photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    image = Scenes(split="val", size=18)[7].image
    assert isinstance(image, bytes)
    other.write_bytes(image)
    adapter, what, how = runs / "vqa" / "adapter", "what is in the middle?", "how many circles are there?"
    alone = {(path, question): adalink("ask", "--adapter", adapter, path, question).out.strip() for path in (photo, other) for question in (what, how)}
    one = adalink("ask", "--adapter", adapter, photo, other, what)
    assert one.out.splitlines() == [f"{path}\t{alone[path, what]}" for path in (photo, other)]
    both = adalink("ask", "--adapter", adapter, photo, other, what, how)
    assert both.out.splitlines() == [f"{path}\t{question}\t{alone[path, question]}" for path in (photo, other) for question in (what, how)]
    assert refused(adalink("ask", "--adapter", adapter, photo, other)).startswith(f"no question is given after {other}")
    assert refused(adalink("ask", "--adapter", adapter, photo, tmp_path / "no.png", what)) == f"{tmp_path / 'no.png'} is missing"


def test_a_picture_that_cannot_be_read_is_told_before_anything_is_captioned(runs: Path, photo: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    adapter = runs / "captioning" / "adapter"
    for path, expected in ((cut, "is truncated: png of 96 x 96"), (tmp_path / "no.png", "is missing"), (tmp_path / "text.png", "begins with b'hello'")):
        done = caption(adapter, photo, path)
        assert expected in refused(done)
        assert str(path) in done.err
        assert not done.out
    sentence = refused(adalink("ask", "--adapter", runs / "vqa" / "adapter", tmp_path / "no.png", "is it?"))
    assert sentence == f"{tmp_path / 'no.png'} is missing"


def test_the_wrong_command_for_an_adapter_names_the_right_one(runs: Path, photo: Path) -> None:
    assert "was trained for captioning: use `adalink caption`" in refused(adalink("ask", "--adapter", runs / "captioning" / "adapter", photo, "is it?"))
    assert "was trained for vqa: use `adalink ask`" in refused(caption(runs / "vqa" / "adapter", photo))


def test_what_a_run_generated_with_is_saved_with_its_adapter_and_the_command_line_overrides(
    runs: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = runs / "captioning" / "adapter"
    config = adapter / "adalink_config.json"
    saved = json.loads(config.read_text())
    assert saved["task"]["generation"] == {"max_new_tokens": 3, "num_beams": 1, "length_penalty": 1.0, "cache": "auto"}
    saved["task"]["generation"] |= {"num_beams": 3, "later": True}  # a setting of a later version is passed over
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (copy / config.name).write_text(json.dumps(saved))
    used: list[GenerationSettings] = []
    generate = VisionLanguageModel.generate_batch

    def watched(self: VisionLanguageModel, batch: Batch, settings: GenerationSettings, *more: Any) -> list[str]:
        used.append(settings)
        return generate(self, batch, settings, *more)

    monkeypatch.setattr(VisionLanguageModel, "generate_batch", watched)
    data = ("--data.val.scenes", "val/2")
    for given, beams in (((), 3), (("--generation.num_beams", "2"), 2)):
        assert adalink("caption", "--adapter", copy, *given, photo).code == 0
        done = adalink("evaluate", "--adapter", copy, "--out", tmp_path / f"out{beams}", *data, *given)
        assert done.code == 0, done
        assert set(used) == {GenerationSettings(max_new_tokens=3, num_beams=beams)}
        used.clear()
        settings = yaml.safe_load((tmp_path / f"out{beams}" / "config.yaml").read_text())
        assert settings["generation"] == {"max_new_tokens": 3, "num_beams": beams, "length_penalty": 1.0, "cache": "auto"}
        assert (settings["task"], settings["encoder"], settings["language_model"]) == ("captioning", "scenes:encoder", "scenes:language")
    VisionLanguageModel.from_pretrained(copy, encoder=encoder_folder(), language_model=language_folder()).generate([Image.open(photo).convert("RGB")], [""])
    assert used == [GenerationSettings(max_new_tokens=3, num_beams=3)]
    assert adalink("evaluate", "--config", tmp_path / "out3" / "config.yaml", "--adapter", copy, "--out", tmp_path / "again").code == 0
    del saved["task"]["generation"]  # as adapters were saved before
    (copy / config.name).write_text(json.dumps(saved))
    used.clear()
    assert adalink("caption", "--adapter", copy, photo).code == 0
    assert used == [GenerationSettings()]
    saved["task"]["generation"] = {"num_beams": "many"}
    (copy / config.name).write_text(json.dumps(saved))
    assert refused(adalink("caption", "--adapter", copy, photo)).startswith("the generation settings of the adapter's config are {'num_beams': 'many'}")


def test_what_may_be_chosen_of_generation_is_what_there_is_to_choose() -> None:
    names = [[(field.name, field.default) for field in dataclasses.fields(kind)] for kind in (GenerationSettings, GenerationChoice)]
    assert [name for name, _ in names[0]] == [name for name, _ in names[1]]
    assert GenerationChoice().over(GenerationSettings(num_beams=4)) == GenerationSettings(num_beams=4)


def test_a_captioning_adapter_is_not_evaluated_with_a_vqa_config(runs: Path, tmp_path: Path) -> None:
    adapter = runs / "captioning" / "adapter"
    sentence = refused(adalink("evaluate", "--config", RECIPES["vqa"], "--adapter", adapter, "--out", tmp_path / "out", *SMALL))
    assert sentence == f"the adapter in {adapter} was trained for captioning, and the config's task is vqa: give the config of its run"
    assert not (tmp_path / "out").exists()


def other_language(folder: Path) -> Path:
    """The embedded language model with one value changed."""
    shutil.copytree(language_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def other_encoder(folder: Path) -> Path:
    shutil.copytree(encoder_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_of_another_base_is_refused_naming_both(runs: Path, photo: Path, tmp_path: Path) -> None:
    adapter = runs / "captioning" / "adapter"
    language, encoder = other_language(tmp_path / "language"), other_encoder(tmp_path / "encoder")
    sentence = refused(caption(adapter, photo, options=("--language_model", language)))
    assert sentence.startswith(f"the adapter in {adapter} was trained on the language model scenes:language (")
    assert f"but this one is {language} (" in sentence
    sentence = refused(caption(adapter, photo, options=("--encoder", encoder)))
    assert sentence.startswith(f"the adapter in {adapter} was trained on the encoder scenes:encoder (")
    out = tmp_path / "out"
    sentence = refused(adalink("evaluate", "--config", RECIPES["captioning"], "--adapter", adapter, "--out", out, *SMALL, "--language_model", language))
    assert "was trained on the language model scenes:language" in sentence
    assert not out.exists()
    # The same parts elsewhere are the same parts.
    copy = Path(shutil.copytree(language_folder(), tmp_path / "copy"))
    assert caption(adapter, photo, options=("--language_model", copy)).out == caption(adapter, photo).out


def test_a_missing_adapter_is_one_sentence(photo: Path, tmp_path: Path) -> None:
    assert refused(caption(tmp_path / "no", photo)).startswith(f"{tmp_path / 'no'} is no adapter folder: it has no adalink_config.json")
    assert "is no adapter folder" in refused(caption(photo, photo))
    assert "is no adapter folder" in refused(caption(tmp_path, photo))
    sentence = refused(adalink("evaluate", "--config", RECIPES["vqa"], "--adapter", tmp_path / "no", "--out", tmp_path / "out", *SMALL))
    assert "is no adapter folder" in sentence
    assert not (tmp_path / "out").exists()


CONFIGS = {
    "cut off": ('{"format": 1, "methods": {', "is not an adapter config"),
    "not JSON": ("\x00\x01", "is not an adapter config"),
    "a list": ("[1, 2]", "is not an adapter config"),
    "of peft": ('{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x"}', "is of the peft library (LORA): read its folder with adalink.from_peft"),
    "of a later version": ('{"format": 2}', "has format 2, and this version of adalink reads 1: update adalink"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_foreign_or_damaged_adapter_config_is_one_sentence(case: str, adapter: Path, photo: Path) -> None:
    (adapter / CONFIG_FILE).write_text(CONFIGS[case][0])
    sentence = refused(caption(adapter, photo))
    assert CONFIGS[case][1] in sentence
    assert str(adapter / CONFIG_FILE) in sentence


METHODS = [
    ({"method": "adalink", "rank": 0, "modalities": ["text"]}, "AdaLink's rank is 0"),
    ({"method": "adalink", "rank": "x", "modalities": ["text"]}, "is not an adapter config"),
    ({"method": "adalink", "modalities": ["text"]}, "adalink needs the setting rank, which has no default"),
    ({"method": "adalink", "rank": 4, "modalities": ["text"], "alpha": 1}, "adalink has no setting alpha"),
    ({"method": "xyz", "rank": 4}, "there is no method 'xyz': give one of adalink, adalora"),
]


@pytest.mark.parametrize(("method", "expected"), METHODS, ids=range(len(METHODS)))
def test_wrong_method_values_in_an_adapter_config_are_one_sentence(method: object, expected: str, adapter: Path, photo: Path) -> None:
    content = json.loads((adapter / CONFIG_FILE).read_text())
    content["methods"]["adalink"] = method
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    assert expected in refused(caption(adapter, photo))


def test_an_adapter_that_was_not_saved_by_train_is_one_sentence(adapter: Path, photo: Path) -> None:
    content = json.loads((adapter / CONFIG_FILE).read_text())
    content["task"] = {}
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    assert "was not saved by `adalink train`: it names no frozen parts with a task" in refused(caption(adapter, photo))


@pytest.mark.parametrize("size", [0, 100])
def test_truncated_weights_are_one_sentence(size: int, adapter: Path, photo: Path) -> None:
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(whole[:size])
    sentence = refused(caption(adapter, photo))
    assert sentence.startswith(f"{adapter / WEIGHTS_FILE} is damaged (")
    assert sentence.endswith("): copy or train it again")


def test_missing_foreign_and_misshapen_weights_are_one_sentence(adapter: Path, photo: Path) -> None:
    path = adapter / WEIGHTS_FILE
    tensors = load_file(path)
    name = "adalink.image.down.weight"
    save_file({**tensors, name: tensors[name][:3].clone()}, path)
    assert f"{name} is (3, {WIDTH}), and this model needs (16, {WIDTH})" in refused(caption(adapter, photo))
    save_file({"other": torch.zeros(1)}, path)
    assert "does not fit its config: missing [" in refused(caption(adapter, photo))
    path.unlink()
    assert refused(caption(adapter, photo)) == f"{adapter} has no {WEIGHTS_FILE}"
