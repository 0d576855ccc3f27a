"""A web server on this machine that serves a folder by ranges, and misbehaves when told to."""

from __future__ import annotations

import re
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
    """faults: by file name, what happens to the next requests for it: a status, or a word that `_Handler` knows; then all is well again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.asked, self.connections = folder, dict[str, list[int | str]](), Counter[str](), 0
        self.headers: list[dict[str, str]] = []
        outer = self

        class Bound(_Handler):
            server_state = outer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def setup(self) -> None:
        self.server_state.connections += 1
        super().setup()

    def do_GET(self) -> None:
        state = self.server_state
        name = self.path.partition("?")[0].removeprefix("/")
        state.asked[name] += 1
        state.headers.append(dict(self.headers.items()))
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
            self._file(path.read_bytes(), fault)

    def _file(self, data: bytes, fault: str | None) -> None:
        size = len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status, headers = 200, {}
        if found and fault != "no ranges":
            first, last = int(found[1]), min(int(found[2]), size - 1)
            data, status, headers = data[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{size + (fault == 'other size')}"}
        if fault == "stall":
            self.connection.recv(1)  # until the client has had enough
            self.close_connection = True
        elif fault == "short":  # promises more than it sends
            self._send(status, data[: len(data) // 2], headers, len(data))
            self.close_connection = True
        elif fault == "few":  # sends less than was asked for, and says so
            self._send(status, data[: len(data) // 2], headers)
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
        self.wfile.write(data)

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
