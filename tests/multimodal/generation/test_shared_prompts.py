"""Rows about one image, read once: the same tokens as transformers' own generation gives each row alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from composed import N_POSITIONS, WORDS, compose, excite, tokenizer, tower
from image_rows import METHODS, NOT_SHARED, QUESTIONS, alone, asked, tokens_read
from PIL import Image
from shared import covering
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
    StableLmConfig,
)

from adalink import EPALM
from multimodal.batches.prefix_sharing import has_row_cache
from multimodal.generation.decoding import Fork, plan_fork, prefill
from multimodal.generation.generate import GenerationSettings
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from multimodal.template import Template

FAMILIES = ("opt", "gpt2", "llama")


@pytest.mark.parametrize(("method", "family"), covering(product(METHODS, FAMILIES), each=1))
def test_questions_about_one_picture_read_it_once_and_are_answered_alike(method: str, family: str) -> None:
    check_questions(method, family, beams=1)


@pytest.mark.parametrize(("method", "family"), covering(product(METHODS, FAMILIES), each=1, shift=1))
def test_questions_about_one_picture_are_answered_alike_with_beams(method: str, family: str) -> None:
    check_questions(method, family, beams=3)


def check_questions(method: str, family: str, beams: int) -> None:
    model, settings = compose(family), GenerationSettings(max_new_tokens=6, num_beams=beams)
    excite(model.add_adapter("one", METHODS[method]).double())
    excite(model.add_adapter("two", METHODS["adalink"]).double(), 2)
    names, about, which = ["one"] * 5 + ["two"] * 4, [0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 0, 1, 1, 2]
    batch = asked(model, names, about, which)
    with tokens_read(model) as calls:
        texts = model.generate_batch(batch, settings, names)
    assert texts == alone(model, names, about, which, settings)
    assert len(set(texts)) > 1  # the control: rows differ
    if method != "epalm":  # without slots for the image, there is little to share
        assert sum(calls[:2]) < 0.6 * batch.ids.numel()
    assert max(calls[2:]) <= len(names) * beams


@pytest.mark.parametrize(("method", "family"), covering(product(METHODS, ("opt", "gpt2")), each=1))
def test_scores_after_a_shared_prompt_are_those_after_a_whole_one(method: str, family: str) -> None:
    model = compose(family)
    excite(model.add_adapter("one", METHODS[method]).double())
    batch = asked(model, ["one"] * 6, [0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 0])
    token_map = model.token_map(batch)
    with torch.no_grad():
        shared, whole = (
            prefill(model.language, model.adapted.attachment, batch, token_map, n_left=0, may_share=may_share)[1] for may_share in (True, False)
        )
    assert torch.allclose(shared, whole, rtol=0, atol=1e-5)  # scores are float32
    assert not torch.allclose(shared[0], shared[5], rtol=0, atol=1e-3)  # the control: images differ


@pytest.mark.parametrize(("method", "beams"), covering(product(NOT_SHARED, ("1", "3")), each=1))
def test_rows_that_read_what_follows_share_nothing_and_are_answered_alike(method: str, beams: str) -> None:
    model, settings = compose("llama"), GenerationSettings(max_new_tokens=6, num_beams=int(beams))
    excite(model.add_adapter("one", NOT_SHARED[method]).double())
    excite(model.add_adapter("two", METHODS["adalink"]).double(), 2)
    names, about, which = ["one"] * 5 + ["two"], [0, 0, 0, 1, 1, 0], [0, 1, 2, 3, 4, 0]
    batch = asked(model, names, about, which)
    with tokens_read(model) as calls:
        texts = model.generate_batch(batch, settings, names)
    assert texts == alone(model, names, about, which, settings)
    assert calls[0] == batch.ids.numel() * int(beams)


def test_a_slot_that_several_layers_read_has_no_cache_and_is_answered_alike() -> None:
    model, settings = compose("deep_opt"), GenerationSettings(max_new_tokens=5)
    excite(model.add_adapter("one", {"epalm": EPALM(layers=(0, 1), n_taps=2, connector="shared", mask="published")}).double())
    names, about, which = ["one"] * 3, [0, 0, 1], [0, 1, 2]
    with tokens_read(model) as calls:
        texts = model.generate_batch(asked(model, names, about, which), settings, names)
    assert texts == alone(model, names, about, which, settings, use_cache=False)
    assert calls[-1] > calls[0]  # whole sequences


def test_a_model_that_asks_for_something_of_its_own_is_generated_by_transformers() -> None:
    model, settings = compose("llama"), GenerationSettings(max_new_tokens=8)
    excite(model.add_adapter("one", METHODS["adalink"]).double())
    names, about, which = ["one"] * 5, [0] * 5, [0, 1, 2, 3, 4]
    plain = model.generate_batch(asked(model, names, about, which), settings, names)
    model.language.model.generation_config.repetition_penalty = 5.0
    penalised = model.generate_batch(asked(model, names, about, which), settings, names)
    assert penalised == alone(model, names, about, which, settings) != plain


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
OTHERS: dict[str, Any] = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=N_POSITIONS, expansion_ratio=2),
    "falcon": FalconConfig(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16),
    "gpt_bigcode": GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4),
    "phi": PhiConfig(**SIZES, intermediate_size=48),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "stablelm": StableLmConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "cohere": CohereConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, sliding_window=16),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
}


def other(family: str) -> VisionLanguageModel:
    config = OTHERS[family]
    for name, value in {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0))
    language = Language(model=model.double().eval().requires_grad_(False), tokenizer=tokenizer(), name=family)
    return VisionLanguageModel(tower(), language, Template(prompt="<image><bos>question: {question} answer:"))


@pytest.mark.parametrize(("family", "beams"), covering(product(OTHERS, ("1", "3")), each=1))
def test_every_family_that_keeps_keys_and_values_shares_them(family: str, beams: str) -> None:
    model = other(family)
    excite(model.add_adapter("one", METHODS["adalink"]).double())
    names, about, which = ["one"] * 7, [0, 0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 1, 2]
    assert has_row_cache(model.language.model)
    batch = asked(model, names, about, which)
    settings = GenerationSettings(max_new_tokens=6, num_beams=int(beams))
    with tokens_read(model) as calls:
        texts = model.generate_batch(batch, settings, names)
    assert texts == alone(model, names, about, which, settings)
    assert sum(calls[:2]) < 0.6 * batch.ids.numel()


def test_what_is_shared_is_read_once_and_then_the_last_tokens_of_every_row() -> None:
    assert plan_fork([[1, 2, 3, 4], [1, 2, 3, 5]], "aa") == Fork(leaders=(0,), leader=(0, 0), shift=(0, 0), n_last=1)
    assert plan_fork([[1, 2, 3, 4], [1, 2, 3, 5, 6]], "aa") == Fork(leaders=(1,), leader=(0, 0), shift=(1, 0), n_last=2)
    # Rows of other images share nothing; a long row of its own is read in two parts, and two rows that share little are left alone.
    assert plan_fork([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5], [7, 8, 9, 9]], "aaab") == Fork(leaders=(0, 3), leader=(0, 0, 0, 1), shift=(0,) * 4, n_last=1)
    assert plan_fork([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5], [1, 8, 9, 9], [1, 6, 6, 6]], "aaabb") == Fork(
        leaders=(0, 3, 4), leader=(0, 0, 0, 1, 2), shift=(0,) * 5, n_last=1
    )


def test_nothing_is_shared_where_it_saves_little() -> None:
    assert plan_fork(["abcd", "abcd"], "xy") is None
    assert plan_fork(["abcd", "aefg"], "xx") is None
    assert plan_fork(["abcd", "abef"], "xx") == Fork(leaders=(0,), leader=(0, 0), shift=(0, 0), n_last=2)


def test_a_picture_that_is_given_several_times_is_encoded_once() -> None:
    model = compose("llama")
    excite(model.add_adapter("one", METHODS["adalink"]).double())
    red, blue = Image.new("RGB", (50, 40), "red"), Image.new("RGB", (50, 40), "blue")
    seen: list[int] = []
    handle = model.tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    texts = model.generate([red, blue, red], list(QUESTIONS[:3]))
    handle.remove()
    assert seen == [2]
    assert texts == [model.generate([image], [question])[0] for image, question in zip((red, blue, red), QUESTIONS, strict=False)]
