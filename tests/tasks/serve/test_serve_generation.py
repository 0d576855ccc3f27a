"""How the server generates: as the request says, else as the operator chose, else as the adapter's run did."""

from __future__ import annotations

from typing import Any

import pytest
from served import messages, photo

from multimodal.data.images.decode import decode_image
from multimodal.generation.generate import GenerationChoice, GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.scenes import encoder_folder, language_folder
from tasks.serve.request import Card, Reader
from tasks.serve.schema import ChatRequest
from tasks.serve.settings import RequestLimits, ServeSettings
from tasks.vqa import Vqa


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    model = VisionLanguageModel.compose(encoder_folder(), language_folder(), template=Vqa().template)
    model.adapted.tasks["beams"] = {"task": "vqa", "generation": {"max_new_tokens": 9, "num_beams": 4, "length_penalty": 0.5}}
    return model


@pytest.mark.parametrize(
    ("adapter", "operator", "request_", "expected"),
    [
        ("beams", {}, {}, (9, 4, 0.5)),
        ("old", {}, {}, (30, 1, 1.0)),  # saved before adapters said how they were used
        ("beams", {"num_beams": 2}, {}, (9, 2, 0.5)),
        ("beams", {"num_beams": 2}, {"num_beams": 3, "max_tokens": 7, "length_penalty": 2.0}, (7, 3, 2.0)),
        ("beams", {}, {"temperature": 0.5}, (9, 1, 0.5)),
    ],
)
def test_the_request_the_operator_and_the_adapter_say_how(
    model: VisionLanguageModel, adapter: str, operator: dict[str, Any], request_: dict[str, Any], expected: tuple[int, int, float]
) -> None:
    reader = Reader(model, RequestLimits(), ServeSettings(generation=GenerationChoice(**operator)).generation, model.tower.preprocess, features=lambda _: None, decode=decode_image)
    card = Card(adapter, "vqa", model.row_encoder("__base__"))
    ask = reader.question(ChatRequest.model_validate({"model": adapter, "messages": messages("is it?", photo(0)), **request_}), card)
    assert ask.settings == GenerationSettings(max_new_tokens=expected[0], num_beams=expected[1], length_penalty=expected[2])


def test_what_an_adapter_says_is_cut_to_the_limits(model: VisionLanguageModel) -> None:
    reader = Reader(model, RequestLimits(new_tokens=5, beams=2), GenerationChoice(), model.tower.preprocess, features=lambda _: None, decode=decode_image)
    ask = reader.question(ChatRequest.model_validate({"model": "beams", "messages": messages("is it?", photo(0))}), Card("beams", "vqa", model.row_encoder("__base__")))
    assert ask.settings == GenerationSettings(max_new_tokens=5, num_beams=2, length_penalty=0.5)
