"""What the processes of the tests on several ranks do; importable, because a process is sent its function by name."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from composed import Drawn, compose, excite, tower
from forkserver import IMPORTED
from PIL import Image
from quantiser import find_torchao
from safetensors.torch import save_file

from adalink import AdaLink, Bridge, Method
from adalink.checkpoint.precision import Precision, settle
from adalink.errors import BudgetError, ConfigError, DataError, TerminatedError
from multimodal.batches.collate import Batch
from multimodal.data.feature_cache.encode import GROUP, PatchTable, encode_all
from multimodal.data.loader import Loaded
from multimodal.data.shards.reader import ShardSource
from multimodal.existing.connector_choice import ConnectorChoice
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Template, Text
from multimodal.training.distributed import agree, host_group, opened_accelerator
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

GO = "go"  # the file in a run's folder that lets it go on
N = 7  # images: no batch size and no number of ranks here divides it
SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 2, "log_every": 1, "checkpoint_every": 5, "warmup": 0.0, "learning_rate": 1e-2}


def ragged(sample: Sample, rng: random.Random) -> list[Text]:
    """One to three texts of one to six words: the ranks' numbers of targets differ."""
    number = int(sample.key[-6:])
    words = ("yes", "a", "red", "cube", "is", "big")
    return [Text("is it red ?", " ".join(rng.choice(words) for _ in range(1 + (number + k) % 6))) for k in range(1 + number % 3)]


def model(methods: Mapping[str, Method] | None = None, sees: str = "", connector: ConnectorChoice = "frozen") -> VisionLanguageModel:
    """A composed model; or one of this family, which sees already, whose connector may be trained too."""
    if sees:
        from existing_families import made as existing  # late: it has classes of many families

        made = VisionLanguageModel.from_model(*existing(sees), template=Template(prompt="<image>{question}", target="{text}"))
    else:
        made = compose("opt")
    adalink = AdaLink(rank=4, modalities=("image", "text"))
    torch.manual_seed(5)
    chosen = methods or {**({} if sees else {"bridge": Bridge(kind="linear")}), "adalink": adalink}
    excite(made.add_adapter("one", chosen, connector=connector).double())
    return made


def table(n: int = N) -> PatchTable:
    """The images' features, made once: an encoder in float32 rounds differently in another batch."""
    one = tower()
    return PatchTable(torch.randn(n, one.n_retained, one.width, generator=torch.Generator().manual_seed(3)).half(), {})


def holding(step: int, go: Path) -> Callable[[], dict[str, float]]:
    """Measures nothing; at this step it waits until `go` is there, so that a kill or a signal, however late it comes, finds the run alive."""
    steps = itertools.count(1)

    def measure() -> dict[str, float]:
        is_held = next(steps) == step
        while is_held and not go.exists():
            time.sleep(0.005)
        return {}

    return measure


def run(
    folder: Path, resume: bool = False, held: int = 0, bad: tuple[int, ...] = (), without: tuple[int, ...] = (), patches: PatchTable | None = None, workers: int = 0,
    methods: Mapping[str, Method] | None = None, sees: str = "", connector: ConnectorChoice = "frozen", quantise: str = "", shards: Path | None = None,
    **fields: Any,
) -> int:  # fmt: skip
    """Train; 143 where SIGTERM ended it, 9 where the budget for bad samples did, 8 where there was nothing to learn. held: the step at which it waits, where any, see `holding`."""
    made = model(methods, sees, connector)
    if quantise:
        find_torchao()
        settle(made.float().language.model, Precision(quantise=quantise), "tiny")  # type: ignore[arg-type]  # one of its values
    settings = TrainSettings(**{**SETTINGS, **fields, "workers": workers, "measure_every": int(held > 0)})
    source = Drawn(N, bad, without) if shards is None else ShardSource(shards)
    try:
        train(made, source, ragged, settings, folder, resume=resume, patches=patches, measure=holding(held, folder / GO))
    except TerminatedError as error:
        print(f"adalink: {error}")
        return 143
    except BudgetError as error:
        print(f"adalink: {error}")
        return 9
    except DataError as error:
        print(f"adalink: {error}")
        return 8
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
    """The process that reads image 3 is killed, as the system kills one that takes too much memory."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def exchanged(folder: Path) -> int:
    """Frozen buffers stay where they are, gradients are reduced in place, and what a step agrees on never meets a device."""
    settings, made = TrainSettings(), model()
    with opened_accelerator(settings, made, folder) as accelerator:
        parallel = accelerator.prepare(made)
        assert isinstance(parallel, torch.nn.parallel.DistributedDataParallel)
        assert not parallel.broadcast_buffers
        assert parallel.gradient_as_bucket_view
        accelerator.state._shared_state["device"] = torch.device("meta")  # where nothing can be read
        stop = signal.SIGTERM if accelerator.process_index else 0
        batch = Batch.__new__(Batch)
        object.__setattr__(batch, "n_targets", 2.0**25 + accelerator.process_index)  # float32 would lose the one
        agreed = agree(accelerator, [Loaded(batch, (), (accelerator.process_index,))], stop, [1, 3], host_group(accelerator))
        assert (agreed.stop, agreed.n_targets, agreed.good) == (signal.SIGTERM, 2.0**26 + 1, (1, 1))
        accelerator.state._shared_state["device"] = torch.device("cpu")
    return 0


def missing() -> int:
    """Fails where a module is not here that the fork server was to import: it leaves out without a word what it cannot."""
    absent = [name for name in IMPORTED if name not in sys.modules]
    assert not absent, absent
    return 0


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
    found = encode_all(compose("opt"), Drawn(GROUP + N, bad=(2, GROUP + 1)))  # a group for each of two processes
    save_file({"patches": found.patches, "bad": torch.tensor(list(found.bad))}, folder / f"{os.environ.get('RANK', 'alone')}.safetensors")
    return 0


def sharded(jobs: list[dict[str, Any]], then: Callable[[], int] = lambda: 0) -> int:
    """As `several`, with FSDP2: accelerate takes it from the environment on GPUs alone, so on a CPU its state is told."""
    plain = AcceleratorState.__init__

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        if options.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, options["fsdp_plugin"]

    AcceleratorState.__init__ = note
    return several(jobs) or then()


def refused(folder: Path) -> int:
    """6 where the run says that its quantised weights cannot be split."""
    try:
        run(folder, patches=table(), quantise="nf4")
    except ConfigError as error:
        print(f"adalink: {error}")
        return 6
    return 0


def generated(folder: Path) -> int:
    """Train, with a text generated by one process alone on the way; then save the adapter, its text and what is left of FSDP2."""
    made = model()
    asked = [Image.new("RGB", (40, 40), "red")]

    def measure() -> dict[str, float]:
        if PartialState().process_index == 0:
            stated.append(made.generate(asked, ["is it red ?"], settings=GenerationSettings(max_new_tokens=4))[0])
        return {}

    stated: list[str] = []
    names = [type(module).__name__ for module in made.modules()]
    try:
        train(made, Drawn(N), ragged, TrainSettings(**{**SETTINGS, "steps": 4, "measure_every": 2}), folder, patches=table(), measure=measure)
    except ConfigError as error:
        print(error)
        return 6
    assert [type(module).__name__ for module in made.modules()] == names
    assert made.language.model.lm_head.weight is made.language.model.get_input_embeddings().weight
    stated.append(made.generate(asked, ["is it red ?"], settings=GenerationSettings(max_new_tokens=4))[0])
    if PartialState().process_index == 0:
        made.save_pretrained(folder / "adapter", task={"task": "vqa"})
        (folder / "said.json").write_text(json.dumps(stated))
        frozen = {name: value.contiguous().clone() for name, value in made.state_dict().items() if "adapters" not in name}
        save_file(frozen, folder / "frozen.safetensors")
    return 0


def generated_sharded(folder: Path) -> int:
    """The same with FSDP2."""
    return sharded([], then=lambda: generated(folder))
