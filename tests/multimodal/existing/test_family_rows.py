"""Rows of models that see already are what their own processor makes of the same conversation, and their call with vectors is their own call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from existing_checks import MADE_WAYS, NEED_IMAGES, ONE_IMAGE, READ_RAW, TEXTS, case, families
from existing_families import MADE, images, instructblip
from sharing import in_double

from adalink.errors import ConfigError, DataError
from multimodal.batches.collate import collate, stacked
from multimodal.batches.prefix_sharing import calls_of
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, Text

KINDS = ("token_type_ids", "mm_token_type_ids")


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


@pytest.mark.parametrize("name", MADE)
def test_rows_have_the_ids_and_types_of_the_processor(name: str) -> None:
    made = case(name)
    encoder = made.vlm.row_encoder()
    counts = set()
    for image, prepared in zip([*images(), None], [*made.prepared, None], strict=True):
        if image is None and name in NEED_IMAGES:
            with pytest.raises(DataError, match=r"does not take the text .* with 0 images: `images` are expected"):
                encoder.prompt("no?", None)
            continue
        for text in TEXTS[:2]:
            native, asked = made.native(image, text.question, text.target), made.native(image, text.question)
            row, prompt = encoder.row(text, prepared), encoder.prompt(text.question, prepared)
            whole = [*row.ids, row.target[-1]]
            wanted = native["input_ids"][0].tolist()
            assert whole == wanted[: len(whole)]
            assert whole[-1] in encoder.end_ids
            assert list(prompt.ids) == asked["input_ids"][0].tolist()
            for found, wanted in ((row, native), (prompt, asked)):
                kinds = next((wanted[kind][0].tolist() for kind in KINDS if kind in wanted), None)
                assert kinds is None or list(found.kind) == kinds[: len(found.kind)]
        counts.add(0 if prepared is None else prepared.n_vectors)
    assert len(counts) > (1 if name in NEED_IMAGES else 2) or name in ("llava", "gemma3", "blip2", "idefics2", "paligemma", "paligemma2")  # images of unlike sizes


def test_the_prompt_of_several_texts_is_worded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("llava")
    encoder, (first, second, _) = made.vlm.row_encoder(), made.prepared
    called, real = [], encoder.processor._ids
    monkeypatch.setattr(encoder.processor, "_ids", lambda text, images, *, ends: called.append(ends) or real(text, images, ends=ends))
    monkeypatch.setattr(encoder.processor, "_prompts", {})
    rows = [encoder.row(Text("what is it?", target), first) for target in ("red", "two", "no")]
    assert called.count(False) == 1
    assert len({row.ids for row in rows}) == 3
    assert encoder.prompt("what is it?", second).ids == encoder.prompt("what is it?", first).ids
    assert encoder.prompt("is it?", first).ids != encoder.prompt("what is it?", first).ids
    assert called.count(False) == 2


@pytest.mark.parametrize("name", MADE)
def test_what_is_exact_is_found_out(name: str) -> None:
    ways = case(name).vlm.ways
    assert ways is not None
    assert (ways.packs, ways.forks, case(name).vlm.tower.blocks) == MADE_WAYS[name]


@pytest.mark.parametrize("name", families(["llava_next", "qwen3_vl", "gemma3", "internvl", "blip2"]))
def test_the_frozen_model_gives_its_own_scores(name: str) -> None:
    made = case(name)
    encoder = made.vlm.row_encoder()
    for image, prepared in zip(images(), made.prepared, strict=True):
        native = made.native(image, TEXTS[1].question, TEXTS[1].target)
        batch = collate([encoder.row(TEXTS[1], prepared)], [0], stacked([prepared]), kind="pixels", side="right", pad_id=0)
        with torch.no_grad(), made.vlm.disable_adapter():
            wanted = made.model(**native).logits
            (call,) = calls_of(made.vlm.adapted, batch, made.vlm.token_map(batch, ["__base__"]))
            with call.bound(made.vlm.adapted):
                found = made.model(**call.arguments).logits
        torch.testing.assert_close(found, wanted[:, : found.shape[1]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", families(["llava_next", "qwen2_5_vl", "idefics3"]))
def test_vectors_of_images_together_are_those_of_each_alone(name: str) -> None:
    tower, prepared = case(name).vlm.tower, case(name).prepared
    together = tower.encode(stacked([*prepared, prepared[0]]))
    alone = [tower.encode(stacked([one]))[0] for one in prepared]
    for one, other in zip(together, [*alone, alone[0]], strict=True):
        assert one.vectors is not None
        assert len(one.vectors) == one.n_vectors
        torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", families(["qwen2_vl", "internvl"], of=[name for name in MADE if name not in ONE_IMAGE]))
def test_two_images_of_a_conversation_stand_where_the_processor_puts_them(name: str) -> None:
    made = case(name)
    both, processor = images()[:2], made.vlm.tower.processor
    prepared = processor.prepare(both)
    row = made.vlm.row_encoder().row(Text("how many?", "two"), prepared)
    native = made.native(both, "how many?", "two")
    assert list(row.ids) == native["input_ids"][0].tolist()[: len(row.ids)]
    assert [vector for vector in row.vector if vector >= 0] == list(range(prepared.n_vectors))
    assert prepared.n_vectors == sum(one.n_vectors for one in made.prepared[:2])


@pytest.mark.parametrize("name", families(["llava", "idefics3"], of=[name for name in MADE if name not in READ_RAW]))
def test_what_people_write_spells_no_token(name: str) -> None:
    """A question that spells an image's token, or the end of a turn, is letters; or it is refused in one sentence."""
    made = case(name)
    encoder = made.vlm.row_encoder()
    for spelling in {made.vlm.tower.processor.image_mark, made.processor.tokenizer.eos_token}:
        question = f"what is {spelling} here?"
        try:
            row = encoder.prompt(question, made.prepared[0])
        except DataError as error:
            assert "spells a token of the model's own" in str(error)  # noqa: PT017  (some processors cannot read it as letters)
            continue
        plain = encoder.prompt("what is here?", made.prepared[0])
        token = made.processor.tokenizer.convert_tokens_to_ids(spelling)
        assert row.ids.count(token) == plain.ids.count(token)
        assert spelling in made.processor.tokenizer.decode([id for id in row.ids if id != token])


def test_a_model_whose_vectors_depend_on_the_question_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"a InstructBlipForConditionalGeneration, depend on its qformer_input_ids too, so the texts about an image cannot share"):
        VisionLanguageModel.from_model(*instructblip(), template=Template(prompt="<image>{question}"))


def test_a_processor_that_prepares_no_image_is_refused() -> None:
    model, processor = MADE["blip2"]()
    processor.image_processor.size = {"longest": 3}
    with pytest.raises(ConfigError, match=r"the processor of .*, a Blip2Processor, does not prepare an image \(.*see that its files are the model's own"):
        VisionLanguageModel.from_model(model, processor, template=Template(prompt="<image>{question}"))
