"""Answers in OpenAI's shape, whole or as a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adalink import BASE_NAME
from tasks.serve.job import Answer
from tasks.serve.served import Card

__all__ = ["Reply", "event", "model_entry"]


def event(content: object) -> str:
    """One server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"


@dataclass(frozen=True)
class Reply:
    """The reply to one request.

    question   what the adapter was asked; None where its template has no place for a question
    n_unread   messages besides the last, which an adapter does not read
    system     what became of the instructions of a system message; None where there are none
    """

    model: str
    question: str | None
    n_unread: int
    system: str | None = None
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
        }


def model_entry(card: Card) -> dict[str, Any]:
    """One entry of the list of models."""
    own = {"task": card.task, "asks": card.asks, "is_base": card.name == BASE_NAME, "prompt": card.encoder.template.prompt}
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "adalink", "adalink": own}


def _chunk(delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}


def _usage(answer: Answer) -> dict[str, Any]:
    counts = {"prompt_tokens": answer.n_prompt, "completion_tokens": answer.n_new, "total_tokens": answer.n_prompt + answer.n_new}
    return {**counts, "prompt_tokens_details": {"cached_tokens": answer.n_known}}
