"""Who may use a server: names it answers to, web pages of other origins, bodies that a page can send without being asked, owners of keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server, messages, photo, serving
from shared import PATIENCE

pytestmark = pytest.mark.long  # with the other tests of the server
QUESTION = "is it red?"
APP = "https://app.example"


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE)


@pytest.fixture(scope="module")
def guarded(adapters: Path, model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys, one of them no ASCII, a name of its own and a page of another origin that may use it."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first\nclé-2\n", encoding="utf-8")
    with serving(adapters, "--access.api_keys", keys, "--access.hosts", "demo.example", "--access.origins", f'["{APP}"]', names=("vqa",)) as found:
        yield found


def body(question: str = QUESTION, index: int = 0) -> dict[str, Any]:
    return {"model": "vqa", "max_tokens": 4, "messages": messages(question, photo(index))}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil", "", "[::1", "user@evil.example"])
def test_a_request_under_another_name_is_refused_on_every_route(host: str, client: httpx.Client) -> None:
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("DELETE", "/v1/models/cap")):
        response = client.request(method, path, headers={"host": host})
        assert response.status_code in (400, 403), (method, path)
        assert response.status_code == 400 or response.json()["error"]["code"] == "wrong_host"  # 400: h11 takes it for no host at all


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "LOCALHOST.", "127.0.0.1", "[::1]:8000", "192.168.1.7:8000"])
def test_the_loopback_and_addresses_are_names_of_every_server(host: str, client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "http://localhost", "null", "http://127.0.0.1.evil.example"])
def test_a_page_of_another_origin_changes_nothing(origin: str, client: httpx.Client) -> None:
    sent = {"headers": {"origin": origin}}
    for response in (
        client.post("/v1/chat/completions", json=body(), **sent), client.post("/v1/models", json={"id": "x", "folder": "cap"}, **sent),
        client.delete("/v1/models/cap", **sent), client.post("/v1/files", files={"file": ("a.png", photo(0))}, **sent), client.delete("/v1/files/x", **sent),
    ):  # fmt: skip
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in response.headers
    assert next(card["id"] for card in client.get("/v1/models").json()["data"]) == "cap"
    preflight = client.options("/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers


def test_the_page_of_the_server_itself_may_use_it(client: httpx.Client, server: Server) -> None:
    assert client.post("/v1/chat/completions", json=body(), headers={"origin": server.url}).status_code == 200
    renamed = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert client.post("/v1/chat/completions", json=body(), headers=renamed).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"])
def test_a_body_that_is_not_said_to_be_json_is_refused(kind: str, client: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/v1/models"):
        response = client.post(path, content=json.dumps(body()), headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["param"]) == (415, "content-type")
        assert "expected application/json" in response.json()["error"]["message"]
    for right in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"):
        assert client.post("/v1/chat/completions", content=json.dumps(body()), headers={"content-type": right}).status_code == 200


def test_a_name_and_an_origin_that_the_operator_allows(guarded: Server) -> None:
    client = httpx.Client(base_url=guarded.url, timeout=PATIENCE, headers={"authorization": "Bearer first"})
    assert client.get("/v1/models", headers={"host": "demo.example:443"}).status_code == 200
    assert client.get("/v1/models", headers={"host": "other.example"}).status_code == 403
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    preflight = client.options("/v1/chat/completions", headers={"origin": APP, **asks})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, APP)
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    for sent, status in ((body(), 200), ({}, 400)):  # a page may read what is wrong, too
        answer = client.post("/v1/chat/completions", json=sent, headers={"origin": APP})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, APP)
    assert client.post("/v1/chat/completions", json=body(), headers={"origin": "https://other.example"}).status_code == 403


def test_what_another_owner_asked_is_not_told(guarded: Server) -> None:
    def cached(key: str) -> int:
        sent = httpx.post(f"{guarded.url}/v1/chat/completions", json=body(index=41), headers={"authorization": f"Bearer {key}".encode()}, timeout=PATIENCE)
        assert sent.status_code == 200, sent.text
        return int(sent.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(key) for key in ("first", "clé-2")] == [0, 0]
    assert min(cached(key) for key in ("first", "clé-2")) > 0
