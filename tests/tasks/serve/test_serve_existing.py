"""The server on vision-language models that see already: every answer is what `model.generate` gives, about several images and in conversations too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from existing_checks import READ_RAW, case, families
from existing_families import images as family_images
from existing_families import made
from fastapi.testclient import TestClient
from served import data_url, photo
from sharing import excite, in_double

from adalink import BASE_NAME, AdaLink, LoRA, Prompt
from multimodal.batches.prepared import joined
from multimodal.data.images.decode import decode_image
from multimodal.generation.settings import GenerationSettings
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.template import Template
from tasks.serve.app import Service, make_app
from tasks.serve.engine import FeatureLRU, PromptCache, Running
from tasks.serve.scheduler import Answer, Ask, Job, ServedImage
from tasks.serve.server import served_model
from tasks.serve.settings import Access, Batching, RequestLimits, ServeSettings

N_NEW = 6
VQA = Template(prompt="<image>question: {question} answer:", target="{text}", system="be brief")
METHODS: dict[str, dict[str, Any]] = {
    "vqa": {"adalink": AdaLink(rank=4, modalities=("image", "text")), "lora": LoRA(rank=2)},
    "slots": {"prompt": Prompt(length=3, init_std=0.5, at="before_text"), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "cap": {"lora": LoRA(rank=4)},
}


class Asked:
    """A served model with its adapters, and a client of it."""

    def __init__(self, service: Service, client: TestClient, folder: Path) -> None:
        self.service, self.model, self.client, self.folder = service, service.model, client, folder

    def post(self, name: str, messages: list[Any], **more: Any) -> Any:
        body = {"model": name, "messages": messages, "max_tokens": N_NEW, **more}
        return self.client.post("/v1/chat/completions", json=body)

    def reply(self, name: str, messages: list[Any], **more: Any) -> Any:
        response = self.post(name, messages, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, name: str, messages: list[Any], **more: Any) -> str:
        return str(self.reply(name, messages, **more)["choices"][0]["message"]["content"])

    def generated(self, name: str, images: Any, prompt: Any, **more: Any) -> str:
        """What the model writes in this process, alone."""
        return self.model.generate(images, [prompt], adapter_names=[name], max_new_tokens=N_NEW, **more)[0]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server of three adapters on a model from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    for part in made(request.param):
        part.save_pretrained(folder / "model")
    trained = VisionLanguageModel.from_model(folder / "model", template=VQA)
    for seed, (name, methods) in enumerate(METHODS.items()):
        torch.manual_seed(seed)
        trained.template = Template(prompt="<image>describe it", target="{text}") if name == "cap" else VQA
        adapter = trained.add_adapter(name, methods)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        trained.save_pretrained(folder / name, task={"task": "captioning" if name == "cap" else "vqa"})
    settings = ServeSettings(limits=RequestLimits(images=3), access=Access(adapters_folder=folder), batching=Batching(wait_ms=200))
    model = served_model(settings, {name: folder / name for name in METHODS})
    service = Service.of(model, settings)
    with TestClient(make_app(service), base_url="http://localhost") as client:
        yield Asked(service, client, folder)


def image(index: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(photo(index))}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def native(turns: list[Any]) -> list[Any]:
    """The same turns as chat templates and `model.generate` take them."""
    parts = [turn["content"] if isinstance(turn["content"], list) else [text(turn["content"])] for turn in turns]
    return [{**turn, "content": [{"type": "image"} if part["type"] == "image_url" else part for part in own]} for turn, own in zip(turns, parts, strict=True)]


def test_adapters_with_and_without_slots_answer_in_one_batch_as_alone(asked: Asked) -> None:
    questions = ("what color is the square?", "how many circles are there?", "yes or no?")
    cases = [(name, index, questions[index % 3]) for index in range(3) for name in ("vqa", "slots", BASE_NAME)]
    cases += [("cap", 1, ""), ("vqa", 0, questions[1])]
    alone = [asked.generated(name, decode_image(photo(index)), question) for name, index, question in cases]
    with ThreadPoolExecutor(len(cases)) as clients:
        for _ in range(2):  # the second time from cached features and prompts
            found = clients.map(lambda case: asked.reply(case[0], [user(image(case[1]), *([text(case[2])] if case[2] else []))]), cases)
            replies = list(found)
            assert [reply["choices"][0]["message"]["content"] for reply in replies] == alone
    assert max(reply["adalink"]["batch_rows"] for reply in replies) > 1
    assert len(set(alone)) > 6  # the control: adapters, images and questions differ


def test_a_second_question_about_an_image_is_read_from_where_it_differs(asked: Asked) -> None:
    replies = [asked.reply("vqa", [user(image(10), text(words))]) for words in ("what color is it?", "what color is the square?")]
    known = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert known[0] == 0
    assert 0.5 * replies[1]["usage"]["prompt_tokens"] < known[1] < replies[1]["usage"]["prompt_tokens"]
    assert replies[1]["choices"][0]["message"]["content"] == asked.generated("vqa", decode_image(photo(10)), "what color is the square?")


def test_several_images_earlier_turns_and_instructions_are_read(asked: Asked) -> None:
    first = [{"role": "system", "content": "no words"}, user(image(0), text("what color is it?"))]
    later = [*first, {"role": "assistant", "content": "red"}, user(text("and this"), image(1), text("or this"), image(2), text("?"))]
    for turns, n_images in ((first, 1), (later, 3)):
        reply = asked.reply("slots", turns)
        wanted = asked.generated("slots", [[decode_image(photo(i)) for i in range(n_images)]], native(turns))
        assert reply["choices"][0]["message"]["content"] == wanted
        assert (reply["adalink"]["messages_not_read"], reply["adalink"]["system_message"]) == (0, "read")
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # of other images: another prompt
    again = asked.reply("slots", later)
    assert again["choices"] == reply["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
    texts = {asked.text("slots", turns) for turns in (later, later[1:], later[3:4], [user(image(0), image(1), text("and this"))])}
    assert len(texts) >= 3  # the control: the parts of the conversation change the answer


def test_a_conversation_is_the_processors(asked: Asked) -> None:
    """The frozen model alone, by transformers' own generation from its processor's own words."""
    turns = [{"role": "system", "content": [text("no words")]}, user(image(3), text("what color?")), {"role": "assistant", "content": [text("red")]}, user(image(4), text("and it?"))]
    images, tower = [decode_image(photo(index)) for index in (3, 4)], asked.model.tower
    given = native(turns)
    for turn, one in zip((given[1], given[3]), images, strict=True):
        turn["content"][0] = {"type": "image", "image": one}
    found = tower.processor.real.apply_chat_template(given, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")  # type: ignore[union-attr]
    base = asked.model.language.model
    ids = base.generate(**{name: value.double() if value.is_floating_point() else value for name, value in found.items()}, max_new_tokens=N_NEW, do_sample=False)
    wanted = tower.processor.tokenizer.decode(ids[0, found["input_ids"].shape[1] :], skip_special_tokens=True).strip()  # type: ignore[union-attr]
    assert asked.text(BASE_NAME, turns) == wanted == asked.generated(BASE_NAME, None, given)


def test_a_question_without_an_image_is_for_the_frozen_model_alone(asked: Asked) -> None:
    with ThreadPoolExecutor(2) as clients:  # beside a row with one
        beside = clients.submit(asked.text, "vqa", [user(image(5), text("how many?"))])
        assert asked.text(BASE_NAME, [user(text("how many?"))]) == asked.generated(BASE_NAME, [[]], "how many?")
        assert beside.result() == asked.generated("vqa", decode_image(photo(5)), "how many?")
    assert "hold no image" in asked.post("vqa", [user(text("how many?"))]).json()["error"]["message"]


def test_an_adapter_that_asks_nothing_reads_the_images_alone(asked: Asked) -> None:
    reply = asked.reply("cap", [{"role": "system", "content": "no words"}, user(image(6), text("what color?")), {"role": "assistant", "content": "red"}, user(image(7))])
    assert reply["choices"][0]["message"]["content"] == asked.generated("cap", [[decode_image(photo(6)), decode_image(photo(7))]], "")
    assert (reply["adalink"]["question"], reply["adalink"]["messages_not_read"]) == (None, 3)


def test_beams_and_streams_equal_generate(asked: Asked) -> None:
    turns = [user(image(8), image(9), text("how many circles are there?"))]
    images = [[decode_image(photo(8)), decode_image(photo(9))]]
    assert asked.text("vqa", turns, num_beams=2) == asked.generated("vqa", images, "how many circles are there?", num_beams=2)
    events = [line.removeprefix("data: ") for line in asked.post("vqa", turns, stream=True).text.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content", "") for event in events for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == asked.generated("vqa", images, "how many circles are there?")


def test_what_cannot_be_read_is_told_in_a_sentence(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    name = asked.model.tower.name

    def told(*turns: dict[str, Any]) -> str:
        response = asked.post("vqa", list(turns))
        assert response.status_code == 400, response.text
        message = str(response.json()["error"]["message"])
        assert "\n" not in message
        return message

    assert "messages hold 4 images, and the limit is 3" in told(user(*(image(i) for i in range(4)), text("how many?")))
    assert "the language model has 512" in told(user(image(0), text("square " * 600)))
    processor = asked.service.served._processor
    assert processor is not None
    real, chat = processor.real, processor.real.chat_template
    monkeypatch.setattr(real, "chat_template", chat.replace("in m.content %}", "in m.content[1:] %}"))
    assert f"'{name}' cannot read this prompt about 2 images: " in told(user(image(0), image(1), text("which?")))
    monkeypatch.setattr(real, "chat_template", "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + chat)
    assert f"'{name}' cannot read this prompt about 1 image: no system role" in told({"role": "system", "content": "x"}, user(image(0), text("which?")))
    for one in (real, real.tokenizer):
        monkeypatch.setattr(one, "chat_template", None)
    assert f"'{name}' reads one question and not a conversation of 2 turns" in told({"role": "system", "content": "x"}, user(image(0), text("which?")))
    monkeypatch.undo()
    assert asked.text("vqa", [user(image(0), text("which?"))])


def test_an_adapter_is_loaded_while_others_are_asked(asked: Asked) -> None:
    turns = [user(image(0), image(1), text("how many?"))]
    with ThreadPoolExecutor(4) as clients:
        others = [clients.submit(asked.text, "slots", turns) for _ in range(4)]
        loaded = asked.client.post("/v1/models", json={"id": "guest", "folder": "vqa"})
        assert loaded.status_code == 201, loaded.text
        assert asked.text("guest", turns) == asked.text("vqa", turns)
        assert asked.client.delete("/v1/models/guest").status_code == 200
        assert {other.result() for other in others} == {asked.text("slots", turns)}


class Here:
    """A loop that calls at once: the generation thread and the request are the same here."""

    def call_soon_threadsafe(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


def job(model: VisionLanguageModel, running: Running, adapter: str, images: tuple[int, ...], question: str) -> Job:
    """One of the families' three images is named by its number."""
    seen = tuple(ServedImage(str(i), model.tower.preprocess(family_images()[i]), running.features.get(str(i))) for i in images)
    row = model.row_encoder(adapter).prompt(question, joined([image.prepared for image in seen]))
    ask = Ask(adapter=adapter, row=row, images=seen, settings=GenerationSettings(max_new_tokens=N_NEW))
    return Job(ask, streams=False, loop=Here(), events=asyncio.Queue())  # type: ignore[arg-type]


def answered(running: Running, jobs: list[Job], first: int) -> list[object]:
    """What each client is given: the first so many jobs run for a step before the others join them."""
    running.join(jobs[:first])
    running.step()
    running.join(jobs[first:])
    while running.rows:
        running.step()
    return [one.events.get_nowait() for one in jobs]


@pytest.mark.parametrize("family", families(["gemma3", "paligemma"]))
def test_rows_of_each_family_join_leave_and_are_known_as_alone(family: str) -> None:
    with in_double():
        model = case(family).vlm
        several = (0,) if family in ("blip2", "llava_onevision") else (0, 1)
        cases = [(adapter, images, question) for adapter in ("image", "text", BASE_NAME) for images, question in (((2,), "how many?"), (several, "what color?"))]
        running = Running(model, FeatureLRU(model, 8), PromptCache(2**30))
        alone = [model.generate([[family_images()[i] for i in images]], [question], adapter_names=[name], max_new_tokens=N_NEW)[0] for name, images, question in cases]
        for n_known in (0, len(cases) if family not in READ_RAW else None):
            found = answered(running, [job(model, running, *one) for one in cases], first=4)
            assert [answer.text for answer in found if isinstance(answer, Answer)] == alone
            assert n_known is None or sum(answer.n_known > 0 for answer in found if isinstance(answer, Answer)) == n_known


def test_adapters_with_connectors_of_their_own_are_served_beside_others() -> None:
    with in_double():
        model = VisionLanguageModel.from_model(*made("qwen2_vl"), template=VQA)
        for name, own in {"plain": {}, "copy": {"connector": "trained"}, "low_rank": {"connector_methods": {"lora": LoRA(rank=2)}}}.items():
            model.add_adapter(name, {"lora": LoRA(rank=2)}, **own)  # type: ignore[arg-type]
            trained = TrainedParts.of(model)
            for one in (trained.edits, *((trained.connector,) if trained.connector is not None else ())):
                excite(one.double())
        model.eval()
        running = Running(model, FeatureLRU(model, 8), PromptCache(2**30))
        cases = [(name, (2,), "what color?") for name in (*model.adapter_names, BASE_NAME)]
        alone = [model.generate([family_images()[i] for i in images], [question], adapter_names=[name], max_new_tokens=N_NEW)[0] for name, images, question in cases]
        for _ in range(2):  # the second time from cached images and prompts
            found = answered(running, [job(model, running, *one) for one in cases], first=3)
            assert [answer.text for answer in found if isinstance(answer, Answer)] == alone
        assert len(set(alone)) == 4


def test_a_server_that_started_without_such_an_adapter_loads_none(asked: Asked) -> None:
    model = VisionLanguageModel.from_model(asked.model.tower.name, template=VQA)
    model.add_adapter("own", {"lora": LoRA(rank=2)}, connector="trained")
    model.save_pretrained(asked.folder / "own", task={"task": "vqa"})
    loaded = asked.client.post("/v1/models", json={"id": "own", "folder": "own"})
    assert loaded.status_code == 400
    assert "has a connector of its own, and this server started without such an adapter, so it caches no images" in loaded.json()["error"]["message"]
    assert "own" not in asked.model.adapter_names


def test_a_model_is_served_without_adapters(asked: Asked) -> None:
    alone = served_model(ServeSettings(model=asked.model.tower.name), {})
    assert list(alone.adapted.adapters) == []
    assert alone.generate([decode_image(photo(0))], ["how many?"], max_new_tokens=N_NEW) == [asked.generated(BASE_NAME, decode_image(photo(0)), "how many?")]
