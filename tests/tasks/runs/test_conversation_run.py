"""Conversations are learnt and asked by a model that sees already; a composed model refuses what it cannot read before anything is trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_run import adalink
from safetensors.torch import load_file
from tiny_llava import save_llava

from adalink import AdaptedModel
from multimodal.model import saved_template
from tasks.scenes.dataset import Scenes
from tasks.vqa import AS_WRITTEN

QUICK = ("--train.steps", "4", "--train.batch_size", "3", "--train.measure_every", "0", "--generation.max_new_tokens", "2", "--train.bad_samples", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, images in images/, and the same conversations in LLaVA's layout and as messages; and captions as both and as a table."""
    root = tmp_path_factory.mktemp("conversations")
    save_llava(root / "llava", std=0.2)
    (root / "images" / "train").mkdir(parents=True)
    samples = [Scenes(split="train", size=6)[i] for i in range(6)]
    for sample in samples:
        (root / "images" / f"{sample.key}.png").write_bytes(sample.image)  # type: ignore[arg-type]
    names = [f"{sample.key}.png" for sample in samples]
    rows: list[tuple[list[str], list[tuple[str, str]]]] = []
    for name, sample in zip(names, samples, strict=True):
        (a, b, *_) = sample.questions
        rows.append(([name], [("system", "be brief"), ("user", f"<image>\n{a.text}"), ("assistant", a.answers[0]), ("user", b.text), ("assistant", b.answers[0])]))
    rows.insert(1, ([], [("user", "is there a circle?"), ("assistant", "no image, no circle")]))
    rows.append((names[:2], [("user", "<image> or\n<image>"), ("assistant", "the first"), ("user", "why?"), ("assistant", "it is red")]))
    rows.insert(0, ([], [("user", "what is red?"), ("assistant", "a color")]))
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    llava = [{"image": images, "conversations": [{"from": speakers[role], "value": text} for role, text in turns]} for images, turns in rows]
    messages = [{"images": images, "messages": [{"role": role, "content": text} for role, text in turns]} for images, turns in rows]
    captions = [(name, caption) for name, sample in zip(names, samples, strict=True) for caption in sample.captions[:2]]
    single = [{"image": name, "conversations": [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}]} for name, text in captions]
    (root / "llava.json").write_text(json.dumps(llava))
    (root / "messages.jsonl").write_text("\n".join(map(json.dumps, messages)))
    (root / "captions.json").write_text(json.dumps(single))
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *captions])
    return root


def trained(folder: Path, out: Path, task: str, data: str, *more: str) -> tuple[dict[str, torch.Tensor], Any, str]:
    """The adapter's weights, the predictions, and what was logged."""
    methods = ("--methods.adalink", "{rank: 4, modalities: [image, text]}", "--methods.lora", "{groups: {all: [all]}, rank: 2}")
    place = yaml.safe_dump({"path": str(folder / data), "images": str(folder / "images")}, default_flow_style=True).strip()
    done = adalink("train", "--task", task, "--model", folder / "llava", "--out", out, *methods, "--data.train", place, "--data.val", place, *QUICK, *more)
    assert done.code == 0, done.err
    return load_file(out / "adapter" / "adapter_model.safetensors"), json.loads((out / "results.json").read_text()), done.err


def test_turns_several_images_and_none_are_learnt_and_asked_with_cached_features_or_without(folder: Path, tmp_path: Path) -> None:
    first, answers, log = trained(folder, tmp_path / "llava", "vqa", "llava.json", "--train.features", "encode")
    assert "7 images in 9 rows, 1 of them with several images, 2 of them with no image, 7 of them with earlier turns" in log
    assert len(answers) == 6 * 2 + 2 + 2
    assert saved_template(AdaptedModel.read_config(tmp_path / "llava" / "adapter").task) == AS_WRITTEN
    cached = ("--features", str(tmp_path / "features"), "--features_dtype", "float32", "--train.features", "fill")
    second, again, _ = trained(folder, tmp_path / "messages", "vqa", "messages.jsonl", *cached)
    assert answers == again
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)


def test_conversations_of_one_exchange_are_captions_and_train_as_a_table_of_them_does(folder: Path, tmp_path: Path) -> None:
    first, captions, _ = trained(folder, tmp_path / "llava", "captioning", "captions.json")
    second, again, _ = trained(folder, tmp_path / "table", "captioning", "captions.csv")
    assert captions == again
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_composed_model_refuses_conversations_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    parts = ("--encoder", "scenes:encoder", "--language_model", "scenes:language", "--methods.lora", "{}", "--methods.bridge", "{kind: linear}")
    data = ("--data.train", folder / "messages.jsonl", "--data.train.images", folder / "images", "--data.val.scenes", "val/2")
    for more in (("--out", tmp_path / "run"), ("--dry_run",)):
        done = adalink("train", "--task", "vqa", *parts, *data, *more)
        assert (done.code, done.err.count("Traceback")) == (2, 0)
        assert done.err.splitlines()[-1].endswith(
            "data.train has 1 row with several images and 2 rows with no image and 7 rows with earlier turns, and a model of the encoder scenes:encoder and the "
            "language model scenes:language reads one image and one question: train one that sees already (model: NAME), or leave these rows out"
        )
