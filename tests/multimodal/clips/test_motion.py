"""The order of frames matters where motion is asked for: a model that is trained on clips beats one on the same clips shuffled, and one on single frames."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from composed import language
from made_clips import frame_folder
from numpy.typing import NDArray
from torch import nn

from adalink import AdaLink, Bridge
from multimodal.data.feature_cache.encode import encode_all
from multimodal.encoders.tower import load_tower
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

T, SIDE, N_TRAIN, N_VAL = 4, 32, 200, 60
WORDS = ("red", "cube", "ball", "big")  # for right, left, down and up


def clip(rng: np.random.Generator, direction: int) -> NDArray[np.uint8]:
    """[T, SIDE, SIDE, 3]: a square that crosses the image, so that no frame alone says which way."""
    frames = rng.integers(0, 60, (T, SIDE, SIDE, 3)).astype(np.uint8)
    across, along = int(rng.integers(0, SIDE - 8)), range(0, SIDE, SIDE // T)
    for frame, at in zip(frames, along if direction in (0, 2) else reversed(along), strict=True):
        y, x = (across, at) if direction < 2 else (at, across)
        frame[y : y + 8, x : x + 8] += 180
    return frames


def arranged(frames: NDArray[np.uint8], how: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    return {"moving": lambda: frames, "shuffled": lambda: frames[rng.permutation(T)], "single": lambda: frames[[int(rng.integers(T))] * T]}[how]()


def trained_encoder(folder: Path) -> Path:
    """A TimeSformer that learned the direction from clips of its own."""
    torch.manual_seed(0)
    config = t.TimesformerConfig(image_size=SIDE, patch_size=8, num_frames=T, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, initializer_range=0.1)
    model, head, rng = t.TimesformerModel(config), nn.Linear(48, 4), np.random.default_rng(1)
    prepare = t.TimesformerVideoProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    with torch.no_grad():  # they start at zero, and what is told apart by time and place is learned late then
        for embeddings in (model.embeddings.time_embeddings, model.embeddings.position_embeddings):
            embeddings.normal_()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 2e-3)
    for _ in range(150):
        labels = rng.integers(0, 4, 32)
        videos = [torch.from_numpy(clip(rng, int(label))).permute(0, 3, 1, 2) for label in labels]
        states = model(prepare(videos=videos, return_tensors="pt")["pixel_values"]).last_hidden_state
        loss = nn.functional.cross_entropy(head(states[:, 1:].mean(1)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    prepare.save_pretrained(folder)
    return folder


def samples(folder: Path, how: str, n: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        direction = int(rng.integers(4))
        frames = frame_folder(folder / how / f"{seed}_{i}", list(arranged(clip(rng, direction), how, rng)))
        found.append(Sample(key=f"{seed}_{i}", image_id=i, media=frames, kind="video", captions=(WORDS[direction],)))
    return found


def right_share(encoder: Path, folder: Path, how: str) -> float:
    """Trained on clips that are arranged so, and asked about others."""
    model = VisionLanguageModel(load_tower(encoder), language("opt"), Template(prompt="<image><bos>question: {question} answer:"))
    torch.manual_seed(0)
    model.add_adapter("a", {"bridge": Bridge(kind="mlp", hidden=48, pool="frames"), "adalink": AdaLink(rank=8, modalities=("image", "text"))}).double()
    source = samples(folder, how, N_TRAIN, 2)
    settings = TrainSettings(epochs=12, batch_size=16, learning_rate=1e-2, checkpoint_every=1000, log_every=1000)

    def texts(sample: Sample, rng: random.Random) -> list[Text]:
        return [Text("", sample.captions[0])]

    out = folder / f"run_{how}"
    out.mkdir()
    train(model, source, texts, settings, out, patches=encode_all(model, source, dtype="float32"))
    val = samples(folder, how, N_VAL, 3)
    written = model.eval().generate([one.media for one in val], [""] * N_VAL, max_new_tokens=1)
    return sum(text.strip() == one.captions[0] for text, one in zip(written, val, strict=True)) / N_VAL


@pytest.mark.slow
def test_a_trained_model_beats_shuffled_clips_and_single_frames(tmp_path: Path) -> None:
    encoder = trained_encoder(tmp_path / "encoder")
    share = {how: right_share(encoder, tmp_path, how) for how in ("moving", "shuffled", "single")}
    print(share)
    assert share["moving"] > 0.8
    assert max(share["shuffled"], share["single"]) < share["moving"] - 0.25
