"""Two processes share the generation, and each computes the metrics on the whole corpus, once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Machine

from adalink import Bridge
from multimodal.data.feature_cache.encode import encode_all
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.evaluation.evaluate import predict
from tasks.runs.compose import compose
from tasks.scenes.dataset import Scenes

N_PICTURES = 5  # odd: the shares of two processes are unequal


def composed() -> VisionLanguageModel:
    torch.manual_seed(0)
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template)
    adapter = model.add_adapter("one", {"bridge": Bridge(kind="linear")})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


def evaluated() -> dict[str, Any]:
    """Texts, metrics, and how many rows this process generated."""
    model, source, task = composed(), Scenes(split="val", size=N_PICTURES), Captioning()
    rows = []
    generate = model.generate_batch

    def counted(batch: Any, settings: GenerationSettings) -> list[str]:
        texts = generate(batch, settings)
        rows.append(len(texts))
        return texts

    model.generate_batch = counted  # type: ignore[method-assign]
    found = predict(model, source, task, encode_all(model, source), settings=GenerationSettings(max_new_tokens=8))
    score = task.score(found.texts, source)
    return {"texts": {str(item): text for item, text in found.texts.items()}, "figures": dict(score.metrics), "rows": sum(rows)}


def written(folder: Path) -> int:
    """What `evaluated` gives, in a file of this process."""
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(evaluated()))
    return 0


def test_two_processes_give_the_figures_of_one_on_the_whole_corpus(tmp_path: Path) -> None:
    Machine(tmp_path).start(2, written, tmp_path).ended()
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = evaluated()
    assert [share["rows"] for share in shares] == [3, 2]
    assert alone["rows"] == N_PICTURES
    for share in shares:
        assert list(share["texts"]) == list(alone["texts"])  # each image once, in the order of the data
        assert share["texts"] == alone["texts"]
        assert share["figures"] == pytest.approx(alone["figures"], abs=1e-9)
    # The control: a mean over the two shares would be another metric, since CIDEr's document frequencies are those of the corpus.
    items = list(alone["texts"])
    source = Scenes(split="val", size=N_PICTURES)
    halves = [Captioning().score({int(item): alone["texts"][item] for item in part}, source).metrics["CIDEr"] for part in (items[:3], items[3:])]
    assert abs((3 * halves[0] + 2 * halves[1]) / N_PICTURES - alone["figures"]["CIDEr"]) > 1e-6
