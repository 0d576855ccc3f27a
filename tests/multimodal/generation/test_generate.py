"""Generation: from left-padded prompts, the same text whatever else is in the batch."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from composed import FAMILIES, N_POSITIONS, compose, excite, patches
from torch import Tensor

from adalink import AdaLink, Bridge, Prompt
from adalink.errors import ConfigError, DataError
from multimodal.batches.collate import collate
from multimodal.batches.tokenize import TextTooLong
from multimodal.generation.decoding import check_room
from multimodal.generation.generate import GenerationSettings, generated_texts, run_generation
from multimodal.model import VisionLanguageModel

QUESTIONS = ["is it red ?", "is it a big red ball ?", "is it ?", "", "is it a cube ?"]
CACHES: tuple[Literal["auto", "static"], ...] = ("auto", "static")
METHODS = {
    "bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text")), "prompt": Prompt(length=3, init_std=0.5),
}  # fmt: skip


def model_of(family: str) -> VisionLanguageModel:
    model = compose(family)
    excite(model.add_adapter("one", METHODS).double())
    return model


def generated(model: VisionLanguageModel, which: list[int], settings: GenerationSettings) -> tuple[Tensor, list[str]]:
    """The new ids and the texts of some of the questions, each about the image of its own number."""
    encoder = model.row_encoder()
    rows = [encoder.prompt(QUESTIONS[i]) for i in which]
    batch = collate(rows, range(len(which)), patches(5)[which], kind="patches", side="left", pad_id=0)
    with torch.no_grad(), model.adapted.attachment.bind(model.token_map(batch)):
        ids = run_generation(model.language, batch, settings)
    return ids, generated_texts(model.language, batch, ids)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_the_batch_it_is_generated_in(family: str, beams: int) -> None:
    model = model_of(family)
    settings = GenerationSettings(max_new_tokens=7, num_beams=beams)
    together = generated(model, [0, 1, 2, 3, 4], settings)[1]
    assert [generated(model, [i], settings)[1][0] for i in range(5)] == together
    assert generated(model, [4, 1], settings)[1] == [together[4], together[1]]
    assert len(set(together)) > 1  # the control: the rows differ
    other_pictures = model.generate_batch(
        collate([model.row_encoder().prompt(q) for q in QUESTIONS], range(5), patches(5, seed=8), kind="patches", side="left", pad_id=0), settings
    )
    assert other_pictures != together  # and the images are looked at


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_a_static_cache_gives_the_same_texts(family: str) -> None:
    model = model_of(family)
    batch = collate([model.row_encoder().prompt(q) for q in QUESTIONS], range(5), patches(5), kind="patches", side="left", pad_id=0)
    seen = []
    model.language.model.register_forward_hook(lambda module, args, kwargs, output: seen.append(type(kwargs["past_key_values"]).__name__), with_kwargs=True)
    for beams in (1, 3):
        texts = {cache: model.generate_batch(batch, GenerationSettings(max_new_tokens=7, num_beams=beams, cache=cache)) for cache in CACHES}
        assert texts["static"] == texts["auto"]
    assert {"DynamicCache", "StaticCache"} <= set(seen)


def test_a_static_cache_is_refused_where_none_is_exact() -> None:
    model = model_of("t5")
    batch = collate([model.row_encoder().prompt("is it red ?")], [0], patches(1), kind="patches", side="left", pad_id=0)
    with pytest.raises(ConfigError, match=r"generation\.cache is static, and T5ForConditionalGeneration with this adapter has no such cache that is exact: leave"):
        model.generate_batch(batch, GenerationSettings(cache="static"))
    with pytest.raises(ConfigError, match=r"generation\.cache is 'paged': give auto or static"):
        GenerationSettings(cache="paged")  # type: ignore[arg-type]


def test_no_more_than_the_new_tokens_are_generated_and_an_end_ends_it() -> None:
    model = model_of("opt")
    ids, _ = generated(model, [1], GenerationSettings(max_new_tokens=4))
    n_prompt = len(model.row_encoder().prompt(QUESTIONS[1]).ids)
    assert ids.shape[1] <= n_prompt + 4
    head = model.language.model.lm_head.weight
    with torch.no_grad():
        head[2] = 0  # the end token's logit is 0, and every other one's is below it
        head[3:] = 0
        head[:2] = 0
        model.language.model.model.decoder.project_out.weight.zero_()
    short, texts = generated(model, [0, 1], GenerationSettings(max_new_tokens=6))
    assert short.shape[1] > n_prompt  # argmax of equal logits is id 0, which is padding and has no text
    assert texts == ["", ""]


def test_texts_come_without_prompt_special_tokens_and_spaces_around() -> None:
    model = model_of("opt")
    batch = collate([model.row_encoder().prompt("is it ?")], [0], patches(1), kind="patches", side="left", pad_id=0)
    words = model.language.tokenizer.convert_tokens_to_ids(["<s>", "a", "red", "</s>", "<pad>"])
    ids = torch.cat([batch.ids, torch.tensor([words])], 1)
    assert generated_texts(model.language, batch, ids) == ["a red"]
    t5 = model_of("t5")
    assert generated_texts(t5.language, batch, torch.tensor([[0, *words[1:]]])) == ["a red"]


def test_a_prompt_and_its_text_beyond_the_positions_are_refused_before_anything_runs() -> None:
    model = model_of("gpt2")
    n_prompt = len(model.row_encoder().prompt(QUESTIONS[1]).ids)
    room = N_POSITIONS - n_prompt + 1  # the last token is only ever predicted
    assert generated(model, [1, 2], GenerationSettings(max_new_tokens=room))[0].shape[1] <= N_POSITIONS + 1
    message = rf"a prompt of {n_prompt} tokens and {room + 1} new ones need {N_POSITIONS + 1} positions, and the language model has {N_POSITIONS}"
    with pytest.raises(TextTooLong, match=message):
        generated(model, [1, 2], GenerationSettings(max_new_tokens=room + 1))
    assert issubclass(TextTooLong, DataError)


def test_t5_has_no_last_position_whatever_an_old_config_says() -> None:
    language = model_of("t5").language
    language.model.config.n_positions = 512
    check_room(language, 10_000, GenerationSettings(max_new_tokens=10_000))


def test_an_encoder_decoder_model_counts_what_it_reads_and_what_it_writes_apart() -> None:
    language = model_of("t5").language
    language.model.config.max_position_embeddings = 50  # as BART has it
    check_room(language, 50, GenerationSettings(max_new_tokens=50))
    for n_prompt, new in ((51, 1), (1, 51)):
        with pytest.raises(TextTooLong, match=f"a prompt of {n_prompt} tokens and {new} new ones need 51 positions, and the language model has 50"):
            check_room(language, n_prompt, GenerationSettings(max_new_tokens=new))


@pytest.mark.parametrize("fields", [{"max_new_tokens": 0}, {"num_beams": 0}])
def test_settings_that_generate_nothing_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens is \d+ and num_beams \d+: give 1 or more of each"):
        GenerationSettings(**fields)  # type: ignore[arg-type]


def test_every_end_token_of_the_model_ends_a_text_and_none_of_them_is_in_it() -> None:
    def written(model: VisionLanguageModel, beams: int) -> tuple[list[int], str, str]:
        """New tokens, and the text by transformers' generation and by the running batch."""
        settings = GenerationSettings(max_new_tokens=6, num_beams=beams)
        row = model.row_encoder().prompt(QUESTIONS[0])
        ids, (text,) = generated(model, [0], settings)
        batch = collate([row], [0], patches(5)[:1], kind="patches", side="left", pad_id=0)
        return ids[0, len(row.ids) :].tolist(), text, model.generate_batch(batch, settings)[0]

    model = model_of("llama")
    new, _, _ = written(model, 1)
    end = new[2]
    model.language.model.generation_config.eos_token_id = [model.language.tokenizer.eos_token_id, end]
    model.language.__dict__.pop("end_ids", None)  # which is read once
    expected = model.language.tokenizer.decode(new[: new.index(end)], skip_special_tokens=True).strip()
    assert written(model, 1) == (new[: new.index(end) + 1], expected, expected)
    _, by_beams, _ = written(model, 2)
    assert model.language.tokenizer.decode([end]) not in by_beams.split()
