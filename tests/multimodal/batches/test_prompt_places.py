"""Slots between image and words and before the answer: packed, forked, joined and padded rows learn what each text alone learns, and generate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from composed import excite, language
from PIL import Image
from sharing import check_equal
from torch import Tensor

from adalink import IMAGE, PROMPT, TEXT, Bridge, DePT, Method, Prompt, TokenMap
from multimodal.batches.collate import Batch, collate
from multimodal.batches.packing import fork_rows, joined_rows, pack_rows, separate_rows
from multimodal.batches.tokenize import Row
from multimodal.encoders.tower import load_tower
from multimodal.generation.settings import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text
from tasks.scenes.parts import encoder_folder

PHOTOS = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
TEXTS = [[Text("is it red ?", "yes"), Text("is it a big cube ?", "no it is"), Text("is it red ?", "no")], [Text("a ball ?", "yes yes")]]
AT: dict[str, Method] = {
    "before_text": Prompt(length=2, at="before_text", init_std=0.5),
    "after_text": Prompt(length=2, at="after_text", init_std=0.5),
    "dept": DePT(length=2, rank=2, max_length=6, modalities=("text", "image"), init_std=0.5),
}


def model_of(method: Method, family: str = "opt") -> VisionLanguageModel:
    model = VisionLanguageModel(load_tower(encoder_folder()), language(family), Template(prompt="<image><bos>question: {question} answer:"))
    excite(model.add_adapter("one", {"bridge": Bridge(kind="linear"), "method": method}).double())
    return model


def batch_of(model: VisionLanguageModel, arrange: Callable[[Sequence[Row]], Sequence[Row]], row_tokens: int = 0) -> Batch:
    arranged = [list(arrange([model.row_encoder().row(text) for text in texts])) for texts in TEXTS]
    rows, image = [row for one in arranged for row in one], [i for i, one in enumerate(arranged) for _ in one]
    if row_tokens:
        rows, image = joined_rows(rows, image, row_tokens)
    pixels = torch.stack([model.vision_tower.preprocess(photo) for photo in PHOTOS])
    return collate(rows, image, pixels, kind="pixels", side="right", pad_id=0)


def learnt(model: VisionLanguageModel, batch: Batch) -> list[Tensor]:
    loss = model(batch)
    adapter = model.adapted.active_adapter()
    return [loss.detach(), *torch.autograd.grad(loss, [*adapter.get_submodule("method").parameters()])]


@pytest.mark.parametrize("at", AT)
def test_packed_and_forked_rows_learn_what_each_text_alone_does(at: str) -> None:
    model = model_of(AT[at])
    alone = learnt(model, batch_of(model, separate_rows))
    for arrange, row_tokens in ((pack_rows, 0), (pack_rows, 300), (fork_rows, 0)):
        batch = batch_of(model, arrange, row_tokens)
        assert (batch.segment is None) == (arrange is fork_rows)
        check_equal(learnt(model, batch), alone)


def test_the_ordinals_of_each_text_go_on_from_what_the_texts_share() -> None:
    domain = torch.tensor([[PROMPT, IMAGE, TEXT, TEXT, PROMPT, TEXT, PROMPT, PROMPT], [TEXT] * 8])
    segment = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 0, 1, 1, 2]])
    entry = torch.tensor([[0] * 8, [1] * 4 + [2] * 4])
    ordinal = TokenMap(domain, torch.zeros(2, dtype=torch.int64), segment=segment, entry=entry).ordinal
    assert ordinal.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 2, 0, 1, 2, 1]]
    assert TokenMap(domain, torch.zeros(2, dtype=torch.int64), segment=torch.zeros_like(domain)).ordinal[1].tolist() == [*range(8)]


@pytest.mark.parametrize(("at", "family"), [("before_text", "gpt2"), ("after_text", "llama"), ("after_text", "t5"), ("dept", "opt")])
def test_a_row_generates_alone_what_it_does_in_a_batch_beside_other_adapters(at: str, family: str) -> None:
    model = model_of(AT[at], family)
    excite(model.add_adapter("two", {"bridge": Bridge(kind="linear"), "prompt": Prompt(length=3, init_std=0.5)}).double(), seed=4)
    questions, names = ["is it red ?", "is it a big cube ?", "a ?", "is it red ?"], ["one", "two", "one", "__base__"]
    images = [PHOTOS[i % 2] for i in range(4)]
    settings = GenerationSettings(max_new_tokens=5)
    together = model.generate(images, questions, adapter_names=names, settings=settings)
    for i in range(4):
        assert model.generate([images[i]], [questions[i]], adapter_names=[names[i]], settings=settings) == [together[i]]
    whole = GenerationSettings(max_new_tokens=5, num_beams=2)
    assert model.generate(images[:1], questions[:1], adapter_names=["one"], settings=whole)[0] == model.generate(
        images, questions, adapter_names=names, settings=whole
    )[0]


def test_slots_stand_before_the_words_that_follow_the_image_and_the_answer_is_predicted_by_the_last_of_them() -> None:
    found: dict[str, Row] = {at: model_of(AT[at]).row_encoder().row(TEXTS[0][1]) for at in ("before_text", "after_text")}
    kinds: dict[str, Any] = {at: [k for i, k in enumerate(row.domain) if i == 0 or row.domain[i - 1] != k] for at, row in found.items()}
    assert kinds == {"before_text": [IMAGE, PROMPT, TEXT, 1], "after_text": [IMAGE, TEXT, PROMPT, 1]}
    row = found["after_text"]
    assert row.domain[row.source[0]] == PROMPT
    assert row.domain[row.source[1]] == 1
