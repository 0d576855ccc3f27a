"""A web server on this machine that serves a folder by ranges, and misbehaves when told to."""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from shared import PATIENCE


class Server:
    """faults: by file name, what happens to the next requests for it: a status, or a word that `_Handler` knows; then all is well again.

    latency   seconds before each answer
    rate      bytes per second of all connections together; 0: as fast as it goes
    sent      bytes of each file that were sent
    """

    latency, rate = 0.0, 0.0

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.asked, self.connections = folder, dict[str, list[int | str]](), Counter[str](), 0
        self.headers: list[dict[str, str]] = []
        self.sent = Counter[str]()
        self._free, self._lock = 0.0, threading.Lock()
        outer = self

        class Bound(_Handler):
            server_state = outer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


    def pause(self, size: int) -> None:
        """Until so many bytes more may be sent."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.rate
            wait = self._free - time.monotonic()
        if wait > 0.02:  # now and then: a busy machine wakes nobody in time
            time.sleep(wait)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server_state: Server

    def setup(self) -> None:
        self.server_state.connections += 1
        super().setup()

    def do_GET(self) -> None:
        state = self.server_state
        name = self.path.partition("?")[0].removeprefix("/")
        state.asked[name] += 1
        state.headers.append(dict(self.headers.items()))
        if state.latency:
            time.sleep(state.latency)
        path = state.folder / name
        faults = state.faults.get(name, [])
        fault: Any = faults.pop(0) if faults else None
        if fault is None and not path.is_file():
            fault = 404
        if isinstance(fault, int):
            self._send(fault, b"an error page", {"Retry-After": "0"} if fault == 429 else {})
        elif isinstance(fault, str) and fault.startswith("moved:"):
            self._send(302, b"", {"Location": fault.removeprefix("moved:")})
        else:
            self._file(path, fault)

    def _file(self, path: Path, fault: str | None) -> None:
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status, headers, first, last = 200, {}, 0, size - 1
        if found and fault != "no ranges":
            first, last = int(found[1]), min(int(found[2]), size - 1)
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{size + (fault == 'other size')}"}
        with path.open("rb") as file:
            data = os.pread(file.fileno(), last + 1 - first, first)
        if fault == "stall":
            self.connection.recv(1)  # until the client has had enough
            self.close_connection = True
        elif fault == "short":  # promises more than it sends
            self._send(status, data[: len(data) // 2], headers, len(data))
            self.close_connection = True
        elif fault == "few":  # sends less than was asked for, and says so
            self._send(status, data[: len(data) // 2], headers)
        elif fault == "reset":
            self._send(status, data[: len(data) // 2], headers, len(data))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with a reset, whatever the client has read
            self.close_connection = True
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "flipped":
            self._send(status, bytes([data[0] ^ 1]) + data[1:], headers)
        else:
            self._send(status, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        piece = 2**12 if 0 < self.server_state.rate < 2**24 else 2**18 if self.server_state.rate else max(1, len(data))
        for at in range(0, len(data), piece):
            if self.server_state.rate:
                self.server_state.pause(len(data[at : at + piece]))
            self.wfile.write(data[at : at + piece])
            self.server_state.sent[self.path.partition("?")[0].removeprefix("/")] += len(data[at : at + piece])

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def until(happened: Callable[[], bool]) -> None:
    """Wait for what happens in another thread or process."""
    give_up = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
