"""Conversations, several images and system messages are read as the model's own processor reads them; a model that cannot is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from existing_checks import READ_RAW, SYSTEM, case, check_same, families
from existing_families import MADE, images
from sharing import in_double

from adalink.errors import ConfigError, DataError
from multimodal.batches.packing import pack_rows
from multimodal.batches.prepared import joined
from multimodal.data.feature_cache.encode import encode_all
from multimodal.data.inputs import read_pixels
from multimodal.existing.conversation import asked_of, worded
from multimodal.sample import Sample
from multimodal.template import Template, Text

READ_TURNS = [name for name in MADE if name not in (*READ_RAW, "llava_onevision")]


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    with in_double():
        yield


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """A text is a part of type text, all else an image; None is an open place for one."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **({} if part is None else {"image": part})} for part in parts]
    return {"role": role, "content": content}


def conversation() -> list[dict[str, Any]]:
    first, second, third = images()
    return [turn("system", "no words"), turn("user", first, "what?"), turn("assistant", "a red one"), turn("user", second, third, "and these?")]


@pytest.mark.parametrize("name", families(["qwen2_vl", "gemma3"], READ_TURNS))
def test_a_conversation_has_the_ids_and_the_answer_of_the_models_own(name: str) -> None:
    made, turns = case(name), conversation()
    own = made.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    given = {key: value.double() if value.is_floating_point() else value for key, value in own.items()}
    ((seen, asked),) = asked_of(None, turns)
    row = made.vlm.row_encoder().prompt(asked, joined([made.vlm.tower.preprocess(image) for image in seen]))  # type: ignore[arg-type,misc]
    assert list(row.ids) == own["input_ids"][0].tolist()
    ids = made.model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=list(made.vlm.language.end_ids))
    with made.vlm.disable_adapter():
        alone, again, beside = made.vlm.generate(prompts=[turns, turns, [turn("user", "no?")]], max_new_tokens=6)
    assert alone == again == made.processor.tokenizer.decode(ids[0, len(row.ids) :], skip_special_tokens=True).strip()
    with made.vlm.disable_adapter():
        assert beside == made.vlm.generate([[]], ["no?"], max_new_tokens=6)[0]


def test_several_images_for_one_question_are_a_conversation_of_one_turn() -> None:
    made = case("qwen2_vl")
    two = images()[:2]
    (text,) = made.vlm.generate([two], ["which?"], max_new_tokens=6)
    assert made.vlm.generate(prompts=[turn("system", SYSTEM), turn("user", *two, "which?")], max_new_tokens=6) == [text]
    assert made.vlm.generate([two], [[turn("system", SYSTEM), turn("user", None, None, "which?")]], max_new_tokens=6) == [text]
    assert made.vlm.generate(images(), ["which?"] * 3, max_new_tokens=6) != [text] * 3


def test_a_text_with_earlier_turns_is_learnt_as_the_processor_writes_it() -> None:
    made, (image, *_) = case("qwen2_vl"), images()
    before = (("user", "what?"), ("assistant", "a red one"))
    text = Text("how many?", "two of them", turns=before)
    turns = [turn("system", SYSTEM), turn("user", image, "what?"), turn("assistant", "a red one"), turn("user", "how many?"), turn("assistant", "two of them")]
    whole = made.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"][0].tolist()
    encoder, prepared = made.vlm.row_encoder(), made.vlm.tower.preprocess(image)
    row = encoder.row(text, prepared)
    learnt = [*row.ids, row.target[-1]]
    assert learnt == whole[: len(learnt)]
    assert made.processor.tokenizer.decode(row.target, skip_special_tokens=True) == "two of them"
    assert row.ids[: row.source[0] + 1] == encoder.prompt([turn("user", None, "what?"), turns[2], turns[3]], prepared).ids
    shared = made.gradients([prepared], [pack_rows([row, encoder.row(Text("and now?", "one", turns=before), prepared)])])[1]
    apart = made.one_row_a_call([prepared], [[row, encoder.row(Text("and now?", "one", turns=before), prepared)]])
    check_same(shared, apart)
    for wrong in ("king", "system"):
        with pytest.raises(ConfigError, match=f"the earlier turn 1 of a text has the role '{wrong}'"):
            encoder.row(Text("how many?", "two", turns=(("user", "x"), (wrong, "x"))), prepared)
    with pytest.raises(ConfigError, match=r"has earlier turns, and 'PaliGemma.*' reads them where it has a chat template"):
        case("paligemma").vlm.row_encoder().row(Text("how many?", "two", turns=before[:1]), case("paligemma").prepared[0])


@pytest.mark.parametrize("name", families(["qwen2_vl", "gemma3", "idefics3", "llava"], READ_TURNS))
def test_images_stand_where_a_text_has_them_and_its_system_message_is_its_own(name: str) -> None:
    made, (first, second, third) = case(name), images()
    whole = [
        turn("system", "no words"), turn("user", "left", first, " or right?"), turn("assistant", "a red one"), turn("user", second, "and", third),
        turn("assistant", "two of them"),
    ]  # fmt: skip
    before = (("system", "no words"), ("user", "left or right?"), ("assistant", "a red one"))
    encoder, prepared = made.vlm.row_encoder(), made.vlm.tower.processor.prepare([first, second, third])  # type: ignore[union-attr]
    for text, n_turns, n_images in (
        (Text("and", "two of them", turns=before, places=((1, 4), (3, 0), (3, 3))), 5, 3),
        (Text("left or right?", "a red one", turns=before[:1], places=((1, 4),)), 3, 1),  # what comes later is not read
    ):
        asked = whole[: n_turns - 1]
        native = list(map(int, made.processor.apply_chat_template(whole[:n_turns], tokenize=True)[0]))
        row = encoder.row(text, prepared)
        learnt = [*row.ids, row.target[-1]]
        assert learnt == native[: len(learnt)]
        assert made.processor.tokenizer.decode(row.target, skip_special_tokens=True).strip() == text.target
        prompt = encoder.row(replace(text, target=None), prepared)
        assert list(prompt.ids) == list(made.processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)[0])
        assert [vector for vector in prompt.vector if vector >= 0] == list(range(prepared.first(n_images).n_vectors))
        (seen, turns), = asked_of(None, asked)
        assert prompt == encoder.prompt(turns, made.vlm.tower.processor.prepare(seen))  # type: ignore[union-attr,arg-type]
    with pytest.raises(ConfigError, match="has places for 1 image, and its sample has 0"):
        encoder.row(Text("what?", "x", places=((0, 0),)))


def test_a_sample_of_several_images_is_learnt_from_all_of_them() -> None:
    made, (first, second, third) = case("qwen2_vl"), images()
    texts = [Text("which?", "the red one"), Text("how many?", "two")]
    samples = [Sample(key="a", image_id=1, image=first, further=(second,)), Sample(key="b", image_id=2, image=third)]

    def loss(features: Any = None) -> list[torch.Tensor]:
        (batch,) = made.vlm.batches(samples, lambda sample, rng: texts, batch_size=2, features=features)
        made.vlm.zero_grad()
        made.vlm(batch).backward()
        return [parameter.grad.clone() for parameter in made.vlm.adapted.active_adapter().parameters()]  # type: ignore[union-attr]

    prepared = [joined([made.vlm.tower.preprocess(image) for image in (first, second)]), made.vlm.tower.preprocess(third)]  # type: ignore[list-item]
    encoder = made.vlm.row_encoder()
    apart = made.one_row_a_call(prepared, [[encoder.row(text, one) for text in texts] for one in prepared])[1:]  # type: ignore[arg-type]
    check_same(loss(), apart)
    scale = max(float(one.abs().max()) for one in apart)
    for cached, one in zip(loss(encode_all(made.vlm, samples, dtype="float32")), apart, strict=True):
        torch.testing.assert_close(cached, one, rtol=1e-3, atol=1e-4 * scale)
    with pytest.raises(DataError, match="is a int"):
        Sample(key="a", image_id=1, image=first, further=(5,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sample 'a' has 2 images, and a composed model reads one"):
        read_pixels(samples[0], lambda image: torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    ("name", "turns", "note"),
    [
        ("paligemma", [turn("system", "no words"), turn("user", None, "what?")], "reads one question and not a conversation of 2 turns, since the model has no chat"),
        ("blip2", [turn("user", None, None, "what?")], "cannot read 2 images in one conversation: its template has places for 4 of their 8 tokens"),
        ("llava_onevision", [turn("user", None, None, "what?")], "prepares an image among several in another way than alone"),
    ],
)
def test_a_model_that_cannot_read_it_is_refused_by_name(name: str, turns: list[Any], note: str) -> None:
    made = case(name)
    n_images = sum(part["type"] == "image" for one in turns for part in one["content"])
    with pytest.raises(ConfigError, match=rf"^'{made.vlm.tower.name}' {note}"):
        made.vlm.generate([images()[:n_images]], [turns])


def test_a_template_that_leaves_turns_out_or_refuses_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("llava")
    real = made.vlm.tower.processor.real  # type: ignore[union-attr]
    chat = real.chat_template
    for words, note in (
        (chat.replace("in messages %}", "in messages if m.role != 'system' %}"), "leaves out the turns of the system: ask without them"),
        (chat.replace("in messages %}", "in messages[-1:] %}"), "leaves out the turns of the system"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + chat, "about 3 images: no system role"),
    ):
        assert words != chat
        monkeypatch.setattr(real, "chat_template", words)
        with pytest.raises(ConfigError, match=note):
            made.vlm.generate(prompts=conversation())
    monkeypatch.setattr(real, "chat_template", chat.replace("in messages %}", "in messages[-1:] %}"))
    with pytest.raises(ConfigError, match="leaves out the turns of the assistant"):
        made.vlm.generate(prompts=conversation()[1:])


def test_a_turn_is_worded_by_the_template() -> None:
    template = Template(prompt="<image>question: {question} answer:")
    one = worded(turn("user", "see", None, "what is it?"), template)["content"]
    assert one == [{"type": "image"}, {"type": "text", "text": "question: see what is it? answer:"}]
    mixed = worded(turn("user", None, "or", None, "?"), template)["content"]
    assert [part.get("text", "IMAGE") for part in mixed] == ["question: ", "IMAGE", "or", "IMAGE", "? answer:"]
    plain = Template(prompt="<image><bos>{question}")
    assert [part["type"] for part in worded(turn("user", "see", None, "what?"), plain)["content"]] == ["text", "image", "text"]
    assert worded(turn("assistant", "red"), template) == turn("assistant", "red")
    assert worded({"role": "user", "content": "why?"}, template)["content"] == [{"type": "text", "text": "question: why? answer:"}]


@pytest.mark.parametrize(
    ("given", "prompts", "note"),
    [
        (None, [turn("assistant", "x")], "the last turn of the conversation is the assistant's"),
        (None, [{"role": "king", "content": "x"}], "turn 0 of the conversation is .*expected a role"),
        (None, [{"role": "user", "content": [{"type": "sound"}]}], "has the part .*expected type text"),
        (None, [turn("user", None, "x")], "0 images were given beside a conversation with 1 open places"),
        (["a.png"], [turn("user", "x")], "1 images were given beside a conversation with 0 open places"),
        (["a.png"], ["x", "y"], "1 images and 2 prompts were given"),
    ],
)
def test_what_is_no_conversation_is_refused(given: Any, prompts: Any, note: str) -> None:
    with pytest.raises(ConfigError, match=note):
        asked_of(given, prompts)


def test_images_and_prompts_are_paired() -> None:
    assert asked_of("a.png", ["x", "y"]) == [(("a.png",), "x"), (("a.png",), "y")]
    assert asked_of(["a.png", ["b.png", "c.png"], []], "x") == [(("a.png",), "x"), (("b.png", "c.png"), "x"), ((), "x")]
    inside = [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}]
    assert asked_of(None, inside) == asked_of([["b.png"]], [[turn("user", None)]]) == [(("b.png",), [turn("user", None)])]
    assert asked_of(None, "x") == [((), "x")]
    assert asked_of([], "x") == []
