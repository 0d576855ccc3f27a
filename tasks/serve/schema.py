"""Chat requests and replies in OpenAI's shape; fields that an adapter cannot honour are refused by name."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from tasks.serve.scheduler import Answer

__all__ = [
    "AssistantMessage", "ChatRequest", "FilePart", "ImagePart", "LoadRequest", "Reply", "SystemMessage", "TextPart",
    "UserMessage", "event",
]  # fmt: skip


class _Body(BaseModel):
    """Unknown fields are refused, and nothing is converted: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Nothing = Annotated[list[None], Field(max_length=0)] | None  # asks for nothing: an empty list or null
NoWords = Annotated[dict[str, None], Field(max_length=0)] | None


class TextPart(_Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class _RefusalPart(_Body):
    type: Literal["refusal"]
    refusal: str


class _ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # the encoder has one size, so all are the same


class ImagePart(_Body):
    """An image: `data:image/png;base64,...`, or an address where the operator allows its host."""

    type: Literal["image_url"]
    image_url: _ImageUrl


class _File(_Body):
    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(_Body):
    """An image that was uploaded to /v1/files, or its data URL."""

    type: Literal["file"]
    file: _File


_Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


def _form(content: object) -> str:
    return "a list of parts" if isinstance(content, list) else "a text"


_Content = Annotated[
    Annotated[str, Tag("a text")] | Annotated[list[_Part], Field(max_length=64), Tag("a list of parts")],
    Discriminator(_form),
]
_Words = Annotated[
    Annotated[str, Tag("a text")] | Annotated[list[TextPart], Field(max_length=64), Tag("a list of parts")],
    Discriminator(_form),
]
_TextPart = Annotated[TextPart | _RefusalPart, Field(discriminator="type")]
_StopText = Annotated[str, Field(min_length=1, max_length=64)]
_Stop = Annotated[
    Annotated[str, Field(max_length=64), Tag("a text")] | Annotated[list[_StopText], Field(max_length=4), Tag("a list of texts")],
    Discriminator(lambda stop: "a list of texts" if isinstance(stop, list) else "a text"),
]


class UserMessage(_Body):
    """What is asked."""

    role: Literal["user"]
    content: _Content
    name: str | None = None

    @property
    def parts(self) -> Sequence[TextPart | ImagePart | FilePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class AssistantMessage(_Body):
    """What was answered before, in all the fields in which a client sends an answer back; a model that sees already reads it."""

    role: Literal["assistant"]
    content: str | Annotated[list[_TextPart], Field(max_length=64)] | None = None
    refusal: str | None = None
    name: str | None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, list):
            return " ".join(part.text if isinstance(part, TextPart) else part.refusal for part in self.content)
        return self.content or self.refusal or ""


class SystemMessage(_Body):
    """Instructions. A composed model does not read them: its template has no place for them."""

    role: Literal["system", "developer"]
    content: _Words
    name: str | None = None

    @property
    def text(self) -> str:
        """Its words."""
        return self.content if isinstance(self.content, str) else " ".join(part.text for part in self.content)


class _StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pieces are not padded to hide their lengths


class _Plain(_Body):
    type: Literal["text"]


class _NoCache(_Body):
    """Settings of a cache of prompts, which this server has by itself."""

    model_config = ConfigDict(extra="allow")


class ChatRequest(_Body):
    """A chat request. Fields that stand for something no adapter can do may be given with the value that asks nothing of them."""

    model: str
    messages: list[Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)  # 0, and without it: greedy
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    num_beams: int | None = Field(default=None, ge=1)  # beyond OpenAI's
    length_penalty: float | None = Field(default=None, ge=-10, le=10, allow_inf_nan=False)  # beyond OpenAI's, of beams
    # What names the caller's own things, and changes nothing.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: _NoCache | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # What asks for nothing that an adapter does not do.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    logit_bias: NoWords = None
    response_format: _Plain | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None

    @property
    def has_instructions(self) -> bool:
        """Whether a system message says anything."""
        return any(message.text.strip() for message in self.messages if isinstance(message, SystemMessage))


class LoadRequest(_Body):
    """An adapter to load: its name from now on, and its folder inside the operator's."""

    id: str = Field(min_length=1, max_length=100)
    folder: str = Field(min_length=1, max_length=1000)


# ----------------------------------------
# Answers in OpenAI's shape, whole or as a stream.


def event(content: object) -> str:
    """One server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"


@dataclass(frozen=True)
class Reply:
    """The reply to one request.

    question   what the adapter was asked; None where its template has no place for a question
    n_unread   messages that are not read: of a composed model all besides the last
    system     what became of the instructions of a system message; None where there are none
    routed     the weights of the adapters that a router chose, none where the frozen model serves; None where no router was asked
    """

    model: str
    question: str | None
    n_unread: int
    system: str | None = None
    routed: Mapping[str, float] | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(answer), "adalink": self._own(answer)}

    def piece(self, delta: Mapping[str, str]) -> str:
        """A piece of a stream."""
        return event({**self._head("chat.completion.chunk"), "choices": [_chunk(delta, None)]})

    def end(self, answer: Answer, *, include_usage: bool) -> str:
        """The last events of a stream."""
        head = self._head("chat.completion.chunk")
        last = event({**head, "choices": [_chunk({}, answer.reason)], "adalink": self._own(answer)})
        usage = event({**head, "choices": [], "usage": _usage(answer)}) if include_usage else ""
        return last + usage + event("[DONE]")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _own(self, answer: Answer) -> dict[str, Any]:
        """What OpenAI's shape has no place for."""
        return {
            "question": self.question,
            "messages_not_read": self.n_unread,
            "system_message": self.system,
            "waited_ms": round(1000 * answer.waited, 1),
            "generated_ms": round(1000 * answer.generated, 1),
            "batch_rows": answer.n_rows,
            **({} if self.routed is None else {"routed": {name: round(weight, 4) for name, weight in self.routed.items()}}),
        }


def _chunk(delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}


def _usage(answer: Answer) -> dict[str, Any]:
    counts = {"prompt_tokens": answer.n_prompt, "completion_tokens": answer.n_new, "total_tokens": answer.n_prompt + answer.n_new}
    return {**counts, "prompt_tokens_details": {"cached_tokens": answer.n_known}}
