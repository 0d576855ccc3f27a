"""What models that see already write here is what their own generation writes; rows of several adapters, beams and a cache change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from existing_checks import QUESTIONS, case, families
from existing_families import images
from sharing import in_double

from multimodal.batches.collate import collate, stacked
from multimodal.generation.generate import run_generation
from multimodal.generation.settings import GenerationSettings


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", families(["gemma3", "blip2"]))
def test_the_bare_model_writes_what_its_own_generation_writes(name: str, beams: int) -> None:
    made = case(name)
    ends = list(made.vlm.language.end_ids)
    own = []
    for image, question in zip(images(), QUESTIONS, strict=True):
        asked = made.native(image, question)
        ids = made.model.generate(**asked, max_new_tokens=6, do_sample=False, num_beams=beams, length_penalty=1.0, pad_token_id=0, eos_token_id=ends)[0]
        prompt = asked["input_ids"][0]
        new = ids[len(prompt) :] if torch.equal(ids[: len(prompt)], prompt) else ids  # BLIP-2's has what is new alone
        own.append(made.processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    with made.vlm.disable_adapter():
        assert made.vlm.generate(images(), QUESTIONS, max_new_tokens=6, num_beams=beams) == own
    assert any(own)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", families(["qwen3_vl", "paligemma2"]))
def test_rows_of_several_adapters_and_images_write_what_each_writes_alone(name: str, beams: int) -> None:
    made = case(name)
    adapters = ["image", "text", "__base__"]
    together = made.vlm.generate(images(), QUESTIONS, adapter_names=adapters, max_new_tokens=6, num_beams=beams)
    rows = list(zip(images(), QUESTIONS, adapters, strict=True))
    assert together == [made.vlm.generate(image, one, adapter_names=[adapter], max_new_tokens=6, num_beams=beams)[0] for image, one, adapter in rows]


@pytest.mark.parametrize("name", families(["paligemma", "gemma3"]))
def test_questions_that_share_an_image_write_what_each_writes_alone_and_without_a_cache(name: str) -> None:
    made = case(name)
    image = images()[0]
    together = made.vlm.generate(image, QUESTIONS, max_new_tokens=6)
    assert together == [made.vlm.generate(image, one, max_new_tokens=6)[0] for one in QUESTIONS]
    assert together == _uncached(name)


def _uncached(name: str) -> list[str]:
    """By transformers' generation, which reads the whole row for every token."""
    made = case(name)
    encoder, prepared = made.vlm.row_encoder(), made.prepared[0]
    rows = [encoder.prompt(question, prepared) for question in QUESTIONS]
    batch = collate(rows, [0, 0, 0], stacked([prepared]), kind="pixels", side="left", pad_id=0)
    with torch.no_grad(), made.vlm.adapted.attachment.bind(made.vlm.token_map(batch)):
        ids = run_generation(made.vlm.language, batch, GenerationSettings(max_new_tokens=6), use_cache=False)
    return [text.strip() for text in made.processor.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)]
