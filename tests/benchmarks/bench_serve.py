"""Load tests of `adalink serve` on loopback, each a row of RESULTS.md.

    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py mixing      # mixed batches against one adapter at a time
    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py wide        # the same, with a language model of 85 M random weights
    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py varied      # the same again, with texts of 4 to 64 tokens
    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py reload      # adapters come and go under load
    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py end         # SIGTERM under load
    PYTHONPATH=.:tests/support:tests/tasks/support python tests/benchmarks/bench_serve.py bad         # 10,000 bad requests

What follows is given to the servers: `varied --limits.prompt_bytes 0` for servers that read each prompt anew. The frozen parts are those that
ship with the package; adapters have random weights, which cost what trained ones do.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import torch
from served import Server, data_url, messages, photo, serving
from transformers import LlamaConfig, LlamaForCausalLM

from adalink import AdaLink, Bridge
from multimodal.language import load_language
from tasks.captioning import Captioning
from tasks.runs.compose import compose, found_part

N_CLIENTS, N_ADAPTERS, N_PICTURES = 32, 4, 64
NAMES = tuple(f"caption{i}" for i in range(N_ADAPTERS))
SECONDS = 20.0
ROUNDS, WINDOW = 8, 5.0
EVEN = (64,)  # tokens a text
VARIED = (4, 8, 16, 32, 64)  # as the answers to questions, captions and descriptions
NOISE = 0.4  # so strong that hardly a text ends by itself: each request then costs the same, whoever answers it


@dataclass
class Load:
    """Clients that ask again as soon as they are answered, and what became of each request."""

    server: Server
    bodies: Sequence[bytes]
    n_clients: int = N_CLIENTS
    seconds: list[float] = field(default_factory=list)  # of the requests that were answered
    statuses: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.n_clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, seed: int) -> None:
        draw, address = random.Random(seed), self.server.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        while not self._stop.is_set():
            started, sent = time.perf_counter(), False
            try:
                connection.request("POST", "/v1/chat/completions", draw.choice(self.bodies), {"Content-Type": "application/json"})
                sent = True
                response = connection.getresponse()
                reply = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                self.statuses["refused connection" if not sent else f"lost: {type(error).__name__}"] += 1
                return
            self.statuses[str(response.status)] += 1
            if response.status == 200:
                self.seconds.append(time.perf_counter() - started)
                self.tokens += reply["usage"]["completion_tokens"]


def wide_language(folder: Path) -> str:
    """A language model whose step costs reading its weights, as any of a useful size does; those of the package fit into the processor's cache."""
    package = load_language(found_part("scenes:language"))
    torch.manual_seed(0)
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 9, "num_attention_heads": 12, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(**{**package.model.config.to_dict(), **size, "head_dim": 64})).save_pretrained(folder)
    package.tokenizer.save_pretrained(folder)
    return str(folder)


def save(folder: Path, language: str = "scenes:language") -> None:
    """The adapters, from random weights."""
    model = compose("scenes:encoder", language, template=Captioning().template)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        adapter = model.add_adapter(name, {"bridge": Bridge(kind="mlp", hidden=256, init_scale=8.0), "adalink": AdaLink(rank=16, modalities=("image", "text"))})
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * NOISE)
        model.save_pretrained(folder / name, task={"task": "captioning"})


def uploaded(server: Server, lengths: Sequence[int] = EVEN) -> list[bytes]:
    """A request for each adapter, image and length. Each adapter was asked about each image once: what a server keeps of them is kept."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        ids = [client.post("/v1/files", files={"file": ("p.png", photo(i))}).json()["id"] for i in range(N_PICTURES)]
        contents = [[{"role": "user", "content": [{"type": "file", "file": {"file_id": file_id}}]}] for file_id in ids]
        for name, content in itertools.product(NAMES, contents):
            status = client.post("/v1/chat/completions", json={"model": name, "messages": content, "max_tokens": 1}).status_code
            assert status in (200, 404), status  # an adapter that is not served
    return [json.dumps({"model": name, "messages": content, "max_tokens": n}).encode() for name in NAMES for content in contents for n in lengths]


def percentile(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)]


def mixing(folder: Path, *options: str, lengths: Sequence[int] = EVEN) -> None:
    """Throughput and latency of both ways to batch, on two servers that differ in nothing else, in short turns: other work hits both."""
    with serving(folder, *options, names=NAMES) as mixed, serving(folder, *options, "--batching.mixing", "one_adapter", names=NAMES) as one:
        servers = {"mixed": mixed, "one_adapter": one}
        bodies = {way: uploaded(server, lengths) for way, server in servers.items()}
        turns: dict[str, list[Turn]] = {way: [] for way in servers}
        for n in range(ROUNDS):
            for way in list(servers)[:: 1 if n % 2 else -1]:
                turns[way].append(turn(servers[way], bodies[way]))
        for way, found in turns.items():
            seconds = [second for one_turn in found for second in one_turn.seconds]
            n_failed = sum(one_turn.n_failed for one_turn in found)
            print(f"{way}: {len(seconds) / sum(t.elapsed for t in found):.1f} requests/s, {1000 * sum(t.cpu for t in found) / len(seconds):.1f} ms of the server's processor a request, "
                  f"p50 {percentile(seconds, 0.5):.3f} s, p95 {percentile(seconds, 0.95):.3f} s, {sum(t.rows for t in found) / sum(t.batches for t in found):.1f} rows a batch, "
                  f"{len(seconds)} answered, {n_failed} failed", flush=True)  # fmt: skip
        pairs = list(zip(turns["mixed"], turns["one_adapter"], strict=True))
        rates = sorted(len(a.seconds) / a.elapsed / (len(b.seconds) / b.elapsed) for a, b in pairs)
        p95 = sorted(percentile(a.seconds, 0.95) / percentile(b.seconds, 0.95) for a, b in pairs)
        print(f"mixed / one adapter, {ROUNDS} pairs of turns: throughput median {rates[len(rates) // 2]:.2f} ({rates[0]:.2f} to {rates[-1]:.2f}), "
              f"p95 median {p95[len(p95) // 2]:.2f} ({p95[0]:.2f} to {p95[-1]:.2f})")  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one server did in one window."""

    seconds: list[float]
    elapsed: float  # until the last of them was answered
    n_failed: int
    cpu: float
    rows: float
    batches: float


def turn(server: Server, bodies: Sequence[bytes]) -> Turn:
    def counts() -> tuple[float, float, float]:
        return server.cpu_seconds(), server.metric("adalink_batch_rows_sum"), server.metric("adalink_batch_rows_count")

    before, load, started = counts(), Load(server, bodies), time.perf_counter()
    load.start()
    time.sleep(WINDOW)
    load.stop()
    elapsed = time.perf_counter() - started
    cpu, rows, batches = (after - start for after, start in zip(counts(), before, strict=True))
    return Turn(load.seconds, elapsed, sum(load.statuses.values()) - load.statuses["200"], cpu, rows, batches)


def reload(folder: Path, *options: str) -> None:
    """An adapter is loaded, asked and unloaded over and over, while others are asked."""
    with serving(folder, *options, "--access.adapters_folder", folder, names=NAMES[:3]) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        load = Load(server, [body for body in uploaded(server) if NAMES[3].encode() not in body])
        one = {"model": "guest", "messages": messages("", photo(0))}
        load.start()
        give_up, n_times, texts = time.monotonic() + SECONDS, 0, set()
        while time.monotonic() < give_up:
            client.post("/v1/models", json={"id": "guest", "folder": NAMES[3]}).raise_for_status()
            texts.add(client.post("/v1/chat/completions", json=one).raise_for_status().json()["choices"][0]["message"]["content"])
            client.delete("/v1/models/guest").raise_for_status()
            n_times += 1
        load.stop()
        print(f"{n_times} times loaded, asked and unloaded ({len(texts)} different answers); the others: {dict(load.statuses)}")


def end(folder: Path, *options: str) -> None:
    """SIGTERM, five times, at a random moment under load."""
    for turn in range(5):
        with serving(folder, *options, names=NAMES) as server:
            load = Load(server, uploaded(server))
            before = server.metric("adalink_requests_total")
            load.start()
            time.sleep(random.Random(turn).uniform(1, 3))
            last = server.end().splitlines()[-1]
            load.stop()
            print(f"exit code {server.process.returncode}; clients: {dict(load.statuses)}, and {before:.0f} before; server: {last}")


def bad(folder: Path, *options: str) -> None:
    """10,000 requests of every bad kind, and the memory before and after."""
    from test_serve_bad_requests import BAD

    with serving(folder, *options, "--limits.pixels", "4000000", names=NAMES) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        good = {"model": NAMES[0], "messages": messages("", photo(0))}
        statuses: Counter[int] = Counter()
        for n in range(10_000):
            case = BAD[n % len(BAD)]
            statuses[case.sent(client, NAMES[0]).status_code] += 1
            if n in (500, 9_999):
                print(f"after {n + 1}: {server.rss() / 2**20:.0f} MiB, {dict(statuses)}", flush=True)
        print("and then", client.post("/v1/chat/completions", json=good).raise_for_status().status_code, data_url(b"")[:5])


if __name__ == "__main__":
    ways = {"mixing": mixing, "wide": mixing, "varied": partial(mixing, lengths=VARIED), "reload": reload, "end": end, "bad": bad}
    parser = argparse.ArgumentParser(description="What is not known here is given to the servers.")
    parser.add_argument("way", choices=ways)
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), wide_language(Path(name) / "language") if given.way in ("wide", "varied") else "scenes:language")
        ways[given.way](Path(name), *options)
