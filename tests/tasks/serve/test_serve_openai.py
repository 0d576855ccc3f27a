"""The official client against a served process: every answer is what `model.generate` gives for the same input, in any company."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from PIL import Image
from served import QUESTIONS, TASKS, Server, messages, photo
from shared import PATIENCE

from adalink import BASE_NAME
from multimodal.data.images.decode import decode_image
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def question(name: str, index: int) -> str:
    return QUESTIONS[index % 4] if name.startswith("vqa") else ""


def generated(model: VisionLanguageModel, name: str, index: int, settings: GenerationSettings | None = None) -> str:
    """What the same adapter says of the same image in this process, alone."""
    image: Image.Image = decode_image(photo(index))
    return model.generate([image], [question(name, index)], adapter_names=[name], settings=settings)[0]


def stated(client: openai.OpenAI, name: str, index: int, **settings: Any) -> str:
    reply = client.chat.completions.create(model=name, messages=messages(question(name, index), photo(index)), **settings)
    return str(reply.choices[0].message.content)


def streamed(client: openai.OpenAI, name: str, index: int, **settings: Any) -> list[str]:
    chunks = client.chat.completions.create(model=name, messages=messages(question(name, index), photo(index)), stream=True, **settings)
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


def test_the_models_are_the_adapters_and_the_base(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [*TASKS, BASE_NAME]
    assert client.models.retrieve("vqa").model_extra == {
        "adalink": {"task": "vqa", "asks": True, "is_base": False, "prompt": "<image><bos>question: {question} answer:"}}  # fmt: skip


def test_answers_equal_generate_in_any_company(client: openai.OpenAI, model: VisionLanguageModel, server: Server) -> None:
    cases = [(name, index) for name in (*TASKS, BASE_NAME) for index in range(10)]
    random.Random(0).shuffle(cases)
    alone = {case: generated(model, *case) for case in cases}
    rows, batches = server.metric("adalink_batch_rows_sum"), server.metric("adalink_batch_rows_count")
    with ThreadPoolExecutor(12) as clients:
        drawn = [clients.submit(stated, client, name, index, temperature=1.0, max_tokens=25) for name, index in cases[::4]]
        whole = {case: clients.submit(stated, client, *case) for case in cases}
        streams = {case: clients.submit(streamed, client, *case) for case in cases[::2]}
        short = {case: clients.submit(stated, client, *case, max_tokens=3) for case in cases[::3]}
        assert {case: future.result() for case, future in whole.items()} == alone
        assert {case: "".join(future.result()) for case, future in streams.items()} == {case: alone[case] for case in streams}
        assert all(alone[case].startswith(future.result()) for case, future in short.items())
        assert [future.result() for future in drawn]
    assert len(set(alone.values())) > 10  # the control: adapters and images differ
    rows, batches = server.metric("adalink_batch_rows_sum") - rows, server.metric("adalink_batch_rows_count") - batches
    assert rows / batches > 2  # and they were in company: of 10, where the machine is busy
    assert server.metric("adalink_batch_adapters_sum") > server.metric("adalink_batch_adapters_count")


def test_beams_equal_generate(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    settings = GenerationSettings(num_beams=3, max_new_tokens=12)
    assert stated(client, "cap_b", 1, max_tokens=12, extra_body={"num_beams": 3}) == generated(model, "cap_b", 1, settings)


def test_a_stream_comes_in_pieces_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    assert len(streamed(client, "cap_b", 2)) > 3
    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(model="cap", messages=messages("", photo(0)), stream=True, stream_options=options)
    assert last.usage is not None
    assert last.usage.prompt_tokens > 36


def test_what_is_known_of_a_prompt_is_told(client: openai.OpenAI, model: VisionLanguageModel, server: Server) -> None:
    before = server.metric('adalink_tokens_total{kind="known"}')
    known = []
    for asked in (QUESTIONS[1], QUESTIONS[2], QUESTIONS[1]):
        reply = client.chat.completions.create(model="vqa", messages=messages(asked, photo(77)))
        (text,) = model.generate([decode_image(photo(77))], [asked], adapter_names=["vqa"])
        assert reply.choices[0].message.content == text
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        known.append(reply.usage.prompt_tokens_details.cached_tokens)
        last = reply.usage.prompt_tokens
    assert known[0] == 0
    assert 36 < known[1] < known[2] == last - 1  # the image and the words before the question; then the whole prompt but its last token
    assert server.metric('adalink_tokens_total{kind="known"}') - before == sum(known)


def test_a_seed_decides_what_is_drawn(client: openai.OpenAI) -> None:
    texts = [stated(client, "cap", 4, temperature=1.0, top_p=0.9, seed=seed) for seed in (7, 7, 8, 9)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_text_ends_before_its_stop_string(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    whole = generated(model, "cap_b", 3)
    word = whole.split()[2]
    reply = client.chat.completions.create(model="cap_b", messages=messages("", photo(3)), stop=[" " + word])
    assert reply.choices[0].message.content == whole.partition(" " + word)[0]
    assert reply.choices[0].finish_reason == "stop"
    assert "".join(streamed(client, "cap_b", 3, stop=[" " + word])) == whole.partition(" " + word)[0]


def test_the_limit_of_tokens_is_told_as_the_reason(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="cap_b", messages=messages("", photo(3)), max_completion_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens if reply.usage else 0) == ("length", 2)


def test_an_uploaded_picture_is_asked_about_and_forgotten(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    file = client.files.create(file=("scene.png", photo(5)), purpose="vision")  # type: ignore[arg-type]
    content: Any = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": question("vqa", 5)}]
    turns: Any = [{"role": "user", "content": content[:1]}, {"role": "assistant", "content": "a ball"}, {"role": "user", "content": content[1]["text"]}]
    reply = client.chat.completions.create(model="vqa", messages=turns)
    assert reply.choices[0].message.content == generated(model, "vqa", 5)
    assert reply.model_extra is not None
    own = reply.model_extra["adalink"]
    assert (own["question"], own["messages_not_read"]) == (question("vqa", 5), 2)
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError, match="upload the image again"):
        client.chat.completions.create(model="vqa", messages=turns)


def test_adapters_come_and_go_while_others_are_asked(client: openai.OpenAI, model: VisionLanguageModel) -> None:
    expected = {index: generated(model, "vqa_b", index) for index in range(8)}
    guest = generated(model, "cap", 1)
    with ThreadPoolExecutor(8) as clients:
        others = [(i % 8, clients.submit(stated, client, "vqa_b", i % 8)) for i in range(160)]
        for _ in range(8):
            client.post("/models", cast_to=object, body={"id": "guest", "folder": "cap"})
            last = [clients.submit(stated, client, "guest", 1) for _ in range(3)]
            assert stated(client, "guest", 1) == guest
            client.models.delete("guest")
            for future in last:  # accepted before it left, or told that it is not there
                assert future.exception() is None or isinstance(future.exception(), openai.NotFoundError)
        assert [(index, future.result()) for index, future in others] == [(index, expected[index]) for index, _ in others]
    with pytest.raises(openai.NotFoundError, match="there is no model 'guest'"):
        stated(client, "guest", 1)
