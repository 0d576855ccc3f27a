"""`adalink serve`: what it takes, and the server that it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalink.errors import ConfigError
from multimodal.generation.generate import GenerationChoice
from tasks.commands import Command
from tasks.runs.config import comments_as_help
from tasks.serve.settings import Access, Batching, RequestLimits, ServeSettings

__all__ = ["SERVE"]


def _add_serve(parser: Any) -> None:
    for kind in (ServeSettings, GenerationChoice, Batching, RequestLimits, Access):
        comments_as_help(kind)
    parser.add_argument("--adapter", type=str, nargs="+", action="extend", default=[], metavar="NAME=DIR", help="adapters to serve, each under a name")
    parser.add_class_arguments(ServeSettings, None)


def _serve(values: Any, plain: Any) -> None:
    """Serve until the process is asked to end. Raises ConfigError where the extra `serve` is not installed."""
    try:
        from tasks.serve.server import run_server  # late: an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"`adalink serve` needs the package {error.name}: pip install 'adalink[serve]'") from None
    settings = ServeSettings(**{name: values[name] for name in ServeSettings.__dataclass_fields__})
    run_server(settings, _named(values.adapter))


def _named(given: list[str]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise ConfigError(f"--adapter is {text!r}: expected NAME=DIR, such as caption=runs/flickr8k/adapter")
        if name in adapters:
            raise ConfigError(f"two adapters are called {name}: give each a name of its own")
        adapters[name] = Path(folder)
    return adapters


SERVE = Command(_add_serve, _serve)
