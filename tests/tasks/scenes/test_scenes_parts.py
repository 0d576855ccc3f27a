"""The two frozen parts of scenes: the files that were trained, loadable, good at their own trade, and strangers to one another."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tasks.metrics.captions import score_captions
from tasks.metrics.vqa import GradedQuestion, score_answers
from tasks.scenes import Scenes, encoder_folder, language_folder
from tasks.scenes.scene import COLOURS, SHAPES, Scene
from tasks.scenes.train_parts import hash_files, make_tokenizer

PARTS = encoder_folder().parent
N = 120


@pytest.fixture(scope="module")
def val() -> Scenes:
    return Scenes(split="val", size=1000)


@pytest.fixture(scope="module")
def features(val: Scenes) -> Tensor:
    """float32 [300, 37, 128]: the class token and the patches of the first images."""
    import timm  # after the package, which makes torchvision importable
    from timm.data import create_transform, resolve_model_data_config

    encoder = timm.create_model(f"local-dir:{encoder_folder()}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(encoder), is_training=False)
    images = [val[i].image for i in range(300)]
    pixels = torch.stack([transform(Image.open(io.BytesIO(p))) for p in images if isinstance(p, bytes)])
    with torch.no_grad():
        return torch.cat([encoder.forward_features(part) for part in pixels.split(100)])


def test_the_shipped_files_are_those_that_were_trained() -> None:
    assert hash_files(PARTS) == (PARTS / "SHA256SUMS").read_text()
    assert {"encoder/config.json", "encoder/model.safetensors", "language/model.safetensors", "language/tokenizer.json"} <= {
        line.split()[1] for line in hash_files(PARTS).splitlines()
    }


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    for part in ("encoder", "language"):
        shutil.copytree(PARTS / part, tmp_path / part)
    path = tmp_path / "language" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    wrong = set(hash_files(tmp_path).splitlines()) - set((PARTS / "SHA256SUMS").read_text().splitlines())
    assert [line.split()[1] for line in wrong] == ["language/model.safetensors"]


def test_both_parts_are_below_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in PARTS.rglob("*") if path.is_file()) < 8_000_000


def test_the_encoder_gives_a_class_token_and_a_feature_for_each_patch(features: Tensor) -> None:
    assert features.shape == (300, 37, 128)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


def _centres(scene: Scene) -> list[int]:
    return [1 + t.y // 16 * 6 + t.x // 16 for t in scene.things]  # the class token comes first


def _linear_accuracy(inputs: Tensor, classes: list[int]) -> float:
    """A least-squares reader, fitted on the first three quarters and tried on the rest."""
    n = len(inputs) * 3 // 4
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    targets = torch.nn.functional.one_hot(torch.tensor(classes)).double()
    weights = torch.linalg.solve(inputs[:n].T @ inputs[:n] + torch.eye(inputs.shape[1]), inputs[:n].T @ targets[:n])
    return (inputs[n:] @ weights).argmax(1).eq(targets[n:].argmax(1)).double().mean().item()


@pytest.mark.parametrize(("attribute", "names"), [("shape", list(SHAPES)), ("colour", list(COLOURS))])
def test_a_linear_reader_finds_shape_and_colour_in_the_patch_of_an_object(val: Scenes, features: Tensor, attribute: str, names: list[str]) -> None:
    scenes = [val.scene(i) for i in range(len(features))]
    inputs = torch.cat([feature[_centres(scene)] for scene, feature in zip(scenes, features, strict=True)])
    classes = [names.index(getattr(thing, attribute)) for scene in scenes for thing in scene.things]
    assert _linear_accuracy(inputs, classes) > 0.9
    assert _linear_accuracy(inputs[torch.randperm(len(inputs))], classes) < 0.25  # the reader itself knows nothing


def test_the_tokenizer_is_made_from_text_alone_and_adds_no_tokens_of_its_own() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_folder())
    text = "a red star and two circles on the grass."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids).strip() == text
    assert len(ids) == len(text.split()) + 1  # each word is a token, and the full stop
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>", "<pad>")
    strange = "Où est l'étoile — 星?"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]).strip() == strange.lower()
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()


def _log(prompts: list[str], n: int) -> list[str]:
    """What the language model says after each prompt, greedily, with no image."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(language_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_folder(), padding_side="left")
    batch = tokenizer([tokenizer.eos_token + prompt for prompt in prompts], return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=n, do_sample=False)[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def test_the_language_model_alone_answers_little_more_than_chance(val: Scenes) -> None:
    questions = [question for i in range(N) for question in val[i].questions]
    stated = _log([f"question: {question.text} answer:" for question in questions], 4)
    graded = [
        GradedQuestion(question_id=q.question_id, answers=q.answers, question_type=q.question_type, answer_type=q.answer_type) for q in questions
    ]
    scores = score_answers({q.question_id: answer for q, answer in zip(questions, stated, strict=True)}, graded)
    assert scores.overall < 45
    assert scores.per_answer_type["other"] < 25
    # It knows what kind of answer a question wants: its answers are of those that people give.
    given = {answer for question in questions for answer in question.answers}
    assert sum(answer in given for answer in stated) > 0.95 * len(stated)


def test_the_language_model_alone_captions_every_picture_alike_and_badly(val: Scenes) -> None:
    caption = "a " + _log([" a"], 30)[0]
    references = {i: val[i].captions for i in range(N)}
    assert score_captions(dict.fromkeys(references, caption), references).corpus["CIDEr"] < 0.4
    assert Counter(caption)["."] == 1
