"""What has been written for one row so far: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

__all__ = ["Written"]


class Written:
    """The tokens of one row as they come.

    The text is what `VisionLanguageModel.generate` gives for the same tokens, cut before the first stop string. `fresh` gives it in
    pieces that join to the same text: whole words, because a later token may change the last one (half of a letter, a space before a mark).
    """

    def __init__(self, tokenizer: Any, max_tokens: int, stop: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
        """`ends`: the tokens that end a text, beside the tokenizer's own."""
        self.tokenizer = tokenizer
        self.ends = frozenset([tokenizer.eos_token_id, *ends])
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.ids: list[int] = []
        self.reason: Literal["stop", "length"] | None = None  # why it ended; None while it goes on
        self._sent = ""

    def add(self, token: int) -> None:
        """Take the next token."""
        self.ids.append(token)
        if token in self.ends or (self.stop and self._stop_at(self._decoded()) is not None):
            self.reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.reason = "length"

    @property
    def text(self) -> str:
        """All that was written, up to the first stop string."""
        decoded = self._decoded()
        return decoded[: self._stop_at(decoded)].strip()

    def fresh(self) -> str:
        """What can be sent now that was not sent before; the rest, once it has ended."""
        text = self.text
        if self.reason is None:
            text = text[: self._settled(text)].rstrip()
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def _decoded(self) -> str:
        written = self.ids[:-1] if self.ids and self.ids[-1] in self.ends else self.ids
        decoded: str = self.tokenizer.decode(written, skip_special_tokens=True)
        return decoded

    def _stop_at(self, text: str) -> int | None:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found) if found else None

    def _settled(self, text: str) -> int:
        """How many characters no later token can change: none of the last word, none of what may become a stop string."""
        settled = max(text.rfind(space) for space in (" ", "\n")) + 1
        for stop in self.stop:
            starts = [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
            settled = min(settled, len(text) - max(starts, default=0))
        return settled
