"""What an operator decides about a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adalink.errors import ConfigError
from multimodal.data.images.decode import PILLOW_PIXELS
from multimodal.generation.settings import GenerationChoice

__all__ = ["Access", "Batching", "RequestLimits", "ServeSettings"]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How waiting requests become batches."""

    size: int = 32  # most requests in the running batch
    tokens: int = 65_536  # most tokens of the running batch, prompts and new tokens with padding; a longer request runs alone
    wait_ms: int = 20  # milliseconds that a request waits for others before its batch starts; a single request does not wait
    mixing: Literal["mixed", "one_adapter"] = "mixed"  # one_adapter: all rows of a batch use one adapter; for comparison

    def __post_init__(self) -> None:
        """Check what a command line can get wrong."""
        if self.size < 1 or self.wait_ms < 0:
            raise ConfigError(f"batching.size is {self.size} and batching.wait_ms {self.wait_ms}: give at least 1 request and 0 milliseconds")
        if self.tokens < 1:
            raise ConfigError(f"batching.tokens is {self.tokens}: give 1 or more")
        if self.mixing not in ("mixed", "one_adapter"):
            raise ConfigError(f"batching.mixing is {self.mixing!r}: give mixed or one_adapter")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request, and all requests together, may cost. Whatever is above is refused with 400, 408, 413 or 429 before it costs more."""

    body_bytes: int = 16 * 2**20  # of a request's body; an image in base64 is a third larger than its file
    image_bytes: int = 10 * 2**20  # of an image's file
    images: int = 8  # most images of a conversation, for a model that sees already; a composed model reads one
    pixels: int = 2**24  # width x height of an image, checked before it is decoded
    decode_seconds: float = 10.0  # of processor time to decode an image; then its process is ended, and the image refused
    text_bytes: int = 32_768  # of all texts of a conversation; the model's positions limit the question that is read besides
    new_tokens: int = 512  # most tokens that a request may ask for
    beams: int = 8  # most beams that a request may ask for
    in_flight: int = 256  # requests that are read, wait or are answered; one more is refused with 429
    buffered_bytes: int = 512 * 2**20  # of all bodies in memory at once; more is refused with 429
    upload_bytes: int = 256 * 2**20  # of all uploaded images; the oldest make room
    seconds: float = 30.0  # for a client to send its request, header and body
    connections: int = 512  # open ones; for one more, the one that has waited longest without a request is closed, or it gets 503
    feature_bytes: int = 256 * 2**20  # memory on the device for cached image features
    cached_images: int = 256  # number of images with cached features; a second question about one needs no encoder
    prompt_bytes: int = 256 * 2**20  # memory of the prompt cache; a second question about an image is read from where it differs

    def __post_init__(self) -> None:
        """Check what a command line can get wrong."""
        for name, value in vars(self).items():
            if value < (least := 0 if name in ("cached_images", "feature_bytes", "prompt_bytes") else 1):
                raise ConfigError(f"limits.{name} is {value}: give {least} or more")
        if self.pixels > PILLOW_PIXELS:
            raise ConfigError(f"limits.pixels is {self.pixels}: give at most {PILLOW_PIXELS}, Pillow's own limit")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may do what."""

    api_keys: Path | None = None  # a file with one key a line; requests then need `Authorization: Bearer KEY`
    admin_keys: Path | None = None  # a file with one key a line, for loading and unloading adapters; without it, the api keys do
    adapters_folder: Path | None = None  # adapters may be loaded at run time from folders in this one; without it, none can be
    hosts: tuple[str, ...] | str = ()  # names of this server besides localhost and --host, which requests may ask for; "*" for every one
    origins: tuple[str, ...] | str = ()  # origins of other web pages that may use the API, such as https://app.example.org; "*" for every one
    image_hosts: tuple[str, ...] | str = ()  # hosts that images may be fetched from; "*" for every public one. Private addresses never

    def __post_init__(self) -> None:
        """Take a list with commas for a list."""
        for name in ("hosts", "origins", "image_hosts"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, tuple(one.strip() for one in value.split(",") if one.strip()))


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """A server."""

    host: str = "127.0.0.1"  # the address to listen at; 0.0.0.0 for every network, which wants access.api_keys
    port: int = 8000  # 0: any free one, which is printed
    base: Path | None = None  # a run's config.yaml, for the frozen parts; without it they are those that the first adapter names, or `model`
    model: str | None = None  # where the model that sees already is, if not where the config or the adapter says
    encoder: str | None = None  # where the encoder is, if not where the config or the adapter says
    language_model: str | None = None  # where the language model is, if not where the config or the adapter says
    router: Path | None = None  # a folder of `adalink route`: its adapters are served too, and requests for the model `auto` by the one that fits
    allow_other_base: bool = False  # load adapters that are given at the start though a frozen part is not as it was when they were trained
    generation: GenerationChoice = field(default_factory=GenerationChoice)  # what a request gets that does not say; without it, what the adapter was saved with
    batching: Batching = field(default_factory=Batching)
    limits: RequestLimits = field(default_factory=RequestLimits)
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        """Check what a command line can get wrong."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}: give 0 (any free one) to 65535")
        if (self.generation.max_new_tokens or 0) > self.limits.new_tokens:
            raise ConfigError(
                f"generation.max_new_tokens is {self.generation.max_new_tokens}, above limits.new_tokens, {self.limits.new_tokens}: raise the limit too"
            )
