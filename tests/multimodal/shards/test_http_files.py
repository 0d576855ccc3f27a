"""Reading by ranges from a server that misbehaves: what passes is tried again, what does not is one sentence."""

from __future__ import annotations

import logging
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bad_server import Server, served, until
from shared import PATIENCE

from adalink.errors import ConfigError, DataError
from multimodal.data.shards import storage
from multimodal.data.shards.storage import HttpFiles, Passing, RemoteSettings, beside, is_url, redacted, remote_files, scrubbed

FAST = RemoteSettings(attempts=3, first_wait=0.01, timeout=PATIENCE)
HASTY = RemoteSettings(attempts=3, first_wait=0.01, timeout=0.3)  # where the server stalls
DATA = bytes(range(256)) * 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "a.tar").write_bytes(DATA)
    with served(tmp_path) as one:
        yield one


def test_ranges_sizes_and_whole_files_are_read_over_one_connection(server: Server) -> None:
    files = HttpFiles(FAST)
    url = server.url + "/a.tar"
    assert files.size(url) == 1024
    assert [files.read(url, at, size) for at, size in ((0, 1), (100, 300), (1023, 1), (5, 0))] == [DATA[:1], DATA[100:400], DATA[1023:], b""]
    assert files.whole(url) == DATA
    assert server.connections == 1


PASSING: tuple[int | str, ...] = (500, 502, 503, 429, 408, "short", "few", "hang up")


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(server: Server, fault: int | str) -> None:
    server.faults["a.tar"] = [fault, fault]
    assert HttpFiles(FAST).read(server.url + "/a.tar", 10, 20) == DATA[10:30]
    assert server.asked["a.tar"] == 3


def test_a_server_that_stalls_is_asked_again(server: Server) -> None:
    server.faults["a.tar"] = ["stall", "stall"]
    hasty = replace(HASTY, attempts=20)  # on a slow machine a good answer may come too late as well
    assert HttpFiles(hasty).read(server.url + "/a.tar", 10, 20) == DATA[10:30]
    assert server.asked["a.tar"] >= 3


LASTING: dict[int | str, tuple[str, int]] = {
    # what happens each time: what is said, and how often it is tried
    500: ("/a.tar cannot be read: the server answered 500 Internal Server Error, in the last of 3 attempts over \\d+ s", 3),
    "stall": ("/a.tar cannot be read: nothing came for 0.3 s, in the last of 3 attempts over \\d+ s", 3),
    "short": ("/a.tar cannot be read: 10 of 20 bytes came, in the last of 3", 3),
    "few": ("/a.tar cannot be read: 10 of 20 bytes came, in the last of 3", 3),
    "hang up": ("/a.tar cannot be read: RemoteDisconnected Remote end closed connection without response", 3),
    404: (r"/a.tar is not there \(the server answered 404 Not Found\); check the URL", 1),
    410: (r"/a.tar is not there \(the server answered 410 Gone\)", 1),
    403: (r"/a.tar may not be read \(the server answered 403 Forbidden\); is the URL signed", 1),
    418: (r"/a.tar cannot be read \(the server answered 418 .*\); expected 200 or 206", 1),
    "no ranges": (r"/a.tar is on a server that reads no ranges \(it answered 200\); copy the shards", 1),
    "moved:ftp://x/y": ("/a.tar was moved to ftp://x/y, which is not on the web", 1),
    "moved:/a.tar": ("/a.tar is moved on more than 5 times; give the URL of the shards themselves", 6),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_one_sentence(server: Server, fault: int | str) -> None:
    stated, asked = LASTING[fault]
    server.faults["a.tar"] = [fault] * 20
    with pytest.raises(DataError, match=stated):
        HttpFiles(HASTY if fault == "stall" else FAST).read(server.url + "/a.tar", 10, 20)
    until(lambda: server.asked["a.tar"] == asked)  # a client that has had enough may be ahead of the server


def test_a_server_that_is_not_there_is_one_sentence(server: Server) -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/a.tar cannot be read: ConnectionRefusedError .* Connection refused, in the last of 3"):
        HttpFiles(FAST).size("http://127.0.0.1:1/a.tar")


def test_pauses_double_and_a_server_may_ask_for_longer_ones(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults["a.tar"] = [500] * 3
    HttpFiles(RemoteSettings(first_wait=0.5)).size(server.url + "/a.tar")
    assert pauses == [0.5, 1.0, 2.0]


def test_a_moved_file_is_followed(server: Server, tmp_path: Path) -> None:
    server.faults["old.tar"] = ["moved:/a.tar"]
    assert HttpFiles(FAST).read(server.url + "/old.tar", 1, 2) == DATA[1:3]


def test_a_connection_that_rested_too_long_is_opened_again_at_once(server: Server) -> None:
    files = HttpFiles(RemoteSettings(attempts=1))
    files.size(server.url + "/a.tar")
    server.faults["a.tar"] = ["hang up"]
    assert files.read(server.url + "/a.tar", 1, 2) == DATA[1:3]


def test_a_forked_and_a_pickled_reader_open_connections_of_their_own(server: Server) -> None:
    files = HttpFiles(FAST)
    files.size(server.url + "/a.tar")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if files.read(server.url + "/a.tar", 3, 2) == DATA[3:5] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert server.connections == 2
    assert files.read(server.url + "/a.tar", 3, 2) == DATA[3:5]
    assert pickle.loads(pickle.dumps(files)).read(server.url + "/a.tar", 3, 2) == DATA[3:5]
    assert server.connections == 3


def test_a_name_and_a_password_are_sent_and_not_shown(server: Server) -> None:
    url = server.url.replace("http://", "http://me:s%40crt@") + "/b.tar?signature=abc"
    with pytest.raises(DataError, match=r"is not there") as raised:
        HttpFiles(FAST).size(url)
    assert "crt" not in str(raised.value)
    assert "abc" not in str(raised.value)
    assert server.headers[-1]["Authorization"] == "Basic bWU6c0BjcnQ="


SECRETS = ("us3r", "p4ss", "s1gn", "t0k3n", "fr4g")
LEAKS: tuple[int | str, ...] = (404, 403, 410, 418, 500, 503, "short", "few", "reset", "hang up", "stall", "no ranges", "moved:ftp://us3r:p4ss@x/y?sig=s1gn#fr4g", "moved:/a.tar?token=t0k3n")


@pytest.mark.parametrize("fault", LEAKS)
def test_no_secret_of_a_url_is_in_a_message_a_log_or_a_traceback(
    server: Server, fault: int | str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_NAMED", {})
    server.faults["a.tar"] = [fault] * 30
    url = server.url.replace("http://", "http://us3r:p4ss@") + "/a.tar?X-Amz-Signature=s1gn&token=t0k3n#fr4g"
    files = HttpFiles(HASTY)
    acts: list[Callable[[], object]] = [lambda: files.size(url), lambda: files.read(url, 10, 20), lambda: files.whole(url), lambda: list(files.pieces(url, 0, 1024))]
    found = []
    with caplog.at_level(logging.DEBUG):
        for act in acts:
            try:
                act()
            except (DataError, Passing) as error:
                found.append("".join(traceback.format_exception(error)))
    assert server.headers[-1]["Authorization"] == "Basic dXMzcjpwNHNz"  # the secrets were used
    assert len(found) >= 2
    assert all("127.0.0.1" in text for text in found if "DataError" in text)
    assert [secret for secret in SECRETS if secret in "".join(found) + caplog.text] == []


@pytest.mark.parametrize(
    "url",
    ["http://us3r:p4ss@127.0.0.1:t0k3n/a.tar", "http://us3r:p4ss@127.0.0.1:1/a b?sig=s1gn", "http://us3r:p4ss@127.0.0.1:1/\u00e9?sig=s1gn",
     "http://us3r:p4ss?t0k3n@127.0.0.1/a.tar", "http://us3r:p4ss@127.0.0.1:1/a.tar?sig=s1gn#fr4g", "nokind://us3r:p4ss@x/a?sig=s1gn",
     "http://[us3r:p4ss@x/a.tar?sig=s1gn"],
)  # fmt: skip
def test_a_url_that_nobody_can_ask_for_is_one_sentence_without_its_secrets(url: str) -> None:
    with pytest.raises((ConfigError, DataError)) as raised:
        remote_files(url, FAST).size(url)
    text = "".join(traceback.format_exception(raised.value))
    assert [secret for secret in SECRETS[1:] if secret in text] == []
    assert "\n" not in str(raised.value)


def test_what_a_library_says_of_a_url_is_scrubbed() -> None:
    url = "s3://us3r:p4%2Fss@b/x?X-Amz-Signature=s1gn%3D&token=t0k3n#fr4g"
    text = "GET https://b.s3.com/x?X-Amz-Signature=s1gn%3D failed: '/x?X-Amz-Signature=s1gn%3D&token=t0k3n' of us3r:p4/ss, s1gn= and fr4g"
    assert scrubbed(text, url) == "GET https://b.s3.com/x failed: '/x?***' of ***, *** and ***"
    assert scrubbed("nothing to hide", url) == "nothing to hide"


def test_urls_are_told_from_paths_and_joined_before_their_query() -> None:
    assert [is_url(name) for name in ("http://a/b", "S3://a", "hf://datasets/x", "pipe:touch x", "/a/b", "a//b", "C:\\x")] == [True, True, True] + [False] * 4
    assert beside("https://h/set/?sig=1", "a.tar") == "https://h/set/a.tar?sig=1"
    assert redacted("https://u:p@h:8/x?y#z") == "https://h:8/x"


@pytest.mark.parametrize("fields", [{"attempts": 0}, {"cache_bytes": -1}, {"timeout": 0.0}, {"first_wait": float("nan")}, {"connections": 0}, {"ahead": -1}])
def test_senseless_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="attempts are 1 or more"):
        RemoteSettings(**fields)  # type: ignore[arg-type]
