"""Whether the hub can be reached at all: where it cannot, names are looked up on disk at once instead of after a minute of retries."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

__all__ = ["hub_or_disk"]


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
