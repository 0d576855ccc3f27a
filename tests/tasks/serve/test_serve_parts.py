"""The parts of the server that need no model: waiting, written text, draws, uploads, remote images, limits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from shared import PATIENCE
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from adalink.errors import ConfigError
from multimodal.batches.tokenize import Row
from multimodal.generation.generate import GenerationSettings
from tasks.scenes import language_folder
from tasks.serve.access import BodyGuard, room_for_connections
from tasks.serve.errors import Refused
from tasks.serve.images import RemoteImages, Upload, Uploads, is_public
from tasks.serve.sampling import Draw, DrawnRows, Sampling, drawn
from tasks.serve.scheduler import Ask, Job, ServedImage, Waiting, Written, _GrowingText, chosen, joining
from tasks.serve.settings import Access, Batching, RequestLimits, ServeSettings


def job(adapter: str = "a", n_prompt: int = 5, n_new: int = 10, beams: int = 1) -> Job:
    settings = GenerationSettings(max_new_tokens=n_new, num_beams=beams)
    ask = Ask(adapter=adapter, row=Row((0,) * n_prompt, (0,) * n_prompt), images=(ServedImage("p", None),), settings=settings)
    return Job(ask, streams=False, loop=None, events=asyncio.Queue())  # type: ignore[arg-type]


def fits(n_prompt: int, n_new: int) -> bool:
    return n_prompt + n_new <= 100


def test_a_batch_mixes_adapters_and_keeps_the_order() -> None:
    jobs = [job("a"), job("b"), job("a"), job("c")]
    assert chosen(jobs, Batching(size=3), fits) == jobs[:3]
    assert chosen(jobs, Batching(mixing="one_adapter"), fits) == [jobs[0], jobs[2]]


def test_beams_go_with_the_same_beams_only() -> None:
    jobs = [job(), job(beams=2), job(), job(beams=2), job(beams=2, n_new=11)]
    assert chosen(jobs, Batching(), fits) == [jobs[0], jobs[2]]
    assert chosen(jobs[1:], Batching(), fits) == [jobs[1], jobs[3]]


def test_every_row_has_room_for_the_longest_text_of_its_batch() -> None:
    jobs = [job(n_prompt=80, n_new=10), job(n_prompt=5, n_new=60), job(n_prompt=5, n_new=20)]
    assert chosen(jobs, Batching(), fits) == [jobs[0], jobs[2]]
    assert chosen(jobs[1:], Batching(), fits) == jobs[1:]


def test_a_batch_holds_no_more_tokens_than_its_budget_and_a_longer_request_runs_alone() -> None:
    def anything(n_prompt: int, n_new: int) -> bool:
        return True

    budget = Batching(tokens=100)
    short, long, huge = job(n_prompt=10, n_new=10), job(n_prompt=40, n_new=10), job(n_prompt=400, n_new=10)
    assert chosen([short] * 9, budget, anything) == [short] * 5
    assert chosen([short, long, short, short], budget, anything) == [short, long]  # each row is as long as the longest
    assert chosen([huge, short], budget, anything) == [huge]
    assert chosen([short, huge, short], budget, anything) == [short, short]
    beams = [job(n_prompt=10, n_new=10, beams=2) for _ in range(4)]
    assert chosen(beams, budget, anything) == beams[:2]
    assert joining([short, short, short], [short] * 3, budget, anything) == [short] * 2
    assert joining([long, short], [short] * 3, budget, anything) == []  # nobody overtakes it
    assert joining([short], [huge], budget, anything) == []
    assert joining([], [short], budget, anything) == []
    with pytest.raises(ConfigError, match=r"batching.tokens is 0"):
        Batching(tokens=0)


@pytest.mark.parametrize(("limits", "wanted", "room"), [((256, 256), 512, 32), ((1024, 1024), 512, 512), ((1024, 4096), 2000, 2000), ((100, 100), 512, 16), ((-1, -1), 512, 512)])
def test_there_are_no_more_connections_than_files_may_be_open(limits: tuple[int, int], wanted: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [limits]
    monkeypatch.setattr("resource.getrlimit", lambda _: now[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, value: now.append(value))
    assert room_for_connections(wanted) == room


class Clock:
    """Stands for `time` where jobs wait: waiting takes no time, and exactly as long as it was to take; meanwhile somebody may come."""

    def __init__(self, waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting, self.now, self.coming = waiting, 100.0, list[Job]()
        monkeypatch.setattr("tasks.serve.scheduler.time", self)
        monkeypatch.setattr(waiting._changed, "wait", self.wait)

    def perf_counter(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        while self.coming:
            self.put(self.coming.pop())
        self.now += seconds

    def put(self, one: Job) -> None:
        one.queued = self.now
        self.waiting.put(one)

    def took(self) -> tuple[int, float]:
        """How many jobs come at a time, and after how many seconds."""
        started, jobs = self.now, self.waiting.take()
        assert isinstance(jobs, list)
        return len(jobs), round(self.now - started, 6)


def test_a_lone_request_does_not_wait_and_company_is_waited_for_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(Batching(wait_ms=200), fits)
    clock = Clock(waiting, monkeypatch)
    clock.put(job())
    assert clock.took() == (1, 0.0)
    with waiting.arriving():
        clock.put(job())
        assert clock.took() == (1, 0.2)
        clock.coming = [job()]
        clock.put(job())
        assert clock.took() == (2, 0.2)


def test_clients_that_were_just_answered_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(Batching(wait_ms=200), fits)
    clock = Clock(waiting, monkeypatch)
    for _ in range(2):
        clock.put(job())
    assert clock.took() == (2, 0.0)
    clock.put(job())  # came while the two were answered
    clock.coming = [job()]
    assert clock.took() == (2, 0.2)
    clock.put(job())
    clock.put(job(beams=2))
    assert clock.took() == (1, 0.0)  # there is something else to do than to wait


def test_who_waits_for_a_job_is_woken_by_one() -> None:
    """With threads and the real clock, which end it or do not, and however late."""
    waiting = Waiting(Batching(wait_ms=10), fits)
    for come in (lambda: waiting.put(job()), lambda: waiting.put_errand(lambda: None), waiting.close):
        thread = threading.Timer(0.05, come)
        thread.start()
        assert (waiting.take() is None) == (come == waiting.close)
        thread.join()


def test_jobs_join_a_running_batch_in_order_and_none_is_overtaken() -> None:
    running = [job("a"), job("a")]
    jobs = [job("b"), job("a"), job(beams=2), job("a")]
    assert joining(jobs, running, Batching(), fits) == jobs[:2]  # what is behind the beams waits with them
    assert joining(jobs, running, Batching(size=3), fits) == jobs[:1]
    assert joining(jobs, running, Batching(size=2), fits) == []
    assert joining(jobs, running, Batching(mixing="one_adapter"), fits) == []
    assert joining(jobs[1:], running, Batching(mixing="one_adapter"), fits) == jobs[1:2]
    assert joining([job()], [job(beams=2)], Batching(), fits) == []


def test_a_running_batch_is_not_held_up_and_is_joined_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, running = Waiting(Batching(wait_ms=200, size=8), fits), [job(), job()]
    clock = Clock(waiting, monkeypatch)
    for one in running:
        clock.put(one)
    assert waiting.take() == running
    assert waiting.take(running) == []  # at once
    clock.put(job())
    clock.now += 0.19
    assert waiting.take(running) == []  # for others may come, and reading prompts holds up those that run
    clock.now += 0.02
    assert len(waiting.take(running) or ()) == 1  # type: ignore[arg-type]
    assert clock.now == 100 + 0.19 + 0.02  # none of it was waited
    for _ in range(6):
        clock.put(job())
    assert len(waiting.take(running) or ()) == 6  # type: ignore[arg-type]  # full
    waiting.put(job(beams=2))
    assert waiting.take(running) == []
    waiting.put_errand(lambda: None, after="a")
    assert waiting.take(running) == []  # rows of the adapter are running
    waiting.close()
    assert waiting.take(running) == []  # they are finished first
    assert len(waiting.take() or ()) == 1  # type: ignore[arg-type]
    assert callable(waiting.take())
    assert waiting.take() is None


def test_what_changes_the_model_runs_first_but_after_the_jobs_that_it_waits_for() -> None:
    waiting = Waiting(Batching(mixing="one_adapter"), fits)
    done: list[str] = []
    waiting.put(job("a"))
    waiting.put(job("b"))
    waiting.put_errand(lambda: done.append("b is gone"), after="b")
    waiting.put_errand(lambda: done.append("c is here"))
    taken = [waiting.take() for _ in range(4)]
    assert [one() if callable(one) else [j.ask.adapter for j in one or ()] for one in taken] == [None, ["a"], ["b"], None]
    assert done == ["c is here", "b is gone"]


def test_a_closed_queue_gives_what_it_has_and_then_ends() -> None:
    waiting = Waiting(Batching(wait_ms=10_000), fits)
    gone = job()
    gone.cancelled = True
    waiting.put(gone)
    waiting.put(job())
    with waiting.arriving():
        waiting.close()
        assert len(waiting.take() or ()) == 1  # type: ignore[arg-type]
        assert waiting.take() is None


def test_pieces_join_to_the_text_and_never_take_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_folder())
    ids = tokenizer("a large red ball is in the middle , and a small blue star .", add_special_tokens=False)["input_ids"]
    for stop in ((), (" star",), ("middle , and a",), (" b",)):
        written = Written(tokenizer, 100, stop)
        pieces = []
        for token in [*ids, tokenizer.eos_token_id]:
            written.add(token)
            pieces.append(written.fresh())
            if written.reason:
                break
        assert written.reason == "stop"
        assert "".join(pieces) == written.text
        assert len([piece for piece in pieces if piece]) > (1 if stop == (" b",) else 2)
        whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert written.text == (whole.partition(stop[0])[0].strip() if stop else whole)
    written = Written(tokenizer, 3)
    for token in ids[:3]:
        written.add(token)
    assert written.reason == "length"


def tokenizers() -> list[Any]:
    """As models have them: pieces of bytes, pieces after a mark for spaces, and words whose marks are put right afterwards."""
    from existing_families import tokenizer_of
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    texts = ["a large red ball isn't in the middle , and a small blue star ! ünïcödé 日本語 😀", "it 's what they 're for . do n't we ?"] * 4
    marked = Tokenizer(models.BPE(unk_token="<unk>"))
    marked.pre_tokenizer, marked.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    marked.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "</s>"], show_progress=False))
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "</s>"], show_progress=False))
    made = [PreTrainedTokenizerFast(tokenizer_object=one, eos_token="</s>", clean_up_tokenization_spaces=True) for one in (marked, words)]
    return [AutoTokenizer.from_pretrained(language_folder()), tokenizer_of(["<image>"]), *made]


def test_a_text_that_grows_is_what_the_whole_decodes_to_and_decodes_few_tokens_again() -> None:
    for tokenizer in tokenizers():
        for seed in range(4):
            ids = torch.randint(len(tokenizer), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
            growing, n_decoded, decode = _GrowingText(tokenizer), 0, tokenizer.decode

            def counted(tokens: list[int], decode: Any = decode, **options: Any) -> str:
                nonlocal n_decoded
                n_decoded += len(tokens)
                return decode(tokens, **options)  # type: ignore[no-any-return]

            growing._tokenizer = SimpleNamespace(decode=counted)
            for n in range(1, 200):
                assert growing.of(ids[:n]) == decode(ids[:n], skip_special_tokens=True)
            assert n_decoded < 3 * 16 * 200  # and not 200 * 200 / 2


def test_draws_follow_the_probabilities_and_leave_other_rows_alone() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4001, 1)
    scores = DrawnRows([None, *[Sampling(temperature=0.7, top_p=1.0, seed=seed) for seed in range(4000)]])(torch.zeros(4001, 1), logits)
    assert torch.equal(scores[0], logits[0])
    assert torch.allclose(scores[1:].argmax(-1).bincount(minlength=4) / 4000, torch.softmax(logits[0] / 0.7, 0), atol=0.03)
    nucleus = DrawnRows([Sampling(temperature=0.7, top_p=0.8, seed=1)])
    found = {int(nucleus(torch.zeros(1, 1), logits[:1]).argmax()) for _ in range(100)}
    assert found == {1, 2}  # p is 0.04, 0.18, 0.77, 0.01: two tokens reach 0.8


def test_a_draw_is_the_same_bits_beside_any_other_rows() -> None:
    scores = torch.randn(5, 1000)
    settings = [Sampling(temperature=0.5 + 0.2 * i, top_p=(1.0, 0.9)[i % 2], seed=i % 3) for i in range(5)]
    together = [Draw(one) for one in settings]
    alone = [Draw(one) for one in settings]
    for _ in range(3):
        whole = drawn(scores, together)
        assert all(torch.equal(drawn(scores[i : i + 1], [draw])[0], whole[i]) for i, draw in enumerate(alone))
    assert not torch.equal(drawn(scores, together), whole)  # the next draw is another


def test_noise_is_gumbels_in_every_word_and_draw() -> None:
    """Its mean is Euler's constant, its variance pi^2 / 6, and neighbours have nothing in common: words, draws of a row, seeds."""
    flat = torch.zeros(1, 200_000)
    first, second = (drawn(flat, [draw])[0] + math.log(flat.shape[1]) for draw in [Draw(Sampling(temperature=1, top_p=1, seed=7))] * 2)
    (other,) = drawn(flat, [Draw(Sampling(temperature=1, top_p=1, seed=8))]) + math.log(flat.shape[1])
    for noise in (first, second, other):
        assert abs(noise.mean() - 0.5772) < 0.02
        assert abs(noise.var() - 1.6449) < 0.04
        assert 10 < noise.max() < 30
    pairs = [(first, second), (first, other), (first[1:], first[:-1]), (first[::2], first[1::2])]
    assert all(abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.015 for pair in pairs)


def test_the_oldest_uploads_make_room() -> None:
    uploads = Uploads(most_bytes=10)
    first, second, third = Upload("a", b"1234"), Upload("b", b"1234"), Upload("c", b"1234")
    for upload in (first, second):
        uploads.add(upload)
    uploads.get(first.id, "f")  # the second is now the one that was used least lately
    uploads.add(third)
    assert uploads.get(first.id, "f") is first
    with pytest.raises(Refused, match=r"f is 'file-.*' *, which is not stored"):
        uploads.get(second.id, "f")
    with pytest.raises(Refused, match="the image has 11 bytes, and 10 are stored"):
        uploads.add(Upload("d", b"x" * 11))


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            self.connection.recv(1)  # until the client has had enough
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "/here")
        self.end_headers()
        self.wfile.write(b"x" * (2000 if self.path == "/large" else 10))

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def origin() -> Any:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://localhost:{found.server_address[1]}"
        found.shutdown()


def test_pictures_are_fetched_from_allowed_hosts_within_limits(origin: str) -> None:
    images = RemoteImages(["localhost"], 1000, seconds=PATIENCE, reachable=lambda address: True)
    assert images.fetch(f"{origin}/a.png?size=1", "url") == b"x" * 10
    for url, note in (
        (f"{origin}/large", "more than 1000 bytes"), (f"{origin}/moved", "localhost answered 302, expected 200"),
        ("http://other.example/a", "fetches no images from other.example"), ("http://user@localhost/a", "without a user name"), ("http://localhost/a b", "in ASCII"),
        ("http://localhost:1/", "could not be fetched from localhost"), ("http://localhost:99999/", "is no address"), ("http://[::1/", "is no address"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=note):
            images.fetch(url, "url")
    with pytest.raises(Refused, match=r"localhost did not send the image within 0\.3 seconds"):
        RemoteImages(["localhost"], 1000, seconds=0.3, reachable=lambda address: True).fetch(f"{origin}/slow", "url")
    with pytest.raises(Refused, match="this server fetches no images: send a data URL"):
        RemoteImages([], 1000).fetch(f"{origin}/a.png", "url")


TRICKLES = {
    "the status line": (b"", b"H"),
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "continuations": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the size of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "the body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("name", TRICKLES)
def test_a_host_that_sends_a_byte_now_and_then_is_let_go_in_time(name: str) -> None:
    begins, goes_on = TRICKLES[name]
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(begins)
                while True:
                    connection.sendall(goes_on)
                    time.sleep(0.03)

        threading.Thread(target=trickle, daemon=True).start()
        images = RemoteImages(["localhost"], 10**6, seconds=0.3, reachable=lambda address: True)
        with pytest.raises(Refused, match=r"did not send the image within|is no HTTP"):  # http.client allows a hundred headers
            images.fetch(f"http://localhost:{listening.getsockname()[1]}/a.png", "url")


def test_a_name_that_nobody_resolves_is_let_go_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [] * answer.wait(PATIENCE))
    with pytest.raises(Refused, match=r"did not send the image within 0\.2 seconds"):
        RemoteImages(["*"], 1000, seconds=0.2).fetch("http://slow.example/a.png", "url")
    answer.set()


def test_private_addresses_are_never_connected_to(origin: str) -> None:
    for url in (origin, "http://127.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://169.254.169.254/latest", "http://10.1.2.3/", "http://2130706433/"):
        with pytest.raises(Refused, match=r"is not on the public internet|could not be fetched"):
            RemoteImages(["*"], 1000, seconds=PATIENCE).fetch(url, "url")
    assert [is_public(address) for address in ("8.8.8.8", "2606:4700::1111", "192.168.1.1", "::1", "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "2002:7f00:1::")] == [
        True, True, False, False, False, False, False, False]  # fmt: skip


@pytest.mark.parametrize("address", [
    "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "64:ff9b:1:2::a00:1", "fec0::1", "feff::1", "::7f00:1", "::a9fe:a9fe", "::ffff:0:7f00:1", "::", "::1",
    "2002:a00:1::", "2002:a9fe:a9fe::1", "2002:c0a8:101::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "3fff::1", "5f00::1", "fe80::1", "fe80::1%eth0",
    "fd00::1", "ff02::1", "100::1", "::ffff:169.254.169.254", "0.0.0.0", "127.1.2.3", "169.254.169.254", "192.88.99.1", "198.18.0.1", "240.0.0.1", "255.255.255.255",
])  # fmt: skip
def test_an_address_that_stands_for_a_private_one_or_for_none_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2001:4860:4860::8888", "2a00:1450:4001::1", "::ffff:8.8.8.8", "2002:808:808::1"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


async def _sent(limits: RequestLimits, sizes: list[int]) -> list[tuple[int, str]]:
    """What requests get that are all there before the first is answered."""
    read, may_answer = [], asyncio.Event()

    async def echo(request: Request) -> PlainTextResponse:
        read.append(len(await request.body()))
        await may_answer.wait()
        return PlainTextResponse(str(len(await request.body())))

    async def refused(request: Request, error: Exception) -> PlainTextResponse:
        assert isinstance(error, Refused)
        return PlainTextResponse(str(error), error.status)

    app = Starlette(routes=[Route("/", echo, methods=["POST", "GET"])])
    app.add_exception_handler(Refused, refused)
    guard = BodyGuard(app, limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://x") as client:
        requests = [asyncio.create_task(client.post("/", content=b"x" * size)) for size in sizes] + [asyncio.create_task(client.get("/"))]
        while len(read) + sum(request.done() for request in requests) < len(requests):
            await asyncio.sleep(0)
        may_answer.set()
        replies = await asyncio.gather(*requests)
        again = await client.post("/", content=b"x")
    assert replies[-1].status_code == again.status_code == 200  # a request without a body is not counted, and all counts go back
    assert (guard.n_requests, guard.n_bytes) == (0, 0)
    return [(reply.status_code, reply.text) for reply in replies[:-1]]


def test_more_requests_than_the_limit_are_told_to_come_again() -> None:
    found = asyncio.run(_sent(RequestLimits(in_flight=2), [5, 5, 5]))
    assert sorted(status for status, _ in found) == [200, 200, 429]
    assert "2 requests are in work, the limit: try again" in next(text for status, text in found if status == 429)


def test_more_bytes_than_the_limits_are_refused() -> None:
    assert asyncio.run(_sent(RequestLimits(body_bytes=10), [10, 11])) == [(200, "10"), (413, "the body has more than 10 bytes, the limit: send a smaller image")]
    found = asyncio.run(_sent(RequestLimits(buffered_bytes=25), [10, 10, 10]))
    assert sorted(status for status, _ in found) == [200, 200, 429]
    assert "25 bytes of requests are held" in next(text for status, text in found if status == 429)


def test_settings_that_cannot_be_are_told() -> None:
    with pytest.raises(ConfigError, match="give mixed or one_adapter"):
        Batching(mixing="none")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1 request and 0 milliseconds"):
        Batching(wait_ms=-1)
    with pytest.raises(ConfigError, match=r"limits.in_flight is 0: give 1 or more"):
        RequestLimits(in_flight=0)
    with pytest.raises(ConfigError, match="port is -1"):
        ServeSettings(port=-1)
    assert ServeSettings().access == Access()
    assert Access(hosts="a.example, b.example", origins="*") == Access(hosts=("a.example", "b.example"), origins=("*",))
