"""From a chat request to what is asked of the model: its one image, its question, its settings, all within the limits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

from PIL import Image
from torch import Tensor

from adalink import BASE_NAME
from adalink.errors import ConfigError
from multimodal.batches.tokenize import Row, TextTooLong
from multimodal.data.images.decode import BadImage
from multimodal.generation.generate import check_room
from multimodal.generation.settings import GenerationChoice, GenerationSettings, saved_generation
from multimodal.model import VisionLanguageModel
from tasks.serve.errors import Refused
from tasks.serve.registry import Card
from tasks.serve.scheduler import Ask, Sampling, ServedImage
from tasks.serve.schema import ChatRequest, FilePart, ImagePart, SystemMessage, TextPart, UserMessage
from tasks.serve.settings import RequestLimits

__all__ = ["Reader", "Source"]

TOKENS = "max_completion_tokens"
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Source:
    """Where the image of a request is: its bytes, or the id of an upload, or an address; and the field that names it."""

    field: str
    data: bytes | None = None
    file_id: str | None = None
    url: str | None = None


class Reader:
    """Makes asks of requests; called from several threads.

    features   of an image that was seen before, by the sum of its bytes
    decode     an image; raises BadImage
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        limits: RequestLimits,
        default: GenerationChoice,
        *,
        features: Callable[[str], Tensor | None],
        decode: Callable[[bytes], Image.Image],
    ) -> None:
        self.model = model
        self.limits = limits
        self.default = default
        self.features = features
        self.decode = decode
        self._blank = ServedImage("", model.tower.preprocess(Image.new("RGB", (64, 64), "white")))
        self._tokenizing = threading.Lock()  # fast tokenizers refuse to be used by two threads at once

    def ask(self, request: ChatRequest, card: Card) -> tuple[Ask, str | None, Source | None]:
        """What is asked, the question that is read, and where its image is. Raises Refused.

        The question is None where the adapter's template has no place for one, the source where there is no image: the ask has a blank one.
        """
        settings = self._settings(request, card)
        question = self._question(request, card)
        row = self._row(card, question, settings)
        source = self._source(request, card)
        stop = () if not request.stop else (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        sampling = _sampling(request)
        for field, is_given in (("temperature", sampling), ("stop", stop)):
            if is_given and settings.num_beams > 1:
                raise Refused(400, f"{field} and num_beams were both given, and beams know no {field}: leave one of them out", field=field)
        ask = Ask(adapter=card.name, row=row, image=self._blank, settings=settings, stop=stop, sampling=sampling)
        return ask, question if card.asks else None, source

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

    def _question(self, request: ChatRequest, card: Card) -> str:
        """The texts of the last message, which must be the user's."""
        texts = [part.text for message in request.messages if isinstance(message, UserMessage) for part in message.parts if isinstance(part, TextPart)]
        if (n_bytes := sum(len(text.encode()) for text in texts)) > self.limits.text_bytes:
            raise Refused(400, f"messages hold {n_bytes} bytes of text, and the limit is {self.limits.text_bytes}", field="messages", code="too_long")
        others = [(at, message) for at, message in enumerate(request.messages) if not isinstance(message, SystemMessage)]
        at, last = others[-1] if others else (0, request.messages[0])
        if not isinstance(last, UserMessage):
            raise Refused(400, f"messages[{at}].role is {last.role!r}, expected the last message to be the user's", field=f"messages[{at}].role")
        question = " ".join(part.text for part in last.parts if isinstance(part, TextPart)).strip()
        if card.asks and not question and card.name != BASE_NAME:
            raise Refused(400, f"the model {card.name} answers questions, and the last message has none: add a text part", field=f"messages[{at}].content")
        return question

    def _row(self, card: Card, question: str, settings: GenerationSettings) -> Row:
        try:
            with self._tokenizing:
                row = card.encoder.prompt(question)
            check_room(self.model.language, len(row.ids), settings)
        except (TextTooLong, ConfigError) as error:
            raise Refused(400, str(error).replace("generation.max_new_tokens", "max_tokens"), field="messages", code="too_long") from None
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
        return ServedImage(key, self.model.tower.preprocess(image))

    def _source(self, request: ChatRequest, card: Card) -> Source | None:
        """The one image of the conversation."""
        found = [
            (part, f"messages[{i}].content[{j}]")
            for i, message in enumerate(request.messages)
            if isinstance(message, UserMessage)
            for j, part in enumerate(message.parts)
            if isinstance(part, ImagePart | FilePart)
        ]
        if len(found) > 1:
            raise Refused(400, f"{found[1][1]} is a second image, and an adapter reads one: start a new conversation for it", field=found[1][1])
        if not found:
            if card.name == BASE_NAME:
                return None
            raise Refused(400, "the messages hold no image: add a content part of type image_url (a data URL) or file", field="messages", code="missing")
        part, field = found[0]
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
            raise Refused(400, f"{field} is {url[:30]!r}...: expected data:image/...;base64,... (jpg, png or webp)", field=field)
        try:
            digits = unquote_to_bytes(payload).translate(_FROM_URL_SAFE, b" \t\r\n\f").rstrip(b"=")
            if len(digits) > self.limits.image_bytes // 3 * 4 + 4:
                raise Refused(413, f"{field}: the image has more than {self.limits.image_bytes} bytes, the limit", field=field, code="too_many_bytes")
            return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"{field} is no base64: {error}", field=field, code="not_base64") from None


def _sampling(request: ChatRequest) -> Sampling | None:
    if not request.temperature:
        return None  # greedy; top_p changes nothing about the most probable token
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    return Sampling(temperature=request.temperature, top_p=request.top_p or 1.0, seed=seed)
