"""The end of a server: what was accepted is answered, whatever asks it to end; and what keeps one from beginning."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from served import ROOT, messages, photo, serving
from shared import PATIENCE

from multimodal.model import VisionLanguageModel
from tasks.cli import main


def test_a_server_that_is_asked_to_end_answers_what_it_accepted(model: VisionLanguageModel, adapters: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the test\nsecret-1\nsecret-2\n")
    ends: list[str] = []  # of every request; appending is safe between threads, counting is not
    body = json.dumps({"model": "cap_b", "messages": messages("", photo(0)), "max_tokens": 30})

    def client(address: str) -> None:
        while True:
            connection = http.client.HTTPConnection(address, timeout=PATIENCE)
            try:
                connection.request("POST", "/v1/chat/completions", body, {"Authorization": "Bearer secret-2"})
                response = connection.getresponse()
                assert json.loads(response.read())["choices"][0]["message"]["content"]
                ends.append(str(response.status))
            except ConnectionError:  # nobody listens any more
                ends.append("not accepted")
                return

    with serving(adapters, "--access.api_keys", keys, names=("cap_b",)) as server:
        asked = httpx.Client(base_url=server.url, timeout=PATIENCE)
        assert asked.get("/v1/models").json()["error"]["code"] == "missing_key"
        wrong = asked.get("/v1/models", headers={"Authorization": "Bearer secret-3"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "wrong_key")
        loaded = asked.post("/v1/models", json={"id": "x", "folder": "cap"}, headers={"Authorization": "Bearer secret-1"})
        assert (loaded.status_code, loaded.json()["error"]["code"]) == (403, "not_allowed")
        assert set(asked.get("/health").json()) == {"status", "waiting"}  # needs no key, and names no adapters
        for path in ("/metrics", "/openapi.json"):
            assert asked.get(path).status_code == 401
            assert asked.get(path, headers={"Authorization": "Bearer secret-2"}).status_code == 200
        threads = [threading.Thread(target=client, args=(server.url.removeprefix("http://"),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(ends) <= 8:  # each has been answered, and asks again
            time.sleep(0.01)
        last = server.end().splitlines()[-1]
        for thread in threads:
            thread.join()
        assert server.process.returncode == 0
        assert "Traceback" not in server.log.read_text()
    found = Counter(ends)
    assert found["200"] > 8
    assert set(found) == {"200", "not accepted"}
    assert last == f"adalink has ended: {found['200']} of {found['200']} accepted requests were answered"


def test_a_server_that_says_that_it_serves_can_be_reached_and_ended_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--base", ROOT / "tasks" / "scenes" / "vqa.yaml", names=()) as server:
        host, port = server.url.removeprefix("http://").split(":")
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        printed = server.end()
        assert server.process.returncode == 0
    assert printed.endswith("\nadalink has ended: 0 of 0 accepted requests were answered\n")


@pytest.mark.parametrize(("arguments", "note"), [
    ((), "nothing is to be served: give --adapter NAME=DIR, or --base"),
    (("--adapter", "cap"), "--adapter is 'cap': expected NAME=DIR"),
    (("--adapter", "a=x", "a=y"), "two adapters are called a"),
    (("--base", "nothing.yaml"), "the base config nothing.yaml cannot be read"),
    (("--port", "70000"), "port is 70000"),
    (("--host", "192.0.2.1"), "nothing can listen at host 192.0.2.1"),
    (("--batching.size", "0"), "batching.size is 0"),
    (("--batching.mixing", "some"), "batching.mixing"),
    (("--limits.pixels", "0"), "limits.pixels is 0"),
    (("--limits.pixels", "999999999"), "Pillow's own limit"),
    (("--generation.max_new_tokens", "600"), "above limits.new_tokens, 512"),
])  # fmt: skip
def test_what_keeps_a_server_from_beginning_is_one_sentence(arguments: tuple[str, ...], note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *(() if "--port" in arguments else ("--port", "0")), *arguments]) == 2
    err = capsys.readouterr().err
    assert note in err
    assert "Traceback" not in err


def test_keys_that_cannot_be_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    base = ROOT / "tasks" / "scenes" / "vqa.yaml"
    for name, note in (("empty", "holds none"), ("absent", "cannot be read")):
        assert main(["serve", "--base", str(base), "--port", "0", "--access.api_keys", str(tmp_path / name)]) == 2
        assert note in capsys.readouterr().err
    (tmp_path / "other.yaml").write_text("task: vqa\n")
    assert main(["serve", "--base", str(tmp_path / "other.yaml"), "--port", "0"]) == 2
    assert "names no encoder and language_model" in capsys.readouterr().err
