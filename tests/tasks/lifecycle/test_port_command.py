"""`adalink port`: an updated language model takes a saved adapter where words and scores allow it; else nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_run import adalink, refused
from peft import PeftModel
from scenes_adapters import trained_adapter
from tiny_llava import save_llava

from adalink import AdaLink, AdaptedModel, LoRA, from_peft, to_peft
from adalink.checkpoint.compressed import COMPRESSED_FILE
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE
from multimodal.data.images.decode import decode_image
from multimodal.language import load_language
from tasks.captioning import WORDS
from tasks.commands.lifecycle.port import REPORT_FILE
from tasks.runs.compose import frozen_model, load_adapted
from tasks.runs.config import Parts
from tasks.runs.ported import ALONE, OLD, PORTED
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import language_folder

OLD_BASE = ("--old", "scenes:language")
DATA = ("--data.scenes", "val/6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's caption adapter, CIDEr 160.7 on 200 scenes, with short captions."""
    found, _ = trained_adapter(tmp_path_factory.mktemp("adapters"), "captioning")
    content = json.loads((found / CONFIG_FILE).read_text())
    content["task"]["generation"] = {"max_new_tokens": 12, "num_beams": 1, "length_penalty": 1.0}
    (found / CONFIG_FILE).write_text(json.dumps(content))
    return found


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Language models like the embedded one: the same, a little further, destroyed; and one whose words are in another order."""
    made, top = {}, tmp_path_factory.mktemp("updates")
    for name, eps in {"same": 0.0, "further": 0.01, "far": 0.22, "destroyed": 1.0, "permuted": 0.0}.items():
        made[name] = shutil.copytree(language_folder(), top / name)
        model, generator = load_language(made[name]).model, torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(eps * parameter.std() * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        model.save_pretrained(made[name])
    file = made["permuted"] / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    first, second = [word for word, token in words.items() if token in (40, 41)]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(content))
    return made


def test_a_port_onto_the_same_base_changes_what_the_adapter_is_bound_to_alone(folder: Path, updates: dict[str, Path], tmp_path: Path) -> None:
    done = adalink("port", folder, "--language_model", updates["same"], *OLD_BASE, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "the weights are those of the old model, rounded to another precision at most" in done.out
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    was, now = (json.loads((one / CONFIG_FILE).read_text()) for one in (folder, tmp_path / "out"))
    assert now.pop("derived")["settings"] == {"from": {role: part["fingerprint"] for role, part in was["base"].items()}, "measured": None}
    assert now["base"]["language_model"].pop("name") == str(updates["same"])
    was["base"]["language_model"].pop("name")
    assert now == was
    images = [decode_image(image) for sample in (Scenes(split="val", size=2)[index] for index in range(2)) for image in sample.images]
    own, _ = load_adapted(folder)
    with pytest.warns(UserWarning, match="was ported to this model and never measured on it"):
        ported, _ = load_adapted(tmp_path / "out")
    stored = own.adapted.active_adapter().tensors()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in ported.adapted.active_adapter().tensors().items())
    assert own.generate(images, [""] * 2) == ported.generate(images, [""] * 2)


def test_an_update_is_measured_and_the_folder_says_what_was_found(folder: Path, updates: dict[str, Path], tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    assert adalink("compress", folder, "--out", small, "--start", "zero").code == 0
    done = adalink("port", small, "--language_model", updates["further"], *OLD_BASE, *DATA, "--out", out, "--most_negative_flips", "1")
    assert done.code == 0, done.err
    assert (out / COMPRESSED_FILE).read_bytes() == (small / COMPRESSED_FILE).read_bytes()
    report, settings = json.loads((out / REPORT_FILE).read_text()), json.loads((out / CONFIG_FILE).read_text())["derived"]["settings"]
    scores = report["scores"]["scores"]
    assert list(scores) == [OLD, ALONE, PORTED]
    assert scores[OLD] > 100 > 60 > scores[ALONE]
    assert report["scores"]["gain_interval"][0] > 0
    assert settings["measured"] == {**report["scores"], "sentence": report["sentence"]}
    assert f"{scores[PORTED]:.2f} with the ported adapter" in done.out
    assert report["sentence"] in done.out
    assert 0.009 < report["drift"][0]["relative"] < 0.02
    assert f"{report['drift'][0]['name']}" in done.out
    evaluated = adalink("evaluate", "--adapter", out, "--data.val.scenes", "val/6", "--out", tmp_path / "evaluation")
    assert evaluated.code == 0, evaluated.err
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert "never measured" not in evaluated.err
    refusal = refused(adalink("evaluate", "--adapter", out, "--language_model", "scenes:language", "--data.val.scenes", "val/6", "--out", tmp_path / "no"))
    assert "but this one is scenes:language" in refusal


def test_a_base_that_was_destroyed_is_refused_with_three_and_accepted_by_name(folder: Path, updates: dict[str, Path], tmp_path: Path) -> None:
    given = ("port", folder, "--language_model", updates["destroyed"], *OLD_BASE, *DATA, "--out", tmp_path / "out")
    done = adalink(*given)
    assert done.code == 3
    assert "the ported adapter is not surely better than the new base alone: CIDEr" in done.err
    assert list(tmp_path.iterdir()) == []
    accepted = adalink(*given, "--accept", "true")
    assert accepted.code == 0, accepted.err
    assert "accepted: the ported adapter is not surely better" in accepted.out
    card = (tmp_path / "out" / "README.md").read_text()
    scores = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["scores"]["scores"]
    assert "accepted: the ported adapter is not surely better" in card
    assert all(str(value) in card for value in scores.values())


def test_flips_above_the_limit_are_refused_with_three(folder: Path, updates: dict[str, Path], tmp_path: Path) -> None:
    given = ("port", folder, "--language_model", updates["far"], *OLD_BASE, "--data.scenes", "val/12", "--out", tmp_path / "out")
    done = adalink(*given, "--most_negative_flips", "0.05")
    assert done.code == 3
    assert "items went from right to wrong" in done.err
    assert "and at most 5 % was allowed" in done.err
    assert "give a share from 0 to 1" in refused(adalink(*given, "--most_negative_flips", "2"))
    assert "give --old and --data" in refused(adalink("port", folder, "--language_model", updates["same"], "--most_negative_flips", "0.1", "--out", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_ends_with_two_and_leaves_nothing(folder: Path, updates: dict[str, Path], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "the new base is not given" in refused(adalink("port", folder, *out))
    assert "2 of " in (sentence := refused(adalink("port", folder, "--language_model", updates["permuted"], *OLD_BASE, *out)))
    assert f"token ids mean other words in {updates['permuted']} (first: 40 " in sentence
    assert "was trained with another tokenizer" in refused(adalink("port", folder, "--language_model", updates["permuted"], *out))
    assert "was trained on the language model scenes:language" in refused(adalink("port", folder, "--language_model", updates["same"], "--old", updates["further"], *out))
    assert "was trained on a composed model" in refused(adalink("port", folder, "--model", updates["same"], *out))
    assert list(tmp_path.iterdir()) == []


def test_a_lora_of_peft_is_ported_and_peft_loads_it(updates: dict[str, Path], tmp_path: Path) -> None:
    language = load_language(language_folder())
    model = AdaptedModel(language.model)
    torch.manual_seed(0)
    adapter = model.add_adapter("one", LoRA(rank=2, groups={"all": ("all",)}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    to_peft(adapter, model.base, tmp_path / "peft")
    given = ("port", tmp_path / "peft", "--language_model", updates["further"], "--out", tmp_path / "out")
    assert "give the model it was trained on (--old)" in refused(adalink(*given))
    assert "names no task, so --data cannot be scored" in refused(adalink(*given, *OLD_BASE, *DATA))
    assert not (tmp_path / "out").exists()
    done = adalink(*given, *OLD_BASE)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (tmp_path / "peft" / WEIGHTS_FILE).read_bytes()
    was, now = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "out"))
    assert now.pop("base_model_name_or_path") == str(updates["further"])
    was.pop("base_model_name_or_path")
    assert now == was
    ids = torch.arange(5, 25)[None]
    newer = load_language(updates["further"]).model
    with torch.no_grad():
        own = from_peft(tmp_path / "out", newer)
        theirs = PeftModel.from_pretrained(load_language(updates["further"]).model, tmp_path / "out").eval()(input_ids=ids).logits
        ours = AdaptedModel(newer)
        ours.add_adapter("one", own.methods).load_state_dict(own.state_dict())
        assert torch.allclose(ours(input_ids=ids).logits, theirs, atol=1e-5)


def test_answers_are_scored_too_and_a_model_that_sees_already_is_ported_whole(updates: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = trained_adapter(tmp_path, "vqa")
    done = adalink("port", folder, "--language_model", updates["further"], "--data.scenes", "val/4", *OLD_BASE, "--out", tmp_path / "out", "--accept", "true")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["scores"]
    assert found["metric"] == "accuracy"
    assert found["items"] == 20
    assert min(found["scores"][OLD], found["scores"][PORTED]) > found["scores"][ALONE]
    save_llava(tmp_path / "llava")
    model = frozen_model(Parts(model=str(tmp_path / "llava")), template=WORDS)
    model.add_adapter("default", AdaLink(rank=2, modalities=("image", "text")))
    with torch.no_grad():
        for parameter in model.adapted.active_adapter().parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    generation = {"max_new_tokens": 3, "num_beams": 1, "length_penalty": 1.0}
    model.save_pretrained(tmp_path / "seeing", task={"task": "captioning", "generation": generation})
    model.adapted.base.get_input_embeddings().weight.data.mul_(1.01)
    shutil.copytree(tmp_path / "llava", tmp_path / "newer")
    model.adapted.base.save_pretrained(tmp_path / "newer")
    given = ("port", tmp_path / "seeing", "--model", tmp_path / "newer", "--old", tmp_path / "llava", "--out", tmp_path / "ported")
    done = adalink(*given, "--data.scenes", "val/2", "--accept", "true")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "ported" / REPORT_FILE).read_text())
    assert [one["name"] for one in report["drift"] if one["relative"] > 1e-6] == ["model.language_model.embed_tokens.weight"]
    assert list(report["scores"]["scores"]) == [OLD, ALONE, PORTED]
