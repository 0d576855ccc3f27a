"""How many files a reader opens to follow one chat completion from the request to the answer."""

from __future__ import annotations

import threading
from pathlib import Path
from types import FrameType

from fastapi.testclient import TestClient
from served import messages, photo
from shared import ROOT

from multimodal.model import VisionLanguageModel
from tasks.serve.app import Service, make_app
from tasks.serve.settings import ServeSettings

MOST = 6
FOLDERS = ("tasks/serve/", "multimodal/generation/")
VALUES = {"tasks/serve/schema.py", "tasks/serve/settings.py", "multimodal/generation/settings.py"}  # what is passed: they decide nothing


def test_a_request_is_read_in_six_files(model: VisionLanguageModel) -> None:
    passed: set[str] = set()

    def note(frame: FrameType, event: str, value: object) -> None:  # of calls alone: what is entered is not traced line by line
        if is_asked:
            passed.add(frame.f_code.co_filename)

    is_asked = False
    threading.settrace(note)  # of the threads that begin from here on: the event loop, those that read, and the one that runs the model
    try:
        with TestClient(make_app(Service.of(model, ServeSettings())), base_url="http://localhost") as client:
            is_asked = True
            for streams in (False, True):
                body = {"model": "vqa", "messages": messages("is it red?", photo(int(streams))), "stream": streams, "max_tokens": 5}
                reply = client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200
                assert '"finish_reason"' in reply.text
            is_asked = False
    finally:
        threading.settrace(None)  # type: ignore[arg-type]  # which ends it
    files = {Path(file).relative_to(ROOT).as_posix() for file in passed if file.startswith(f"{ROOT}/") and ".venv" not in file}
    steps = {file for file in files if file.startswith(FOLDERS)} - VALUES
    assert {"tasks/serve/app.py", "tasks/serve/engine.py", "multimodal/generation/decoding.py"} < steps  # the control: every thread was seen
    assert len(steps) <= MOST, sorted(steps)
