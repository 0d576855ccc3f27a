"""The training loop: frozen parts, an adapter's weights in the optimizer, one pass over a stream that can be resumed exactly."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from adalink.errors import CheckpointError, ConfigError
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.batch import Batch
from multimodal.loader import Loaded, Texts, train_loader
from multimodal.model import VisionLanguageModel
from multimodal.packing import arrangement
from multimodal.parameter_groups import parameter_groups
from multimodal.patch_table import PatchTable, encode_all
from multimodal.progress import StepProgress
from multimodal.run_log import RunLog
from multimodal.sample import SampleSource
from multimodal.train_settings import TrainSettings
from multimodal.train_state import latest_checkpoint, load_state, save_state

__all__ = ["Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """What a run did: its steps, the seconds that its steps took (loading and encoding apart), and what it skipped."""

    steps: int
    seconds: float
    bad: BadSamples


def train(
    model: VisionLanguageModel,
    source: SampleSource,
    texts: Texts,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = False,
    patches: PatchTable | None = None,
    known_bad: Sequence[BadSample] = (),
    measure: Callable[[], Mapping[str, float]] | None = None,
    also_trained: Mapping[str, nn.Parameter] | None = None,
) -> Trained:
    """Train the model's active adapter; checkpoints and metrics.jsonl go to `folder`.

    resume         go on from the newest checkpoint in `folder`: the same weights, bit for bit, as if the run had never stopped
    patches        features that are kept already; encoded here where settings.features is `memory` and none are given
    known_bad      samples that the source left out already; they count towards the budget
    measure        figures for metrics.jsonl, asked for every `settings.measure_every` steps
    also_trained   further parameters by name, for baselines that fine-tune a frozen part
    """
    _check_trackers(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with _accelerator(settings, model, folder) as accelerator:
        torch.manual_seed(settings.seed)
        model.to(accelerator.device)
        if patches is None and settings.features == "memory":
            patches = encode_all(model, source, workers=settings.workers, label="encoding each picture once")
        n_steps = settings.n_steps(len(source), accelerator.num_processes)
        run = _Run(accelerator, model, settings, folder, dict(also_trained or {}), len(source))
        first = run.restore(n_steps) if resume else 0
        run.log.skip(known_bad)
        arrange, told = arrangement(model.language.model)
        accelerator.print(told)
        loader = train_loader(
            source, texts, model.row_encoder(), arrange, model.tower.preprocess, steps=range(first * settings.accumulation, n_steps * settings.accumulation),
            batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers, rank=accelerator.process_index, world=accelerator.num_processes,
            patches=patches,
        )  # fmt: skip
        if settings.checkpointing:
            model.adapted.attachment.checkpoint_layers()
        started = time.perf_counter()
        with contextlib.closing(StepProgress(first=first, last=n_steps, is_shown=accelerator.is_main_process)) as shown:
            for step, group in enumerate(_groups(iter(loader), settings.accumulation), start=first):
                loss = run.step(group, settings.rate(step, n_steps))
                shown.step()
                # Before the checkpoint: a run that is killed between the two measures again.
                if measure is not None and settings.measure_every and (step + 1) % settings.measure_every == 0:
                    run.log.write({"step": step + 1, **measure()})
                run.after(step + 1, n_steps, loss, shown)
        return Trained(n_steps, time.perf_counter() - started, run.log.bad)


@contextlib.contextmanager
def _accelerator(settings: TrainSettings, model: nn.Module, folder: Path) -> Iterator[Accelerator]:
    """An accelerator that leaves nothing behind: accelerate keeps one precision for a whole process, and wraps the model's forward in it."""
    is_first = not AcceleratorState._shared_state
    accelerator = Accelerator(mixed_precision=settings.precision, log_with=list(settings.trackers) or None, project_dir=str(folder))
    try:
        yield accelerator
        accelerator.end_training()
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(model).pop("forward", None)  # the class's own again, not a copy of it on the instance
        if is_first:
            AcceleratorState._reset_state()


def _check_trackers(settings: TrainSettings) -> None:
    """Accelerate leaves out a tracker that is not installed, and says nothing."""
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"train.trackers names {', '.join(missing)}, and no such package is here: pip install 'adalink[trackers]', or leave it out")


class _Run:
    """One run's moving parts: the wrapped model, the optimizer, the log."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: VisionLanguageModel,
        settings: TrainSettings,
        folder: Path,
        also_trained: dict[str, nn.Parameter],
        n_samples: int,
    ) -> None:
        # What decides which pictures a step reads; a resumed run must agree with it.
        n_read = settings.batch_size * settings.accumulation * accelerator.num_processes
        self.stream = {"train.seed": settings.seed, "pictures in a step": n_read, "pictures in the data set": n_samples}
        self.accelerator, self.settings, self.folder = accelerator, settings, folder
        self.parameters = {**dict(model.adapted.active_adapter().named_parameters()), **also_trained}
        groups = parameter_groups(self.parameters, settings)
        self.peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.log = RunLog(folder, budget=settings.bad_samples, is_main=accelerator.is_main_process)
        if settings.trackers:
            accelerator.init_trackers("adalink")

    def step(self, group: list[Loaded], rate: float) -> torch.Tensor:
        """One optimizer step over a group of micro-batches; the mean loss per target comes back, over all ranks."""
        for loaded in group:
            self.log.skip(loaded.bad)
        for peak, parameters in zip(self.peaks, self.optimizer.param_groups, strict=True):
            parameters["lr"] = peak * rate
        world = self.accelerator.num_processes
        own = torch.tensor(float(sum(loaded.batch.n_targets for loaded in group if loaded.batch)), device=self.accelerator.device)
        n_targets = max(float(self.accelerator.reduce(own, "sum")), 1.0)
        total = torch.zeros((), device=self.accelerator.device)
        for i, loaded in enumerate(group):
            with self.accelerator.no_sync(self.model) if i < len(group) - 1 else contextlib.nullcontext():
                # DDP averages gradients over ranks, so each rank divides by its share of the targets.
                loss = self._loss(loaded.batch, n_targets / world)
                self.accelerator.backward(loss)
            total += loss.detach() / world
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(total, "sum")  # type: ignore[no-any-return]

    def after(self, step: int, n_steps: int, loss: torch.Tensor, shown: StepProgress) -> None:
        """Log, and write a checkpoint, where it is due."""
        due = step % self.settings.log_every == 0 or step == n_steps
        if due or step == 1:
            value = float(loss)
            if value != value:
                raise ConfigError(f"the loss is not a number at step {step}: lower train.learning_rate, or set train.clip")
            rate = self.optimizer.param_groups[0]["lr"]
            shown.logged(step, value, rate)
            self.log.write({"step": step, "loss": value, "rate": rate})
            self.accelerator.log({"loss": value, "rate": rate}, step=step)
        if step % self.settings.checkpoint_every == 0 or step == n_steps:
            if self.accelerator.is_main_process:
                save_state(self.folder / "checkpoints", step, self.parameters, self.optimizer.optimizer, self._extra(), self.settings.keep)
            self.accelerator.wait_for_everyone()

    def restore(self, n_steps: int) -> int:
        """The step that the newest checkpoint was written after; 0 where there is none. Raises CheckpointError for one of another run."""
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            self.log.rewind(0)
            return 0
        content = load_state(checkpoint, self.parameters, self.optimizer.optimizer)
        changed = [f"{name} was {content['stream'][name]} and is {value}" for name, value in self.stream.items() if content["stream"][name] != value]
        if changed or content["step"] > n_steps:
            found = ", ".join(changed) or f"it was written after step {content['step']}, and this config ends at {n_steps}"
            raise CheckpointError(f"{checkpoint} cannot be continued exactly: {found}; resume with the config and the data of its run")
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.log.rewind(content["step"])
        return int(content["step"])

    def _loss(self, batch: Batch | None, n_targets: float) -> torch.Tensor:
        if batch is None:  # every sample of it was bad: nothing to learn, but DDP waits for each rank's gradients
            return sum((parameter.sum() * 0 for parameter in self.parameters.values()), torch.zeros((), device=self.accelerator.device))
        return self.model(replace(batch.to(self.accelerator.device), n_targets=n_targets))  # type: ignore[no-any-return]

    def _extra(self) -> dict[str, Any]:
        return {"stream": self.stream, "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None}


def _groups(loader: Iterator[Loaded], size: int) -> Iterator[list[Loaded]]:
    while group := [loaded for _, loaded in zip(range(size), loader, strict=False)]:
        yield group
