"""Frozen parts: what they are, and the one sentence for a part that cannot be loaded."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from adalink.checkpoint.precision import cast
from adalink.errors import AdalinkError, ConfigError, DataError

__all__ = ["PARTS", "existing_folder", "freeze", "hub_or_disk", "is_spread", "loading", "nearest", "on_device", "quiet", "split_revision"]

Module = TypeVar("Module", bound=nn.Module)


# ----------------------------------------
# Whether the hub can be reached at all: where it cannot, names are looked up on disk at once instead of after a minute of retries.


@contextmanager
def hub_or_disk() -> Iterator[None]:
    """Inside, the hub's clients look on disk alone where the hub's address does not resolve.

    They would retry each file five times, 23 s in all, and timm and open_clip do so for two. Behind a proxy addresses need not
    resolve here, so nothing is concluded.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves() -> bool:
    address = urlsplit(constants.ENDPOINT)
    if {"https", "http", "all"} & set(getproxies()):
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except socket.gaierror:
        return False
    return True


def freeze(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Puts `module` into eval mode without gradients, in `dtype` where one is given (None keeps what the files hold)."""
    module.eval().requires_grad_(False)
    if dtype is not None:
        cast(module, dtype)


def is_spread(module: nn.Module) -> bool:
    """Whether the module, or a part of it, was placed by a device map: then accelerate brings its weights and inputs where they belong."""
    return any(vars(part).get("hf_device_map") for part in module.modules())


def on_device(module: Module, device: torch.device) -> Module:
    """The module with its weights on the device; parts that a device map has placed stay where they are."""
    if not is_spread(module):
        return module.to(device)
    if not vars(module).get("hf_device_map"):
        for child in module.children():
            on_device(child, device)
        for values in (module._parameters, module._buffers):
            for value in values.values():
                if value is not None:
                    value.data = value.data.to(device)
    return module


PARTS = "adalink.parts"  # the group of entry points by which an installed package names the frozen parts that it ships with
_LIBRARIES = ("timm", "open_clip", "hf")


def existing_folder(spec: str | Path) -> Path | None:
    """The local folder that `spec` names, or None where it is a name for a hub.

    `PREFIX:NAME` is the folder that a package ships: its entry point PREFIX, of the group `adalink.parts`, is a function from NAME to the folder.
    Raises ConfigError where `spec` can only be a path and there is no such folder, or no package has the prefix.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    text = str(spec)
    prefix, colon, name = text.partition(":")
    if colon and prefix.isidentifier() and len(prefix) > 1 and prefix not in _LIBRARIES:  # one letter: a drive of Windows
        return _shipped(prefix, name)
    looks_like_path = path.is_absolute() or path.exists() or text.startswith((".", "~")) or (text.count("/") > 1 and ":" not in text)
    if isinstance(spec, Path) or looks_like_path:
        found = "a file" if path.is_file() else "nothing"
        raise ConfigError(f"'{spec}' should be a folder with a model's files, found {found} there; check the path")
    return None


def _shipped(prefix: str, name: str) -> Path:
    """The folder of a frozen part that an installed package ships."""
    for point in entry_points(group=PARTS, name=prefix):
        folder: Path = point.load()(name)
        return folder
    known = ", ".join(sorted({f"{point.name}:" for point in entry_points(group=PARTS)})) or "none"
    raise ConfigError(
        f"no installed package ships '{prefix}:{name}' (the prefixes that packages ship are: {known}): install the package that has it, or give a local folder"
    )


def split_revision(name: str) -> tuple[str, str | None]:
    """The hub id and the revision of `id@revision`: `a/b@v1` -> (`a/b`, `v1`), `a/b` -> (`a/b`, None)."""
    identifier, _, revision = name.partition("@")
    return identifier, revision or None


@contextmanager
def loading(what: str, name: str | Path, advice: str) -> Iterator[None]:
    """Turns whatever a model library raises inside into one sentence: ConfigError, or DataError for a damaged weight file.

    The libraries raise OSError, ValueError, RuntimeError, KeyError, errors of the hub client and more for a mere wrong name,
    so everything is caught; the first line of the cause stays in the sentence, and the whole of it stays chained.
    """
    try:
        with nullcontext() if Path(name).is_dir() else hub_or_disk():
            yield
    except AdalinkError:
        raise
    except SafetensorError as error:
        raise DataError(f"the weights of the {what} '{name}' cannot be read: {_first_line(error)}; fetch the files again") from error
    except Exception as error:
        raise ConfigError(f"cannot load the {what} '{name}': {_first_line(error)}; {advice}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences, inside, the logs of the model libraries and the progress bar of transformers, but not the hub's bar of a download.

    They report unused tensors, and failures that are raised as well; what matters is checked and raised here.
    """
    from transformers.utils import logging as transformers_logging  # late, as are all its other parts where a part is loaded

    level, has_bar, disabled = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def nearest(name: str, known: Sequence[str]) -> str:
    """The three names of `known` nearest to `name`, or its first three where none is near: `a, b, c (22 in all)`."""
    near = get_close_matches(name, known, n=3) or list(known)[:3]
    return f"{', '.join(near)} ({len(known)} in all)"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
