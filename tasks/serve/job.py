"""One request on its way through the model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from torch import Tensor

from multimodal.encode import Row
from multimodal.generate import GenerationSettings
from tasks.serve.sampling import Sampling

__all__ = ["Answer", "Ask", "Job", "Picture"]


@dataclass(frozen=True)
class Picture:
    """A picture: what tells it from others, and either float32 [3, H, W] as the encoder takes it, or what the encoder gave before."""

    key: str
    pixels: Tensor | None
    features: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of the model."""

    adapter: str
    row: Row
    picture: Picture
    settings: GenerationSettings
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None
    owner: str = ""  # whose request it is: what others asked is not told by the tokens that need not be read

    @property
    def kind(self) -> object:
        """Rows of one batch are of one kind: greedy and drawn ones go together, beams only with beams that are the same in everything."""
        return self.settings if self.settings.num_beams > 1 else "greedy"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, and what it took."""

    text: str
    reason: str  # "stop" or "length"
    n_prompt: int  # tokens of the prompt, the picture's among them
    n_known: int  # of these, tokens that were known from a prompt before and not read
    n_new: int  # tokens written, the end token among them
    waited: float  # seconds from the queue to the batch
    generated: float  # seconds from the batch to the end of the row
    n_rows: int  # of the batch


@dataclass(eq=False)
class Job:
    """An ask, and the way back to the request that waits for it. Pieces of text come before the answer where `streams` is set."""

    ask: Ask
    streams: bool
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[str | Answer | Exception] = field(default_factory=asyncio.Queue)
    queued: float = field(default_factory=time.perf_counter)
    cancelled: bool = False  # the client has gone: the row ends at the next token
    ended: bool = False

    def tell(self, event: str | Answer | Exception) -> None:
        """Send a piece of text, the answer or an error to the request; called from the generation thread. Nothing follows an end."""
        if self.ended:
            return
        self.ended = not isinstance(event, str)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
