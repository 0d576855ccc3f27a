"""A served process for tests: adapters with random weights on the embedded parts, and the server as an operator starts it."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
from forked import Forked, forked
from shared import PATIENCE, ROOT

from adalink import AdaLink, Bridge
from adalink.checkpoint.precision import UNCHANGED, BaseSettings
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes
from tasks.vqa import Vqa

TASKS = {"cap": Captioning(), "cap_b": Captioning(), "vqa": Vqa(), "vqa_b": Vqa()}
QUESTIONS = ("is it red?", "how many large balls are in the image?", "what is in the middle?", "what colour is the star?")


def save_adapters(folder: Path, base: BaseSettings = UNCHANGED) -> VisionLanguageModel:
    """Four adapters with random weights in folders by their names; the model that has them all comes back. base: the precision of its frozen parts."""
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template, base=base)
    for seed, (name, task) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        methods = {"bridge": Bridge(kind="mlp", hidden=64, init_scale=8.0), "adalink": AdaLink(rank=8, modalities=("image", "text"))}
        adapter = model.add_adapter(name, methods)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.template = task.template
        model.save_pretrained(folder / name, task={"task": task.name})
        model.adapted.task = {**model.adapted.task, "task": task.name}
    model.template = Captioning().template
    return model


@cache
def photo(index: int) -> bytes:
    """The PNG of a scene."""
    data = Scenes(split="val", size=1000)[index].image
    assert isinstance(data, bytes)
    return data


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def messages(question: str, image: bytes | None) -> list[Any]:
    """One user message, in OpenAI's shape."""
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": question}] if question else [])}]


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str] | Forked
    url: str
    log: Path

    def rss(self) -> int:
        """Bytes of memory that the process has."""
        (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(line) * 1024

    def cpu_seconds(self) -> float:
        """Processor time that the process has used."""
        used = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The value of one line of /metrics; the sum over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE))

    def end(self) -> str:
        """Ask it to end, wait for it, and give what it printed."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=PATIENCE)
        return self.log.read_text()


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, names: tuple[str, ...] = tuple(TASKS), fresh: bool = False) -> Iterator[Server]:
    """The command, on a free port, until the block ends. fresh: as an operator starts it; else forked, which is seconds faster."""
    log = folder / f"serve{time.monotonic_ns()}.log"
    command = ["serve", "--port", "0", *(["--adapter", *(f"{name}={folder / name}" for name in names)] if names else []), *map(str, arguments)]
    log.touch()
    process = _started(command, log) if fresh else forked(*command, out=log)
    try:
        give_up = time.monotonic() + PATIENCE
        while not (found := re.search(r"page at (http://\S+)/,", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.01)
        yield Server(process, found[1], log)
    finally:
        process.kill()
        process.wait()


def _started(command: list[str], log: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    program = [sys.executable, "-c", "from adalink.__main__ import entry; entry()"]
    with log.open("w") as out:
        return subprocess.Popen([*program, *command], stdout=out, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
