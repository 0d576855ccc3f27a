"""Slots of models that see already: after the images, and before the answer, each row as it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from existing_checks import TEXTS, check_same, families
from existing_families import images, made
from sharing import excite, in_double

from adalink import ANSWER, IMAGE, PROMPT, TEXT, WARP, AdaLink, Prompt
from adalink.edit import SlotPlace
from adalink.errors import ConfigError
from multimodal.batches.collate import collate, stacked
from multimodal.batches.packing import arrangement_of, separate_rows
from multimodal.model import VisionLanguageModel
from multimodal.template import Template


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def model_of(name: str, at: SlotPlace) -> VisionLanguageModel:
    model = VisionLanguageModel.from_model(*made(name), template=Template(prompt="<image>{question}", target="{text}"))
    methods: Any = {"prompt": Prompt(length=2, at=at, init_std=0.5), "adalink": AdaLink(rank=2, modalities=("text", "image"))}
    excite(model.add_adapter("one", methods).double())
    return model.eval()


@pytest.mark.parametrize("at", ["before_text", "after_text"])
@pytest.mark.parametrize("name", families(["qwen2_vl", "llava", "gemma3", "paligemma"]))
def test_shared_rows_learn_and_padded_rows_write_what_each_row_does_alone(name: str, at: SlotPlace) -> None:
    model = model_of(name, at)
    prepared: Any = [model.tower.preprocess(image) for image in images()[:2]]
    encoder = model.row_encoder()
    rows = [[encoder.row(text, one) for text in TEXTS] for one in prepared]
    row = rows[0][1]
    kinds = [kind for i, kind in enumerate(row.domain) if i == 0 or row.domain[i - 1] != kind]
    before = kinds[: kinds.index(PROMPT)]
    assert before[-1] == (IMAGE if at == "before_text" else TEXT)
    assert kinds[kinds.index(PROMPT) + 1 :] == ([TEXT, ANSWER] if at == "before_text" else [ANSWER])
    found = []
    for arrange in (separate_rows, arrangement_of(model)[0]):
        arranged = [list(arrange(one)) for one in rows]
        flat, about = [row for one in arranged for row in one], [i for i, one in enumerate(arranged) for _ in one]
        loss = model(collate(flat, about, stacked(prepared), kind="pixels", side="right", pad_id=encoder.tokenizer.pad_token_id))
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.adapted.active_adapter().parameters()))])
    check_same(found[1], found[0])
    questions = [text.question for text in TEXTS[:2]]
    together = model.generate(list(images()[:2]), questions, max_new_tokens=4)
    assert together == [model.generate([image], [question], max_new_tokens=4)[0] for image, question in zip(images()[:2], questions, strict=True)]


def test_a_list_of_answers_is_not_read_from_such_a_model() -> None:
    model = VisionLanguageModel.from_model(*made("llava"), template=Template(prompt="<image>{question}", target="{text}"))
    model.add_adapter("one", WARP(after_text=1)).double()
    with pytest.raises(ConfigError, match="the adapter one answers from a list and writes nothing"):
        model.generate([images()[0]], ["what?"])
    with pytest.raises(ConfigError, match="this is for models composed of an encoder and a language model"):
        model.add_answer_head(("yes", "no"))
