"""`adalink materialise`: one task's adapter of a hypernetwork, as a folder that every command reads; what is refused leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_run import adalink, refused
from scenes_adapters import moved_adapter

from adalink import Hyper
from adalink.methods.bridge import Bridge
from adalink.methods.lora import LoRA
from multimodal.data.images.decode import decode_image
from multimodal.generation.settings import GenerationSettings
from tasks.runs.compose import load_adapted
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa

TASKS = ("how many", "what color is the", "where is the")
QUESTIONS = ("how many circles are there?", "what color is the square?", "where is the circle?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bridge = Bridge(kind="mlp", hidden=32, init_scale=8.0)
    return moved_adapter(tmp_path_factory.mktemp("run") / "adapter", {"bridge": bridge, "hyper": Hyper(prototypes=TASKS, width=4, size=8)}, Vqa())


def test_a_tasks_folder_answers_as_the_whole_adapter_does_where_its_prototype_is_the_nearest(folder: Path, tmp_path: Path) -> None:
    whole, _ = load_adapted(folder)
    tasks = whole.adapted.active_adapter().get_submodule("hyper.tasks")
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(QUESTIONS) + "\n")
    done = adalink("materialise", "--adapter", folder, "--questions", questions, "--nearest", "true", "--out", tmp_path / "near")
    assert done.code == 0, done.err
    nearest = done.out.splitlines()[0].removeprefix("the nearest task to 3 questions is ")
    assert nearest in TASKS
    for name in (nearest, "made"):
        out = tmp_path / name
        given = ("--task", name) if name != "made" else ("--questions", questions)
        done = adalink("materialise", "--adapter", folder, *given, "--out", out)
        assert done.code == 0, done.err
    plain = {name: load_adapted(tmp_path / name)[0] for name in ("near", nearest, "made")}
    assert list(plain["near"].adapted.active_adapter().methods) == ["bridge", "bottleneck"]
    tensors = {name: model.adapted.active_adapter().tensors() for name, model in plain.items()}
    assert all(torch.equal(value, tensors[nearest][name]) for name, value in tensors["near"].items())
    assert not torch.equal(tensors["made"]["bottleneck.0.up.weight"], tensors["near"]["bottleneck.0.up.weight"])
    image = decode_image(Scenes(split="val", size=1)[0].images[0])
    with torch.no_grad():  # every row's words then find this task
        tasks.prototypes[:] = tasks.prototypes[TASKS.index(nearest)].clone()
    settings = GenerationSettings(max_new_tokens=6)
    assert whole.eval().generate(image, list(QUESTIONS), settings=settings) == plain["near"].eval().generate(image, list(QUESTIONS), settings=settings)


def test_what_cannot_be_made_is_refused_in_a_sentence_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "give one of --task NAME and --questions FILE" in refused(adalink("materialise", "--adapter", folder, "--out", out))
    assert "has no task 'taste': give one of how many, what color is the, where is the" in refused(adalink("materialise", "--adapter", folder, "--task", "taste", "--out", out))
    assert "cannot be read" in refused(adalink("materialise", "--adapter", folder, "--questions", tmp_path / "none.txt", "--out", out))
    other = moved_adapter(tmp_path / "lora", {"bridge": Bridge(kind="linear"), "lora": LoRA(rank=2, alpha=2.0, groups={"all": ("all",)})}, Vqa())
    assert "the adapter has the methods bridge, lora, and hyper alone makes adapters of tasks" in refused(adalink("materialise", "--adapter", other, "--task", "a", "--out", out))
    assert not out.exists()
