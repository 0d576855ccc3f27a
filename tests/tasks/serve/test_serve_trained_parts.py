"""Adapters that trained more than edits in the language model: an adapted encoder is served, and an answer head is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from served import Server, messages, photo, serving
from shared import PATIENCE

from adalink import AdaLink, Bridge, LoRA
from multimodal.data.images.decode import decode_image
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.runs.compose import compose
from tasks.vqa import Vqa


def moved(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    """A model with an adapted encoder, saved as `seen`; beside it `chosen`, with a head."""
    torch.manual_seed(0)
    methods = {"bridge": Bridge(kind="mlp", hidden=64, init_scale=8.0), "adalink": AdaLink(rank=8, modalities=("image", "text"))}
    chooser = compose("scenes:encoder", "scenes:language", template=Vqa().template)
    chooser.add_adapter("chosen", methods)
    chooser.add_answer_head(("yes", "no"))
    chooser.save_pretrained(folder / "chosen", task={"task": "vqa"})
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template)
    moved(model.add_adapter("seen", methods))
    moved(model.add_vision_adapter({"lora": LoRA(groups={"image": ("image",)}, rank=2, alpha=4)}))
    model.save_pretrained(folder / "seen", task={"task": "captioning"})
    return model


@pytest.fixture(scope="module")
def server(model: VisionLanguageModel, folder: Path) -> Iterator[Server]:
    with serving(folder, "--access.adapters_folder", folder, names=("seen",)) as running:
        yield running


def test_what_is_served_is_what_the_adapted_encoder_sees(server: Server, model: VisionLanguageModel) -> None:
    for index in (0, 1, 0):  # the image that was asked about before too
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "seen", "messages": messages("", photo(index))}, timeout=PATIENCE)
        assert reply.json()["choices"][0]["message"]["content"] == model.generate([decode_image(photo(index))], [""])[0]


def test_what_cannot_join_a_running_server_is_one_sentence(server: Server) -> None:
    for name, sentence in (("chosen", "chooses among 2 answers, and a server writes its texts"), ("seen", "is settled when a server starts: give it with --adapter")):
        reply = httpx.post(f"{server.url}/v1/models", json={"id": "other", "folder": name}, timeout=PATIENCE)
        assert reply.status_code == 400
        assert sentence in reply.json()["error"]["message"]
    assert [card["id"] for card in httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]] == ["seen", "__base__"]
