"""From the body of a chat request to what is asked of the model: the adapter, its images, its question or conversation, its settings, within the limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import copy
import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from PIL import Image
from pydantic import BaseModel, ValidationError

from adalink import BASE_NAME, AdaptedModel
from adalink.attachment.inputs import Route
from adalink.errors import AdalinkError, ConfigError, DataError
from adalink.tokens import AUTO
from multimodal.batches.collate import stacked
from multimodal.batches.prepared import joined
from multimodal.batches.tokenize import Row, RowEncoder, TextTooLong
from multimodal.data.images.decode import BadImage
from multimodal.encoders.tower import has_vision_adapter
from multimodal.existing.conversation import Prompt, Turn
from multimodal.existing.rows import ConversationRows
from multimodal.existing.tower import ModelTower, Preparing
from multimodal.generation.decoding import check_room
from multimodal.generation.routing import Routing
from multimodal.generation.settings import GenerationChoice, GenerationSettings, saved_generation
from multimodal.model import VisionLanguageModel
from tasks.serve.engine import Worker
from tasks.serve.errors import Refused
from tasks.serve.sampling import Sampling
from tasks.serve.scheduler import Ask, ServedImage
from tasks.serve.schema import AssistantMessage, ChatRequest, FilePart, ImagePart, SystemMessage, TextPart, UserMessage
from tasks.serve.settings import RequestLimits

__all__ = ["Card", "Question", "Reader", "Served", "Source", "check_served", "read_json"]


# ----------------------------------------
# A body, checked field by field.


N_DISPLAYED = 60  # characters of a wrong value
N_COMMAS = 50_000  # of a body; a wrong one gets an error object for each of its values, and an image in base64 has none

Body = TypeVar("Body", bound=BaseModel)


def read_json(body: bytes, kind: type[Body]) -> Body:
    """The body as `kind`. Raises Refused, which names the first field that is wrong."""
    if body.count(b",") > N_COMMAS:
        raise Refused(413, f"the body holds {body.count(b',')} commas, and the limit is {N_COMMAS}: send fewer values", code="too_many_values")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> Refused:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    field, value = _path(first["loc"]), first["input"]
    if first["type"] == "missing":
        return Refused(400, f"{field} is missing: give it", field=field, code="missing")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"there is no field {field}, or no adapter can honour it: leave it out", field=field, code="unknown_field")
    if first["type"].startswith("union_tag") and isinstance(value, dict):
        name = str(first["ctx"]["discriminator"]).strip("'")
        expected = first["ctx"].get("expected_tags", "'role' or 'type'")
        return Refused(400, f"{field}.{name} is {value.get(name)!r:.60}: expected one of {expected}", field=f"{field}.{name}")
    displayed = repr(value)
    displayed = displayed if len(displayed) <= N_DISPLAYED else displayed[:N_DISPLAYED] + "..."
    return Refused(400, f"{field or 'the body'} is {displayed}: {first['msg'][0].lower()}{first['msg'][1:]}", field=field or None)


def _path(where: Sequence[int | str]) -> str:
    """("messages", 0, "user", "content", "a text") -> "messages[0].content": without the names of the alternatives."""
    path, previous = "", None
    for step in where:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not isinstance(previous, int) and step.isidentifier() and step != "str":  # the name of an alternative follows its place in a list
            path += f".{step}" if path else step
        previous = step
    return path


# ----------------------------------------
# The adapters that may be asked, by name; they come and go while others work.


def check_served(folder: Path) -> None:
    """Raise ConfigError for an adapter that does not write: a server streams texts token by token."""
    if n_answers := AdaptedModel.read_config(folder).task.get("answers"):
        raise ConfigError(f"the adapter in {folder} chooses among {n_answers} answers, and a server writes its texts: use `adalink ask` or `adalink evaluate`")


@dataclass(eq=False)
class Card:
    """One served adapter."""

    name: str
    task: str  # "captioning", "vqa"; "" for the frozen language model alone
    encoder: RowEncoder | ConversationRows
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))  # seconds since 1970
    n_readers: int = 0  # requests that are being read for it, and do not wait in the queue yet

    @property
    def asks(self) -> bool:
        """Whether its template has a place for a question; some adapter's has that a router may choose."""
        return self.name == AUTO or "{question}" in self.encoder.template.prompt


class Served:
    """The cards of all adapters. Used by the event loop alone; whatever touches the model is done between two batches.

    An adapter that is taken away gets no new requests from then on, and leaves when those that it has are answered.
    """

    def __init__(self, model: VisionLanguageModel, worker: Worker) -> None:
        self.model = model
        self.worker = worker
        # A tokenizer of their own: requests are read while the generation thread decodes with the model's.
        self._processor = model.tower.processor.copied() if isinstance(model.tower, ModelTower) else None
        self.prepare: Callable[[Image.Image], Any] = model.tower.preprocess if self._processor is None else Preparing(self._processor.copied())
        self.language = replace(model.language, tokenizer=copy.deepcopy(model.language.tokenizer) if self._processor is None else self._processor.tokenizer)
        self.cards: dict[str, Card] = {name: self._card(name) for name in [*model.adapted.adapters, BASE_NAME]}
        if model.routing is not None:
            self.cards.setdefault(AUTO, Card(AUTO, "", self.cards[BASE_NAME].encoder))
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
        if self.model.routing is not None and name in self.model.routing.router.names:
            raise Refused(409, f"the adapter {name!r} is one of those that the router chooses among: start a server without it", field="model", code="routed")
        if name not in self.cards or name in (BASE_NAME, AUTO):
            there = ", ".join(other for other in self.cards if other not in (BASE_NAME, AUTO)) or "none"
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
            if self.model.connectors is not None and self.model.connectors.has_own(name) and not self.worker.features.keeps_images:
                raise ConfigError(
                    f"the adapter in {folder} has a connector of its own, and this server started without such an adapter, so it caches no images: give it "
                    "with --adapter"
                )
            return self._card(name)
        except AdalinkError:
            self.model.delete_adapter(name)
            raise

    def _card(self, name: str) -> Card:
        """Raises ConfigError for an adapter whose template cannot be read."""
        slots = self.model.adapted.serving(1, [name]).slots[0]
        task = str(self.model.adapted.tasks.get(name, {}).get("task", ""))
        template, tower = self.model.template_of(name), self.model.tower
        if isinstance(tower, ModelTower):
            return Card(name, task, tower.row_encoder(template, slots, self._processor))
        return Card(name, task, RowEncoder(template, self.language, slots))


# ----------------------------------------
# A request, as what is asked of the model.


TOKENS = "max_completion_tokens"
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Source:
    """Where an image of a request is: its bytes, or the id of an upload, or an address; and the field that names it."""

    field: str
    data: bytes | None = None
    file_id: str | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a request asks, before its images are there.

    text      the question that is read; None where the adapter's template has no place for one
    prompt    the same, or all turns of the conversation, for a model that reads them
    row       of a composed model, whose image has as many tokens as any other
    sources   where the images are, in their order
    n_unread  messages that are not read
    system    what becomes of the instructions of a system message; None where there are none
    """

    card: Card
    text: str | None
    prompt: Prompt
    row: Row | None
    sources: tuple[Source, ...]
    settings: GenerationSettings
    stop: tuple[str, ...]
    sampling: Sampling | None
    n_unread: int
    system: str | None


NO_PLACE = "not read: the adapter's template has no place for instructions"


class Reader:
    """Makes asks of requests; called from several threads.

    prepare    an image, to what the tower takes; raises DataError
    features   of an image that was seen before, by the sum of its bytes
    decode     an image; raises BadImage
    routing    what chooses adapters, with a tokenizer of its own; None without a router
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        limits: RequestLimits,
        default: GenerationChoice,
        prepare: Callable[[Image.Image], Any],
        *,
        features: Callable[[str], Any],
        decode: Callable[[bytes], Image.Image],
        routing: Routing | None = None,
    ) -> None:
        self.model = model
        self.routing = routing
        self.limits = limits
        self.default = default
        self.prepare = prepare
        self.features = features
        self.decode = decode
        self._several = isinstance(model.tower, ModelTower)  # a composed model reads one image
        self._blank = () if self._several else (ServedImage("", model.tower.preprocess(Image.new("RGB", (64, 64), "white"))),)
        self._tokenizing = threading.Lock()  # fast tokenizers refuse to be used by two threads at once

    def question(self, request: ChatRequest, card: Card) -> Question:
        """What is asked, but for its images. Raises Refused."""
        settings = self._settings(request, card)
        text = self._text(request, card)
        row = None if card.encoder.reads_images else self._row(card, text, None, settings)
        sources = self._sources(request, card)
        stop = () if not request.stop else (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        sampling = _sampling(request)
        for field, is_given in (("temperature", sampling), ("stop", stop)):
            if is_given and settings.num_beams > 1:
                raise Refused(400, f"{field} and num_beams were both given, and beams know no {field}: leave one of them out", field=field)
        reads_turns = card.encoder.reads_turns
        return Question(
            card=card, text=text if card.asks else None, prompt=_turns(request) if card.encoder.reads_images else text, row=row, sources=sources,
            settings=settings, stop=stop, sampling=sampling, n_unread=0 if reads_turns else len(request.messages) - 1,
            system=None if not request.has_instructions else "read" if reads_turns else NO_PLACE,
        )  # fmt: skip

    def to_route(self, request: ChatRequest, card: Card) -> tuple[str, tuple[Source, ...]]:
        """What a router reads of a request: the question, and where its images are. Raises Refused."""
        return self._text(request, card), self._sources(request, card)

    def route(self, prompt: str, images: Sequence[ServedImage]) -> Route | None:
        """Which adapter serves a request about images that were seen before; None where one was not, and is to be encoded first."""
        features = [image.features for image in images if image.features is not None]
        if self.routing is None or len(features) < len(images):
            return None
        with self._tokenizing:
            return self.routing.routes(stacked([joined(features) if self._several else features[0]]), [0], [prompt])[0]

    def ask(self, question: Question, images: Sequence[ServedImage], owner: str = "", route: Route | None = None) -> Ask:
        """What is asked, with its images; route: the name of its adapter where a router chose it. Raises Refused."""
        row = question.row or self._row(question.card, question.prompt, joined([image.prepared for image in images]), question.settings)
        return Ask(
            adapter=route or question.card.name, row=row, images=tuple(images) or self._blank, settings=question.settings, stop=question.stop,
            sampling=question.sampling, owner=owner,
        )  # fmt: skip

    def _settings(self, request: ChatRequest, card: Card) -> GenerationSettings:
        """What the request says, else what the operator chose, else what the adapter was saved with, as far as the limits go."""
        saved = saved_generation(self.model.adapted.tasks.get(card.name, {}))
        within = replace(
            saved, max_new_tokens=min(saved.max_new_tokens, self.limits.new_tokens), num_beams=min(saved.num_beams, self.limits.beams)
        )  # fmt: skip
        default = self.default.over(within)
        field = TOKENS if request.max_completion_tokens is not None else "max_tokens"
        n_new = request.max_completion_tokens or request.max_tokens or default.max_new_tokens
        if n_new > self.limits.new_tokens:
            raise Refused(400, f"{field} is {n_new}, and the limit is {self.limits.new_tokens}: ask for fewer", field=field, code="too_long")
        # A request that draws its tokens has no use for the beams that the operator made the default.
        beams = request.num_beams or (1 if request.temperature or request.stop else default.num_beams)
        if beams > self.limits.beams:
            raise Refused(400, f"num_beams is {beams}, and the limit is {self.limits.beams}: ask for fewer", field="num_beams")
        penalty = default.length_penalty if request.length_penalty is None else request.length_penalty
        return replace(default, max_new_tokens=n_new, num_beams=beams, length_penalty=penalty)

    def _text(self, request: ChatRequest, card: Card) -> str:
        """The texts of the last message, which must be the user's."""
        texts = [part.text for message in request.messages if isinstance(message, UserMessage) for part in message.parts if isinstance(part, TextPart)]
        if card.encoder.reads_turns:
            texts += [message.text for message in request.messages if not isinstance(message, UserMessage)]
        if (n_bytes := sum(len(text.encode()) for text in texts)) > self.limits.text_bytes:
            raise Refused(400, f"messages hold {n_bytes} bytes of text, and the limit is {self.limits.text_bytes}", field="messages", code="too_long")
        others = [(at, message) for at, message in enumerate(request.messages) if not isinstance(message, SystemMessage)]
        at, last = others[-1] if others else (0, request.messages[0])
        if not isinstance(last, UserMessage):
            raise Refused(400, f"messages[{at}].role is {last.role!r}, expected the last message to be the user's", field=f"messages[{at}].role")
        question = " ".join(part.text for part in last.parts if isinstance(part, TextPart)).strip()
        if card.asks and not question and card.name not in (BASE_NAME, AUTO):
            raise Refused(400, f"the model {card.name} answers questions, and the last message has none: add a text part", field=f"messages[{at}].content")
        return question

    def _row(self, card: Card, prompt: Prompt, images: Any, settings: GenerationSettings) -> Row:
        try:
            with self._tokenizing:
                row = card.encoder.prompt(prompt, images)
            check_room(self.model.language, len(row.ids), settings)
        except (DataError, ConfigError) as error:
            code = "too_long" if isinstance(error, TextTooLong) else "not_readable"
            raise Refused(400, str(error).replace("generation.max_new_tokens", "max_tokens"), field="messages", code=code) from None
        return row

    def known(self, data: bytes) -> ServedImage:
        """An image of its bytes, with its features where they are known, else with neither features nor pixels."""
        key = hashlib.sha256(data).hexdigest()
        return ServedImage(key, None, self.features(key))

    def decoded(self, data: bytes, key: str, field: str) -> ServedImage:
        """An image of its bytes. Raises Refused."""
        try:
            image = self.decode(data)
        except BadImage as error:
            status = 413 if error.reason.startswith("too ") else 400
            raise Refused(status, f"{field}: {error.detail}", field=field, code=error.reason.replace(" ", "_")) from None
        try:
            return ServedImage(key, self.prepare(image))
        except DataError as error:
            raise Refused(400, f"{field}: {error}", field=field, code="not_readable") from None

    def _sources(self, request: ChatRequest, card: Card) -> tuple[Source, ...]:
        """The images of the conversation; of a composed model, its one image."""
        found = [
            (part, f"messages[{i}].content[{j}]")
            for i, message in enumerate(request.messages)
            if isinstance(message, UserMessage)
            for j, part in enumerate(message.parts)
            if isinstance(part, ImagePart | FilePart)
        ]
        if self._several and len(found) > self.limits.images:
            extra = found[self.limits.images][1]
            raise Refused(400, f"messages hold {len(found)} images, and the limit is {self.limits.images}: send fewer", field=extra, code="too_many_images")
        if len(found) > 1 and not self._several:
            raise Refused(400, f"{found[1][1]} is a second image, and an adapter reads one: start a new conversation for it", field=found[1][1])
        if not found:
            if card.name == BASE_NAME:
                return ()
            raise Refused(400, "the messages hold no image: add a content part of type image_url (a data URL) or file", field="messages", code="missing")
        return tuple(self._source(part, field) for part, field in found)

    def _source(self, part: ImagePart | FilePart, field: str) -> Source:
        if isinstance(part, FilePart):
            return self._file(part, f"{field}.file")
        field, url = f"{field}.image_url.url", part.image_url.url.strip()
        if url[:8].lower().startswith(("http://", "https://")):
            return Source(field, url=url)
        return Source(field, data=self._embedded(url, field))

    def _file(self, part: FilePart, field: str) -> Source:
        """An upload, or a file in the request itself."""
        if part.file.file_data is not None and part.file.file_id is None:
            return Source(f"{field}.file_data", data=self._embedded(part.file.file_data.strip(), f"{field}.file_data"))
        if part.file.file_id is None or part.file.file_data is not None:
            raise Refused(400, f"{field} holds neither or both of file_id and file_data: give one of them", field=field, code="missing")
        return Source(f"{field}.file_id", file_id=part.file.file_id)

    def _embedded(self, url: str, field: str) -> bytes:
        """The bytes in a data URL, read as browsers read it: with white space in its base64, percent signs, or without the padding."""
        head, comma, payload = url.partition(",")
        form = head.lower().replace(" ", "")
        if not (form.startswith("data:") and form.endswith(";base64") and comma):
            raise Refused(400, f"{field} is {url[:30]!r}...: expected data:image/...;base64,... of an image", field=field)
        try:
            digits = unquote_to_bytes(payload).translate(_FROM_URL_SAFE, b" \t\r\n\f").rstrip(b"=")
            if len(digits) > self.limits.image_bytes // 3 * 4 + 4:
                raise Refused(413, f"{field}: the image has more than {self.limits.image_bytes} bytes, the limit", field=field, code="too_many_bytes")
            return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"{field} is no base64: {error}", field=field, code="not_base64") from None


def _turns(request: ChatRequest) -> list[Turn]:
    """The messages as chat templates take them, with places for images; instructions without a word are left out."""
    turns: list[Turn] = []
    for message in request.messages:
        if isinstance(message, UserMessage):
            parts = [part for part in message.parts if not isinstance(part, TextPart) or part.text.strip()]
            content = [{"type": "text", "text": part.text.strip()} if isinstance(part, TextPart) else {"type": "image"} for part in parts]
            turns.append({"role": "user", "content": content})
        elif isinstance(message, AssistantMessage) or message.text.strip():
            role = "assistant" if isinstance(message, AssistantMessage) else "system"
            turns.append({"role": role, "content": [{"type": "text", "text": message.text}]})
    return turns


def _sampling(request: ChatRequest) -> Sampling | None:
    if not request.temperature:
        return None  # greedy; top_p changes nothing about the most probable token
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    return Sampling(temperature=request.temperature, top_p=request.top_p or 1.0, seed=seed)
