"""A server from its settings: the model with its adapters, a socket, and an end that loses nothing."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
import yaml

from adalink import AdaptedModel
from adalink.errors import CheckpointError, ConfigError
from adalink.lifecycle.route import read_router
from multimodal.data.images.processes import start_early
from multimodal.existing.budget import ImageTokens
from multimodal.model import VisionLanguageModel
from multimodal.template import Template, saved_template
from tasks.captioning import Captioning
from tasks.runs.compose import frozen_model
from tasks.runs.config import Parts
from tasks.serve.access import BACKLOG, patient_protocol, room_for_connections
from tasks.serve.app import Service, make_app
from tasks.serve.request import check_served
from tasks.serve.settings import ServeSettings
from tasks.vqa import Vqa

__all__ = ["run_server", "served_model"]

# The generation thread gives up the interpreter at each of its many small operations, and would wait for it again as long as this: with
# Python's default of 5 ms, whatever else the process does is dear.
SWITCH_SECONDS = 0.0002


def run_server(settings: ServeSettings, adapters: Mapping[str, Path]) -> None:
    """Serve until SIGTERM or an interrupt; what was accepted by then is answered first. Raises ConfigError before anything is served."""
    listening = _listening(settings.host, settings.port)
    with listening:
        start_early()
        service = Service.of(served_model(settings, adapters), settings)
        config = uvicorn.Config(
            make_app(service),
            http=patient_protocol(settings.limits.seconds, room_for_connections(settings.limits.connections)),
            backlog=BACKLOG,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
        )
        host, port = listening.getsockname()[:2]
        displayed = f"[{host}]" if ":" in host else host
        server = _Announced(config, f"adalink serves {', '.join(service.served.cards)}: page at http://{displayed}:{port}/, API at http://{displayed}:{port}/v1")
        sys.setswitchinterval(SWITCH_SECONDS)
        # uvicorn ends in good order on SIGTERM, and then raises the signal again: this handler gets it, so that the exit code is 0. A signal
        # that comes before uvicorn listens for it counts as well.
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        try:
            server.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
        print(f"adalink has ended: {service.metrics.n_answered} of {service.metrics.n_accepted} accepted requests were answered", flush=True)


class _Announced(uvicorn.Server):
    """Says that it serves once it does: whoever reads it may connect, and may ask it to end."""

    def __init__(self, config: uvicorn.Config, stated: str) -> None:
        super().__init__(config)
        self._stated = stated

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        print(self._stated, flush=True)


def served_model(settings: ServeSettings, adapters: Mapping[str, Path]) -> VisionLanguageModel:
    """The frozen parts of the base, or of the first adapter, with all adapters on them, each under its name. Raises ConfigError as `check_served`."""
    routed = {} if settings.router is None else read_router(settings.router).folders
    for folder in (*adapters.values(), *routed.values()):
        check_served(folder)
    if settings.base is None and settings.model and not (adapters or routed):
        known, template, layer = Parts(model=settings.model), Captioning().template, -1
    else:
        known, template, layer = _base(settings.base) if settings.base is not None else _parts_of(next(iter([*adapters.values(), *routed.values()]), None))
    given = Parts(model=settings.model, encoder=settings.encoder, language_model=settings.language_model)
    parts = given.over(known)
    if parts.model is not None:  # by itself it reads a conversation as it is
        template = Template(prompt="<image>{question}")
    model = frozen_model(parts, template=template, layer=layer)
    for name, folder in adapters.items():
        model.load_adapter(folder, name, allow_other_base=settings.allow_other_base)
    if settings.router is not None:
        model.load_router(settings.router, allow_other_base=settings.allow_other_base)
    return model


def _listening(host: str, port: int) -> socket.socket:
    """A socket with its address, so that one that is taken raises an error before any weights are read."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ConfigError(f"nothing can listen at host {host}, port {port}: {error.strerror}; give another --port (0: any free one)") from None
    return found


def _base(path: Path) -> tuple[Parts, Template, int]:
    """The frozen parts that a run's config names, and the words of its task."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the base config {path} cannot be read: {error}") from None
    given: dict[str, Any] = {name: config.get(name) for name in ("model", "encoder", "language_model")} if isinstance(config, dict) else {}
    parts = Parts(**given)
    if not parts.model and not (parts.encoder and parts.language_model):
        raise ConfigError(f"the base config {path} names no encoder and language_model, and no model: give a run's config.yaml, or a recipe")
    parts = replace(parts, image_tokens=ImageTokens.of(config if config.get("image_tokens") else {}))
    name = config.get("task", "captioning")
    words = (config.get(name) or {}).get("template")
    chosen: dict[str, Any] = {"template": Template(**words)} if words else {}
    task = Vqa(**chosen) if name == "vqa" else Captioning(**chosen)
    return parts, task.words_for(parts.model is not None), config.get("layer", -1)


def _parts_of(folder: Path | None) -> tuple[Parts, Template, int]:
    """The frozen parts that an adapter was trained on, and its words."""
    if folder is None:
        raise ConfigError("nothing is to be served: give --adapter NAME=DIR, or --base with a run's config.yaml (or --model) for the frozen parts alone")
    config = AdaptedModel.read_config(folder)
    template = saved_template(config.task)
    if "language_model" not in config.base or template is None or "layer" not in config.task:
        raise CheckpointError(f"the adapter in {folder} was not saved by `adalink train`: it names no frozen parts with a template; give --base")
    return Parts.of(config.base, config.task), template, config.task["layer"]
