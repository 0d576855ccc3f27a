"""Asking about every image: each item once, its own image with it, and what is bad counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_run import Files

from adalink import Bridge
from adalink.errors import DataError
from multimodal.data.feature_cache.encode import PatchTable, encode_all
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample
from tasks.captioning import Captioning
from tasks.data.coco import read_coco_captions
from tasks.data.sources import Opened
from tasks.evaluation.evaluate import predict, read_images
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa

FEW = GenerationSettings(max_new_tokens=6)
SOURCE = Scenes(split="val", size=5)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    model = compose("scenes:encoder", "scenes:language", template=Vqa().template)
    adapter = model.add_adapter("one", {"bridge": Bridge(kind="linear")})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@pytest.fixture(scope="module")
def patches(model: VisionLanguageModel) -> PatchTable:
    return encode_all(model, SOURCE)


def test_every_item_is_answered_once_in_the_order_of_the_data(model: VisionLanguageModel, patches: PatchTable) -> None:
    found = predict(model, SOURCE, Vqa(), patches, settings=FEW)
    assert list(found.texts) == [question.question_id for i in range(5) for question in SOURCE[i].questions]
    assert found.bad == ()
    assert list(predict(model, SOURCE, Captioning(), patches, settings=FEW).texts) == [SOURCE[i].image_id for i in range(5)]


def test_a_picture_is_read_once_for_all_its_questions(model: VisionLanguageModel, patches: PatchTable) -> None:
    read: list[int] = []
    stack = model.adapted.attachment.stack
    handle = stack.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    predict(model, SOURCE, Vqa(), patches, settings=GenerationSettings(max_new_tokens=1))
    handle.remove()
    n_questions = sum(len(SOURCE[i].questions) for i in range(5))
    assert n_questions > 10
    assert sum(read) < 0.6 * n_questions * model.tower.n_patches  # less than the image's own tokens for each question


def test_the_batch_size_does_not_matter(model: VisionLanguageModel, patches: PatchTable) -> None:
    whole = predict(model, SOURCE, Vqa(), patches, settings=FEW)
    assert predict(model, SOURCE, Vqa(), patches, settings=FEW, batch_size=3).texts == whole.texts
    assert len(set(whole.texts.values())) > 3  # the control: answers differ


def test_the_answers_are_those_of_the_model_asked_directly(model: VisionLanguageModel, patches: PatchTable) -> None:
    from multimodal.data.images.decode import decode_image

    found = predict(model, SOURCE, Vqa(), patches, settings=FEW)
    sample = SOURCE[3]
    images = [decode_image(sample.image)] * len(sample.questions)
    direct = model.generate(images, [question.text for question in sample.questions], settings=FEW)
    assert [found.texts[question.question_id] for question in sample.questions] == direct


def test_the_blind_control_is_shown_another_picture(model: VisionLanguageModel, patches: PatchTable) -> None:
    shifted = predict(model, SOURCE, Vqa(), patches, settings=FEW, shift=2)
    moved = PatchTable(patches.patches[[2, 3, 4, 0, 1]], {})
    assert shifted.texts == predict(model, SOURCE, Vqa(), moved, settings=FEW).texts
    assert shifted.texts != predict(model, SOURCE, Vqa(), patches, settings=FEW).texts


def test_pictures_without_features_are_not_asked_about(model: VisionLanguageModel, patches: PatchTable) -> None:
    bad = BadSample(key="x", reason="corrupt")
    found = predict(model, SOURCE, Captioning(), PatchTable(patches.patches, {2: bad}), settings=FEW)
    assert SOURCE[2].image_id not in found.texts
    assert len(found.texts) == 4
    assert found.bad == (bad,)


def test_what_cannot_be_read_is_left_out_of_the_source(model: VisionLanguageModel, tmp_path: Path) -> None:
    files = Files(tmp_path / "files", n=4)
    files.image(1).unlink()
    files.image(2).write_bytes(b"no image")
    source = read_coco_captions(images=files.folder / "pictures", annotations=files.folder / "captions.json")
    images = read_images(Opened(source, source.problems), encode_all(model, source))
    assert [images.source[i].image_id for i in range(len(images.source))] == [0, 3]
    assert len(images.patches) == 2
    assert {bad.key: bad.reason for bad in images.bad} == {"1": "missing file", "2": "not an image"}
    with pytest.raises(IndexError, match="index 2 is outside of these 2 samples"):
        images.source[2]
    for i in (0, 3):
        files.image(i).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 3 images can be used: .*1.png is missing"):
        read_images(Opened(source, source.problems), encode_all(model, source))


def test_a_whole_data_set_is_left_as_it_is(model: VisionLanguageModel) -> None:
    images = read_images(Opened(SOURCE, ()), encode_all(model, SOURCE))
    assert images.source is SOURCE
    assert images.bad == ()
