"""A real headless Chromium, driven through its own protocol over two pipes: no other package is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._id, self._rest = into, out, 0, b""
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._out, 1 << 20)
                assert read, "the browser has ended"
                self._rest += read
            text, self._rest = self._rest.split(b"\0", 1)
            reply = json.loads(text)
            if reply.get("id") == self._id:
                assert "error" not in reply, reply
                return dict(reply["result"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for an expression to become true."""
        give_up = time.monotonic() + PATIENCE
        while not self.js(condition):
            assert time.monotonic() < give_up, f"{condition}: {self.js('document.body.innerText')}"
            time.sleep(0.05)

    def look(self, width: int, scheme: str, path: Path | None = None) -> None:
        """Show the page at a width and in a colour scheme; an image of all of it where a path is given."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if path is not None:
            height = max(900, int(self.js("document.documentElement.scrollHeight")))
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A browser with one tab, until the block ends."""
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    # The protocol wants the descriptors 3 and 4; sh knows no numbers above 9 here.
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(from_us, to_us)
    finally:
        process.kill()
        process.wait()
        os.close(from_us)
        os.close(to_us)
