"""A server that finds the adapter of a request for the model `auto`: answers as of the named adapter, weights, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx import Response
from served import messages, photo

from adalink.lifecycle.route import Router, RouteSettings, write_router
from multimodal.data.images.decode import decode_image
from multimodal.generation.routing import Routing
from multimodal.model import VisionLanguageModel
from tasks.commands.lifecycle.route import example_rows
from tasks.runs.compose import adapters_on
from tasks.scenes.dataset import Scenes
from tasks.serve.app import Service, make_app
from tasks.serve.server import served_model
from tasks.serve.settings import Access, ServeSettings

SOURCE = Scenes(split="train", size=60)
ASKED = tuple("" if i % 2 else SOURCE[i].questions[i].text for i in range(4))
RIGHT = ("vqa", "cap", "vqa", "cap")


@pytest.fixture(scope="module")
def routed(model: VisionLanguageModel, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a router."""
    rows = {name: example_rows(model, SOURCE, task, len(SOURCE), 0) for name, task in (("cap", "captioning"), ("vqa", "vqa"))}
    out = tmp_path_factory.mktemp("routed")
    write_router(out, Router.fit(rows, RouteSettings()), {name: adapters / name for name in rows})
    return out


def client_of(model: VisionLanguageModel, settings: ServeSettings | None = None) -> TestClient:
    return TestClient(make_app(Service.of(model, settings or ServeSettings())), base_url="http://localhost")


@pytest.fixture(scope="module")
def routing(routed: Path) -> VisionLanguageModel:
    """A model with its router, as a server loads it."""
    return served_model(ServeSettings(router=routed), {})


@pytest.fixture(scope="module")
def client(routing: VisionLanguageModel) -> Iterator[TestClient]:
    with client_of(routing) as client:
        yield client


def ask(client: TestClient, name: str, question: str, image: int, **more: Any) -> Response:
    body = {"model": name, "messages": messages(question, photo(image)), "max_tokens": 6, **more}
    return client.post("/v1/chat/completions", json=body)


def test_a_request_for_auto_is_answered_as_one_that_names_the_right_adapter(client: TestClient, routing: VisionLanguageModel) -> None:
    for i, (question, right) in enumerate(zip(ASKED, RIGHT, strict=True)):
        auto, named = ask(client, "auto", question, i), ask(client, right, question, i)
        assert auto.status_code == named.status_code == 200, auto.text
        again = ask(client, "auto", question, i)  # the image is known now
        assert auto.json()["choices"] == named.json()["choices"] == again.json()["choices"]
        assert again.json()["adalink"]["routed"] == auto.json()["adalink"]["routed"]
        assert auto.json()["usage"]["prompt_tokens"] == named.json()["usage"]["prompt_tokens"]
        assert auto.json()["model"] == "auto"
        assert auto.json()["adalink"]["routed"] == {right: 1.0}
        assert "routed" not in named.json()["adalink"]
        (text,) = routing.generate([decode_image(photo(i))], [question], adapter_names="auto", max_new_tokens=6)
        assert auto.json()["choices"][0]["message"]["content"] == text


def test_a_stream_ends_with_the_weights_that_served_it(client: TestClient) -> None:
    events = [json.loads(line[6:]) for line in ask(client, "auto", ASKED[0], 9, stream=True).text.split("\n\n") if line.startswith("data: {")]
    assert events[-1]["adalink"]["routed"] == {"vqa": 1.0}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == ask(client, "vqa", ASKED[0], 9).json()["choices"][0]["message"]["content"]


def test_auto_is_listed_and_neither_it_nor_its_adapters_can_be_taken_away(adapters: Path, routing: VisionLanguageModel, client: TestClient) -> None:
    listed = {entry["id"]: entry["adalink"] for entry in client.get("/v1/models").json()["data"]}
    assert list(listed) == ["cap", "vqa", "__base__", "auto"]
    assert listed["auto"]["asks"]
    assert "adalink_adapters 2.0" in client.get("/metrics").text
    with client_of(routing, ServeSettings(access=Access(adapters_folder=adapters))) as operator:
        gone = operator.delete("/v1/models/vqa")
        assert (gone.status_code, gone.json()["error"]["code"]) == (409, "routed")
        assert operator.delete("/v1/models/auto").status_code == 404
        taken = operator.post("/v1/models", json={"id": "auto", "folder": "vqa_b"})
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")


@pytest.mark.parametrize("unknown", ["base", "refuse"])
def test_a_request_like_no_example_goes_to_the_frozen_model_or_is_refused(routed: Path, unknown: str) -> None:
    model = served_model(ServeSettings(router=routed), {})
    assert model.routing is not None
    router = model.routing.router
    changed = Router(**{**vars(router), "floors": router.floors + 10, "settings": RouteSettings(unknown=unknown)})  # type: ignore[arg-type]
    model.routing = Routing(changed, model.routing.features)
    with client_of(model) as client:
        reply = ask(client, "auto", ASKED[0], 0)
        if unknown == "base":
            assert reply.json()["adalink"]["routed"] == {}
            assert reply.json()["choices"] == ask(client, "__base__", ASKED[0], 0).json()["choices"]
        else:
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_route")
            assert "the request is like none of the examples of cap, vqa" in reply.json()["error"]["message"]
        assert ask(client, "vqa", ASKED[0], 0).status_code == 200  # by name as ever


def test_requests_that_adapters_serve_together_keep_their_weights_while_others_come_and_go(model: VisionLanguageModel, adapters: Path, tmp_path: Path) -> None:
    seen = example_rows(model, SOURCE, "captioning", 40, 0)
    write_router(tmp_path, Router.fit({"cap": seen[:30], "cap_b": seen[10:]}, RouteSettings(top=0)), {name: adapters / name for name in ("cap", "cap_b")})
    mixing = served_model(ServeSettings(router=tmp_path), {})
    lengths = [2 + 3 * (i % 4) for i in range(12)]
    with client_of(mixing) as client, ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda i: ask(client, "auto" if i % 3 else "cap", "", i, max_tokens=lengths[i]).json(), range(12)))
    texts = [mixing.generate([decode_image(photo(i))], "", adapter_names=["auto" if i % 3 else "cap"], max_new_tokens=lengths[i])[0] for i in range(12)]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == texts
    routed = [reply["adalink"]["routed"] for i, reply in enumerate(replies) if i % 3]
    assert all(set(weights) == {"cap", "cap_b"} and sum(weights.values()) == pytest.approx(1, abs=1e-3) for weights in routed if weights)
    assert len({str(weights) for weights in routed}) > 4  # each has its own


def test_what_is_wrong_with_a_request_for_auto_is_named_as_for_others(client: TestClient) -> None:
    no_image = client.post("/v1/chat/completions", json={"model": "auto", "messages": messages(ASKED[0], None)})
    assert (no_image.status_code, no_image.json()["error"]["code"]) == (400, "missing")
    broken = client.post("/v1/chat/completions", json={"model": "auto", "messages": messages(ASKED[0], b"no image")})
    assert broken.status_code == 400
    assert ask(client, "auto", ASKED[0], 0, max_tokens=100_000).json()["error"]["code"] == "too_long"


def test_without_a_router_there_is_no_auto(adapters: Path) -> None:
    with client_of(adapters_on({"cap": adapters / "cap"})) as client:
        assert ask(client, "auto", "", 0).json()["error"]["code"] == "model_not_found"
