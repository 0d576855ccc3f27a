"""An upload, as far as it can be seen without the hub: the real client, and a server that keeps what it sends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from tiny import tiny

from adalink import AdaLink, get_adalink_model
from adalink.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE
from adalink.errors import ConfigError


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps what was sent."""

    sent: dict[str, bytes] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.sent[self.path] = body
        address = f"http://{self.headers['Host']}"
        if "/preupload/" in self.path:
            answer: object = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{address}/me/adapter/commit/1", "commitOid": "1", "hookOutput": ""}
        else:
            answer = {"url": f"{address}/me/adapter", "name": "me/adapter", "success": True}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/adapter", "sha": "0", "siblings": []})

    def _answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_push_to_hub_sends_the_three_files_of_the_adapter(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT": hub, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)  # read from the environment when the client is imported
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    model = get_adalink_model(tiny("opt"), AdaLink(rank=4, modalities=("text",)))
    assert model.push_to_hub("me/adapter", private=True).endswith("/me/adapter/commit/1")
    created = json.loads(Hub.sent["/api/repos/create"])
    assert (created["organization"], created["name"]) == ("me", "adapter")
    assert created.get("private") is True or created.get("visibility") == "private"  # as older and newer clients say it
    commit = next(body for path, body in Hub.sent.items() if "/commit/" in path)
    files = {line["value"]["path"] for line in map(json.loads, commit.decode().splitlines()) if line["key"] == "file"}
    assert files == {"README.md", CONFIG_FILE, WEIGHTS_FILE}


def test_an_upload_that_cannot_be_made_is_one_sentence() -> None:
    model = get_adalink_model(tiny("opt"), AdaLink(rank=4, modalities=("text",)))
    with pytest.raises(ConfigError, match=r"the adapter was not uploaded to me/adapter \(OfflineModeIsEnabled: .*\): check the name, the connection, and that you"):
        model.push_to_hub("me/adapter")
    with pytest.raises(ConfigError, match=r"the adapter was not uploaded to no such name! \(HFValidationError: "):
        model.push_to_hub("no such name!")
    with pytest.raises(ConfigError, match="no adapter is active"), model.disable_adapter():
        model.push_to_hub("me/adapter")
