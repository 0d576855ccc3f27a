"""What the processes of the tests on several ranks do; importable, because a process is sent its function by name."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from composed import Drawn, compose, excite
from safetensors.torch import save_file

from adalink import AdaLink, Bridge
from adalink.errors import BudgetError, DataError, TerminatedError
from multimodal.model import VisionLanguageModel
from multimodal.patch_table import PatchTable, encode_all
from multimodal.sample import Sample
from multimodal.template import Text
from multimodal.train import train
from multimodal.train_settings import TrainSettings

N = 7  # pictures: no batch size and no number of ranks here divides it
SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 2, "log_every": 1, "checkpoint_every": 5, "warmup": 0.0, "learning_rate": 1e-2}


def ragged(sample: Sample, rng: random.Random) -> list[Text]:
    """One to three texts of one to six words: the ranks' numbers of targets differ."""
    number = int(sample.key[-6:])
    words = ("yes", "a", "red", "cube", "is", "big")
    return [Text("is it red ?", " ".join(rng.choice(words) for _ in range(1 + (number + k) % 6))) for k in range(1 + number % 3)]


def model() -> VisionLanguageModel:
    made = compose("opt")
    torch.manual_seed(5)
    excite(made.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))}).double())
    return made


def table(n: int = N) -> PatchTable:
    """The pictures' features, made once: an encoder in float32 rounds differently in another batch."""
    one = compose("opt").tower
    return PatchTable(torch.randn(n, one.n_patches, one.width, generator=torch.Generator().manual_seed(3)).half(), {})


def run(folder: Path, resume: bool = False, pause: float = 0.0, bad: tuple[int, ...] = (), patches: PatchTable | None = None, workers: int = 0, **fields: Any) -> int:
    """Train; 143 where SIGTERM ended it, 9 where the budget for bad samples did."""
    made = model()

    def measure() -> dict[str, float]:
        time.sleep(pause)
        return {}

    settings = TrainSettings(**{**SETTINGS, **fields, "workers": workers, "measure_every": int(pause > 0)})
    try:
        train(made, Drawn(N, bad=bad), ragged, settings, folder, resume=resume, patches=patches, measure=measure)
    except TerminatedError as error:
        print(f"adalink: {error}")
        return 143
    except BudgetError as error:
        print(f"adalink: {error}")
        return 9
    return 0


def several(jobs: list[dict[str, Any]]) -> int:
    """One run after the other in the same processes, whose start is what costs."""
    for job in jobs:
        if job.pop("kept", False):
            job["patches"] = table()
        wanted = job.pop("code", 0)
        assert run(**job) == wanted
    return 0


class Suicidal(Drawn):
    """The process that reads picture 3 is killed, as the system kills one that takes too much memory."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def worker_killed(folder: Path) -> int:
    """5 where the run says that a worker ended."""
    try:
        train(model(), Suicidal(N), ragged, TrainSettings(**{**SETTINGS, "workers": 1, "batch_size": 1}), folder)
    except DataError as error:
        print(f"adalink: {error}")
        return 5
    return 0


def encoded(folder: Path) -> int:
    """Every process writes the table that it has."""
    PartialState(cpu=True)
    found = encode_all(compose("opt"), Drawn(N, bad=(2, 5)), batch_size=1)
    save_file({"patches": found.patches, "bad": torch.tensor(list(found.bad))}, folder / f"{os.environ.get('RANK', 'alone')}.safetensors")
    return 0
