"""Names are looked up on disk at once where the hub's address leads nowhere."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from adalink.errors import ConfigError
from multimodal.encoders.tower import load_tower
from multimodal.language import load_language
from multimodal.loading import hub_or_disk

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")  # a name that never resolves


def test_an_unknown_name_is_told_at_once_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    look_up = socket.getaddrinfo

    def counted(host: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    for load, name in ((load_language, "no-such/model"), (load_tower, "hf:no-such/encoder"), (load_tower, "timm:vit_tiny_patch16_224.augreg_in21k")):
        with pytest.raises(ConfigError, match="cannot load the"):
            load(name)
    assert asked == ["hub.invalid"] * 3  # once for each; the clients' own retries ask for 23 s, 23 s and 46 s
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_resolves_a_proxy_and_a_choice_of_the_users_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_or_disk():
        assert constants.HF_HUB_OFFLINE is True
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:1")
    with hub_or_disk():
        assert constants.HF_HUB_OFFLINE is False
    monkeypatch.delenv("https_proxy")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with hub_or_disk():
        assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_disk():
        assert constants.HF_HUB_OFFLINE is True


def test_the_setting_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), hub_or_disk():
        _ = 1 / 0
    assert constants.HF_HUB_OFFLINE is False
