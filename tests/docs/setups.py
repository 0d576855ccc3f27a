"""What pages expect to be there: images with texts, datasets in the official formats, trained runs, a tiny vision-language model with its processor."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from blocks import ROOT, blocks
from made_clips import frame_folder, grey_frames
from saved_clips import save_clips

from multimodal.sample import Sample
from tasks.cli import main
from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder, language_folder

# What stands in the place of names of models on a hub (the embedded models, and what `llava` makes), and of many scenes.
PARTS = {
    "timm:vit_base_patch16_224.augreg_in21k": str(encoder_folder()),
    "facebook/opt-125m": str(language_folder()),
    "llava-hf/llava-1.5-7b-hf": "llava",
    "facebook/timesformer-base-finetuned-k600": "timesformer",
    "train/1600": "train/4",
    "val/200": "val/3",
}
SHORT = ("--generation.max_new_tokens", "6")
# Command, or module of `python -m` -> what a test adds to it.
QUICK = {
    "train": ("--train.steps", "1", "--train.log_every", "1", *SHORT), "evaluate": SHORT, "tasks.scenes.model": ("--images", "2", "--epochs", "1"),
}  # fmt: skip


def photos() -> None:
    """photos/train and photos/val: images, each with its captions in a text file of the same name."""
    for split in ("train", "val"):
        folder = Path("photos", split)
        folder.mkdir(parents=True)
        for sample in _samples(split):
            (folder / f"{sample.image_id}.png").write_bytes(sample.image)  # type: ignore[arg-type]
            (folder / f"{sample.image_id}.txt").write_text("\n".join(sample.captions) + "\n")
    for name, sample in zip(("cat.jpg", "photo.jpg", "dog.jpg"), _samples("val"), strict=False):
        Path(name).write_bytes(sample.image)  # type: ignore[arg-type]


def tutorial() -> None:
    """photos, and photos.yaml as the captioning tutorial has it."""
    photos()
    (text,) = (block.text for block in blocks(ROOT / "examples/docs/tutorials/captions.md") if block.comments.get("file") == "photos.yaml")
    Path("photos.yaml").write_text(replaced(text, PARTS))


def tables() -> None:
    """captions.csv: a row for each caption of the images in photos."""
    with Path("captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        rows.writerows((path.relative_to("photos").with_suffix(".png"), line) for path in sorted(Path("photos/train").glob("*.txt")) for line in path.open())


def conversations() -> None:
    """llava_train.json and llava_val.json: conversations about images of photos, some without one, in LLaVA's layout; and the folder llava."""
    llava()
    for split in ("train", "val"):
        rows: list[dict[str, Any]] = [{"conversations": _exchanges([("hello?", "hello!")])}]
        for sample in _samples(split):
            asked = [(question.text, question.answers[0]) for question in sample.questions[:2]]
            rows.append({"image": f"{split}/{sample.image_id}.png", "conversations": _exchanges([(f"<image>\n{asked[0][0]}", asked[0][1]), *asked[1:]])})
        _write(f"llava_{split}.json", rows)


def _exchanges(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": name, "value": text} for pair in pairs for name, text in zip(("human", "gpt"), pair, strict=True)]


def coco() -> None:
    """COCO's and VQAv2's files, by their official names, of a few images in coco/."""
    for split, name in (("train", "train2014"), ("val", "val2014")):
        folder = Path("coco", name)
        folder.mkdir(parents=True)
        samples = _samples(split)
        for sample in samples:
            (folder / f"COCO_{name}_{sample.image_id:012d}.jpg").write_bytes(sample.image)  # type: ignore[arg-type]
        images = [{"id": s.image_id, "file_name": f"COCO_{name}_{s.image_id:012d}.jpg"} for s in samples]
        captions = [{"id": s.image_id * 10 + k, "image_id": s.image_id, "caption": text} for s in samples for k, text in enumerate(s.captions)]
        _write(f"coco/captions_{name}.json", {"images": images, "annotations": captions})
        asked = [(sample, question) for sample in samples for question in sample.questions]
        about = {"data_type": "mscoco", "data_subtype": name}
        questions = [{"question_id": q.question_id, "image_id": s.image_id, "question": q.text} for s, q in asked]
        _write(f"coco/v2_OpenEnded_mscoco_{name}_questions.json", {**about, "questions": questions})
        answers = [
            {
                "question_id": q.question_id, "image_id": s.image_id, "question_type": q.question_type, "answer_type": q.answer_type,
                "multiple_choice_answer": q.answers[0], "answers": [{"answer": text, "answer_id": k} for k, text in enumerate(q.answers, 1)],
            }
            for s, q in asked
        ]  # fmt: skip
        _write(f"coco/v2_mscoco_{name}_annotations.json", {**about, "annotations": answers})


def clips() -> None:
    """clips: folders of frames, with their captions in train.json and val.json; and the folder timesformer."""
    save_clips("timesformer", Path("timesformer"))
    for split, images in (("train", range(4)), ("val", range(4, 6))):
        for i in images:
            frame_folder(Path("clips", f"{i}"), grey_frames([20 * i + 10 * t for t in range(9)]))
        rows = {"images": [{"id": i, "video": f"{i}"} for i in images], "annotations": [{"id": i, "image_id": i, "caption": "a light goes on"} for i in images]}
        _write(f"clips/{split}.json", rows)


def trained() -> None:
    """runs/first and runs/vqa, trained for a step, and images to ask about."""
    shutil.copytree(_runs(), "runs")
    if not Path("photos").exists():
        photos()


def llava() -> None:
    """A tiny LLaVA with its processor, in the folder llava."""
    from tiny_llava import save_llava

    save_llava(Path("llava"))


SETUPS: dict[str, Callable[[], None]] = {made.__name__: made for made in (photos, tutorial, tables, conversations, coco, clips, trained, llava)}


def replaced(text: str, names: Mapping[str, str]) -> str:
    """The text with other names in place of some."""
    for name, other in names.items():
        text = text.replace(name, other)
    return text


@cache
def _runs() -> Path:
    """Trained once for all pages."""
    runs = Path(mkdtemp())
    for task, name in (("captioning", "first"), ("vqa", "vqa")):
        arguments = ["train", "--config", str(ROOT / "tasks" / "scenes" / f"{task}.yaml"), "--out", str(runs / name), *QUICK["train"]]
        arguments += ["--encoder", str(encoder_folder()), "--language_model", str(language_folder())]
        assert main([*arguments, "--data.train", "{scenes: train/6}", "--data.val.scenes", "val/3"]) == 0
    return runs


def _samples(split: Any) -> list[Sample]:
    return [Scenes(split=split, size=6)[i] for i in range(6)]


def _write(path: str, content: object) -> None:
    Path(path).write_text(json.dumps(content))
