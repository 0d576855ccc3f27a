"""What is wrong with a request is told in one sentence with the field's name, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server, data_url, messages, photo, serving
from shared import PATIENCE


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of a few bytes that promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def image(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "is it red?"}]}]


@dataclass(frozen=True)
class Case:
    """A bad request: what replaces parts of a good one, and what is told."""

    change: Any
    status: int
    field: str | None
    note: str

    def sent(self, client: httpx.Client, model: str) -> httpx.Response:
        if isinstance(self.change, bytes):
            return client.post("/v1/chat/completions", content=self.change)
        return client.post("/v1/chat/completions", json={"model": model, "messages": messages("is it red?", photo(0)), **self.change})


URL = "messages[0].content[0].image_url.url"
BAD = (
    Case(b"", 400, None, "the body is no JSON"),
    Case(b"{", 400, None, "the body is no JSON"),
    Case(b"[]", 400, None, "the body is []"),
    Case(b"\xff\xfe", 400, None, "the body is no JSON"),
    Case(b"[" * 100_000, 400, None, "recursion limit"),
    Case(b'{"model":"x","messages":[' + b"1," * 100_000, 413, None, "commas"),
    Case({"model": "nobody"}, 404, "model", "there is no model 'nobody': there are"),
    Case({"model": 5}, 400, "model", "model is 5"),
    Case({"messages": []}, 400, "messages", "at least 1"),
    Case({"messages": "hello"}, 400, "messages", "messages is 'hello'"),
    Case({"messages": [{"role": "system", "content": "be brief"}]}, 400, "messages[0].role", "is 'system', expected the last message to be the user's"),
    Case({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "messages[0].role is 'king': expected one of 'user', 'assistant'"),
    Case({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text", "is missing"),
    Case({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, 400, "messages[0].content[0].type", "is 'sound'"),
    Case({"messages": messages("x", photo(0)) + [{"role": "assistant", "content": "y"}]}, 400, "messages[1].role", "the last message to be the user's"),
    Case({"messages": image(data_url(photo(0))) + image(data_url(photo(1)))}, 400, "messages[1].content[0]", "a second image"),
    Case({"messages": image(data_url(b"8BPS, or so"))}, 400, URL, "none of jpg, png, webp, gif"),
    Case({"messages": image(data_url(photo(0)[:2000]))}, 400, URL, "truncated"),
    Case({"messages": image(data_url(b""))}, 400, URL, "0 bytes"),
    Case({"messages": image("data:image/png;base64,%%%")}, 400, URL, "is no base64"),
    Case({"messages": image("ftp://example.com/a.png")}, 400, URL, "expected data:image/"),
    Case({"messages": image("http://127.0.0.1/a.png")}, 400, URL, "fetches no images"),
    Case({"messages": image(data_url(bomb()))}, 413, URL, "20000 x 20000 pixels, and the limit is 4000000"),
    Case({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "tools is [{'type': 'function'"),
    Case({"colour": 1}, 400, "colour", "there is no field colour"),
    Case({"logprobs": True}, 400, "logprobs", "logprobs is True"),
    Case({"store": True}, 400, "store", "store is True"),
    Case({"response_format": {"type": "json_object"}}, 400, "response_format.type", "response_format.type is 'json_object'"),
    Case({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}, {"type": "text", "text": "is it red?"}]}]}, 400, "messages[0].content[0].file", "neither"),
    Case({"n": 2}, 400, "n", "n is 2"),
    Case({"temperature": -1}, 400, "temperature", "temperature is -1"),
    Case({"top_p": 0}, 400, "top_p", "top_p is 0"),
    Case({"stop": [""]}, 400, "stop[0]", "at least 1 character"),
    Case({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
    Case({"stream": "yes"}, 400, "stream", "stream is 'yes'"),
    Case({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0"),
    Case({"max_tokens": 513}, 400, "max_tokens", "the limit is 512"),
    Case({"max_tokens": 500}, 400, "messages", "the language model has 512"),
    Case({"num_beams": 9}, 400, "num_beams", "the limit is 8"),
    Case({"num_beams": 2, "temperature": 1}, 400, "temperature", "beams know no temperature"),
    Case({"messages": messages("word " * 2000, photo(0))}, 400, "messages", "8041 tokens"),
    Case({"messages": messages("x" * 40_000, photo(0))}, 400, "messages", "40000 bytes of text"),
)  # fmt: skip
ONLY_OF_QUESTIONS = (
    Case({"messages": messages("", photo(0))}, 400, "messages[0].content", "the last message has none"),
    Case({"messages": messages("is it red?", None)}, 400, "messages", "hold no image"),
    Case({"messages": image(data_url(b"\x89PNG" + b"\0" * 2_100_000))}, 413, URL, "more than 2000000 bytes"),
    Case({"messages": image(data_url(b"\0" * 3_000_000))}, 413, None, "the body has more than 3000000 bytes"),
)


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE)


def works(client: httpx.Client) -> bool:
    good = {"model": "vqa", "messages": messages("is it red?", photo(0))}
    return client.post("/v1/chat/completions", json=good).status_code == 200


@pytest.mark.parametrize("case", [*BAD, *ONLY_OF_QUESTIONS], ids=lambda case: case.note[:40])
def test_a_bad_request_is_told_what_is_wrong_and_where(case: Case, client: httpx.Client) -> None:
    response = case.sent(client, "vqa")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (case.status, case.field), error
    assert case.note in error["message"]
    assert len(error["message"]) < 500


def test_wrong_paths_and_methods_are_told(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing: the API is at /v1"
    response = client.put("/v1/models")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")
    assert response.json()["error"]["message"] == "PUT is not for /v1/models: use GET, POST"


def test_wrong_uploads_are_told(client: httpx.Client) -> None:
    for sent, note in (
        ({"files": {"file": ("a.png", b"8BPS89a..")}}, "none of jpg"), ({"files": {"other": ("a.png", b"x")}}, "no field `file`"), ({"json": {}}, "no multipart form"),
        ({"files": {"file": ("a.png", bomb())}}, "20000 x 20000 pixels"), ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "cannot be read"),
    ):  # fmt: skip
        response = client.post("/v1/files", **sent)  # type: ignore[arg-type]
        assert response.status_code in (400, 413)
        assert note in response.json()["error"]["message"]


def test_wrong_loads_are_told(client: httpx.Client) -> None:
    for body, status, field, note in (
        ({"id": "x", "folder": "../.."}, 400, "folder", "no folder inside of the operator's"), ({"id": "x", "folder": "/etc"}, 400, "folder", "no folder inside"),
        ({"id": "x", "folder": "."}, 400, "folder", "no folder inside"), ({"id": "x", "folder": "cap/\0"}, 400, "folder", "no folder inside"),
        ({"id": "cap", "folder": "vqa"}, 409, "id", "is there already"), ({"id": "a-b", "folder": "vqa"}, 400, "id", "give an identifier"),
        ({"id": "x"}, 400, "folder", "folder is missing"), ({"id": "__base__", "folder": "cap"}, 409, "id", "is there already"),
    ):  # fmt: skip
        response = client.post("/v1/models", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, field)
        assert note in response.json()["error"]["message"]
    assert "application/json" in client.post("/v1/models", content=b"{}").json()["error"]["message"]
    assert "no adapter '__base__' to take away" in client.delete("/v1/models/__base__").json()["error"]["message"]


def opened(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def answered(server: Server, sent: bytes) -> bytes:
    """All that the server says to this, until it closes the connection."""
    with opened(server) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.usefixtures("model")
def test_a_client_that_sends_too_slowly_is_told_and_let_go(adapters: Path) -> None:
    """By a server of its own: one that is so impatient may let go of any client of a machine that is busy, so here they try again."""
    header = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"

    def in_the_end(happens: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, httpx.TransportError):
                if happens():
                    return
            assert time.monotonic() < give_up

    with serving(adapters, "--limits.seconds", "1", names=("vqa",)) as server:
        in_the_end(lambda: answered(server, header).startswith(b"HTTP/1.1 408 "))
        in_the_end(lambda: b"did not arrive within 1 seconds" in answered(server, header + b"Content-Length: 1000\r\n\r\n{"))
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            in_the_end(lambda: works(client))


def test_a_connection_that_is_cut_leaves_nothing_behind(server: Server, client: httpx.Client) -> None:
    good = json.dumps({"model": "cap", "messages": messages("", photo(0)), "stream": True, "max_tokens": 400, "temperature": 2, "seed": 1}).encode()
    for sent in (good, good[: len(good) // 2]):
        for _ in range(5):
            with opened(server) as connection:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(good) + sent)
                time.sleep(0.02)
    give_up = time.monotonic() + PATIENCE
    while server.metric('adalink_requests_total{model="cap",status="499"}') == 0 and server.metric("adalink_waiting"):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert works(client)
    assert "Traceback" not in server.log.read_text()


def test_memory_stays_bounded_over_bad_requests(server: Server, client: httpx.Client) -> None:
    def send(times: int) -> int:
        for _ in range(times):
            for case in BAD:
                case.sent(client, "vqa")
        return server.rss()

    before = send(2)
    assert send(6) - before < 60 * 2**20
    assert works(client)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.usefixtures("model")
def test_connections_that_never_ask_hold_up_nobody_and_fill_no_log(adapters: Path) -> None:
    with serving(adapters, "--limits.connections", "20", "--limits.seconds", PATIENCE, names=("vqa",)) as server, contextlib.ExitStack() as stack:
        before = server.log.stat().st_size
        idle = [stack.enter_context(opened(server)) for _ in range(100)]
        for connection in idle:
            with contextlib.suppress(OSError):  # closed already, to make room
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            assert client.get("/health").status_code == 200
            assert works(client)
        with contextlib.suppress(ConnectionError):  # or it was told and closed before it sent anything
            assert idle[0].recv(65536).startswith((b"HTTP/1.1 503 ", b""))
        assert server.log.stat().st_size == before
