"""What the official clients and their users send: answers that come back, fields that ask for nothing, base64 of every encoder."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from served import Server, data_url, messages, photo
from shared import PATIENCE

from tasks.serve.schema import ChatRequest

QUESTION = "is it red?"


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE)


def sent(client: httpx.Client, **change: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "vqa", "max_tokens": 4, "messages": messages(QUESTION, photo(0)), **change})


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


HEAD, _, DIGITS = data_url(photo(0)).partition(",")
LINES = base64.encodebytes(photo(0)).decode()
URLS = {
    "lines of 76 characters": f"{HEAD},{LINES}",
    "lines that end as in MIME": f"{HEAD},{LINES}".replace("\n", "\r\n"),
    "a line break at the end": f"{HEAD},{DIGITS}\n",
    "a space after the comma": f"{HEAD}, {DIGITS}",
    "tabs": f"{HEAD},\t{DIGITS[:50]}\t{DIGITS[50:]}",
    "white space around it": f"\n  {HEAD},{DIGITS}  ",
    "the alphabet of addresses": f"{HEAD},{base64.urlsafe_b64encode(photo(0)).decode()}",
    "no padding": f"{HEAD},{DIGITS.rstrip('=')}",
    "percent signs": f"{HEAD},{quote(DIGITS, safe='')}",
    "lines in percent signs": f"{HEAD},{quote(LINES)}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{DIGITS}",
    "a parameter that is a name": f"data:image/png;name=scene.png;base64,{DIGITS}",
    "another kind": f"data:application/octet-stream;base64,{DIGITS}",
    "no kind": f"data:;base64,{DIGITS}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{DIGITS}",
}


@pytest.mark.parametrize("name", URLS)
def test_base64_is_read_as_browsers_read_it(name: str, client: httpx.Client) -> None:
    parts = [{"type": "image_url", "image_url": {"url": URLS[name]}}, {"type": "text", "text": QUESTION}]
    assert text(sent(client, messages=[{"role": "user", "content": parts}])) == text(sent(client))
    parts[0] = {"type": "file", "file": {"file_data": URLS[name], "filename": "a.png"}}
    assert text(sent(client, messages=[{"role": "user", "content": parts}])) == text(sent(client))


NOTHING: tuple[dict[str, Any], ...] = (
    {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []}, {"function_call": "none"}, {"n": 1},
    {"logprobs": False}, {"top_logprobs": 0}, {"logit_bias": {}}, {"response_format": {"type": "text"}}, {"store": False}, {"metadata": {}}, {"user": "me"},
    {"metadata": {"who": "me"}}, {"service_tier": "auto"}, {"service_tier": "default"}, {"modalities": ["text"]}, {"presence_penalty": 0}, {"frequency_penalty": 0.0},
    {"stop": []}, {"stop": ""}, {"stream": False, "stream_options": None}, {"prompt_cache_key": "k"}, {"safety_identifier": "s"}, {"temperature": 0}, {"top_p": 1},
    {"max_completion_tokens": 4}, {"stream_options": {"include_usage": None}},
)  # fmt: skip


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_a_field_that_asks_for_nothing_changes_nothing(fields: dict[str, Any], client: httpx.Client) -> None:
    assert text(sent(client, **fields)) == text(sent(client))


def test_null_stands_for_every_field_that_is_optional(client: httpx.Client) -> None:
    """Of OpenAI's client, as it is installed, and of ours."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    names = {*CompletionCreateParamsBase.__annotations__, "stream", *ChatRequest.model_fields} - {"model", "messages"}
    assert text(sent(client, **{**dict.fromkeys(names), "max_tokens": 4})) == text(sent(client))
    asked = messages(QUESTION, photo(0))
    asked[0]["name"] = None
    asked[0]["content"][0]["image_url"]["detail"] = None
    assert text(sent(client, messages=asked)) == text(sent(client))


def test_an_answer_that_a_client_sends_back_is_taken(server: Server, client: httpx.Client) -> None:
    official = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    asked: Any = messages(QUESTION, photo(0))
    answer = official.chat.completions.create(model="vqa", messages=asked, max_tokens=4).choices[0].message
    again = {"role": "user", "content": QUESTION}
    for back in (
        answer, answer.model_dump(), answer.model_dump(exclude_none=True), {**answer.model_dump(), "annotations": [], "tool_calls": []},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": ""}, {"role": "assistant", "content": None, "refusal": "no"},
    ):  # fmt: skip
        reply = official.chat.completions.create(model="vqa", messages=[*asked, back, again], max_tokens=4)  # type: ignore[list-item]
        assert reply.choices[0].message.content == text(sent(client))
        assert reply.model_extra is not None
        assert reply.model_extra["adalink"]["messages_not_read"] == 2


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_are_said_to_be_unread(role: str, client: httpx.Client) -> None:
    asked = messages(QUESTION, photo(0))
    for content, stated in (("be brief", True), ([{"type": "text", "text": "be brief"}], True), ("", False), ([], False), ("  ", False)):
        for order in ([{"role": role, "content": content}, *asked], [*asked, {"role": role, "content": content}]):
            response = sent(client, messages=order)
            assert text(response) == text(sent(client))
            assert bool(response.json()["adalink"]["system_message"]) == stated
