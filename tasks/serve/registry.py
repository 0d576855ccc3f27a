"""The adapters that are served, by name; they come and go while others work."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adalink import BASE_NAME, AdaptedModel
from adalink.errors import AdalinkError, ConfigError
from multimodal.batches.tokenize import RowEncoder
from multimodal.encoders.tower import has_vision_adapter
from multimodal.model import VisionLanguageModel
from tasks.serve.engine import Worker
from tasks.serve.errors import Refused

__all__ = ["Card", "Served", "check_served"]


def check_served(folder: Path) -> None:
    """Raise ConfigError for an adapter that does not write: a server streams texts token by token."""
    if n_answers := AdaptedModel.read_config(folder).task.get("answers"):
        raise ConfigError(f"the adapter in {folder} chooses among {n_answers} answers, and a server writes its texts: use `adalink ask` or `adalink evaluate`")


@dataclass(eq=False)
class Card:
    """One served adapter."""

    name: str
    task: str  # "captioning", "vqa"; "" for the frozen language model alone
    encoder: RowEncoder
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    n_readers: int = 0  # requests that are being read for it, and do not wait in the queue yet

    @property
    def asks(self) -> bool:
        """Whether its template has a place for a question."""
        return "{question}" in self.encoder.template.prompt


class Served:
    """The cards of all adapters. Used by the event loop alone; whatever touches the model is done between two batches.

    An adapter that is taken away gets no new requests from then on, and leaves when those that it has are answered.
    """

    def __init__(self, model: VisionLanguageModel, worker: Worker) -> None:
        self.model = model
        self.worker = worker
        # A tokenizer of its own: requests are read while the generation thread decodes with the model's.
        self._language = dataclasses.replace(model.language, tokenizer=copy.deepcopy(model.language.tokenizer))
        self.cards: dict[str, Card] = {name: self._card(name) for name in [*model.adapted.adapters, BASE_NAME]}
        self._changing: set[str] = set()

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Card]:
        """The card of a model that a request names; a job that is queued inside the block is answered, whatever is unloaded. Raises Refused."""
        card = self.cards.get(name)
        if card is None:
            raise Refused(404, f"there is no model {name!r}: there are {', '.join(self.cards)}", field="model", code="model_not_found")
        card.n_readers += 1
        try:
            yield card
        finally:
            card.n_readers -= 1

    async def load(self, name: str, folder: Path) -> Card:
        """Serve one more adapter. Raises Refused where the name is taken, or the folder holds no adapter for these frozen parts."""
        if name in self.cards or name in self._changing:
            raise Refused(409, f"the model {name!r} is there already: delete it first, or give another id", field="id", code="name_taken")
        with self._busy(name):
            try:
                card = await asyncio.wrap_future(self.worker.between_batches(lambda: self._loaded(name, folder)))
            except AdalinkError as error:
                raise Refused(400, str(error), field="folder" if name.isidentifier() else "id", code="not_loadable") from None
            self.cards[name] = card
        return card

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, once its requests are answered."""
        if name not in self.cards or name == BASE_NAME:
            there = ", ".join(other for other in self.cards if other != BASE_NAME) or "none"
            raise Refused(404, f"there is no adapter {name!r} to take away: there are {there}", field="model", code="model_not_found")
        card = self.cards.pop(name)
        with self._busy(name):
            while card.n_readers:
                await asyncio.sleep(0.005)
            await asyncio.wrap_future(self.worker.between_batches(lambda: self.worker.delete_adapter(name), after=name))

    @contextlib.contextmanager
    def _busy(self, name: str) -> Iterator[None]:
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    def _loaded(self, name: str, folder: Path) -> Card:
        check_served(folder)
        if has_vision_adapter(folder):
            raise ConfigError(f"the adapter in {folder} was trained with an adapted encoder, which is settled when a server starts: give it with --adapter")
        self.model.load_adapter(folder, name)
        try:
            return self._card(name)
        except AdalinkError:
            self.model.delete_adapter(name)
            raise

    def _card(self, name: str) -> Card:
        """Raises ConfigError for an adapter whose template cannot be read."""
        slots = self.model.adapted.serving(1, [name]).slots[0]
        task = str(self.model.adapted.tasks.get(name, {}).get("task", ""))
        return Card(name, task, RowEncoder(self.model.template_of(name), self._language, slots))
