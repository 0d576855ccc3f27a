"""The training loop: frozen parts, an adapter's weights in the optimizer, one pass over a stream that can be resumed exactly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from adalink.errors import CheckpointError, ConfigError, DataError, TerminatedError
from multimodal.bad_samples import BadSample, BadSamples
from multimodal.batch import Batch
from multimodal.batches import new_batches
from multimodal.feature_cache.fill import FillingLoader
from multimodal.feature_cache.writer import FeatureWriter
from multimodal.kept import Kept
from multimodal.learner import learner
from multimodal.learnt import Learnt
from multimodal.loader import Loaded, Texts, TrainLoader
from multimodal.model import VisionLanguageModel
from multimodal.parameter_groups import new_optimizer
from multimodal.patch_table import encode_all
from multimodal.processes import agree, opened_accelerator, step_seed
from multimodal.progress import StepProgress
from multimodal.run_log import RunLog
from multimodal.sample import SampleSource
from multimodal.sharding import take_off, together
from multimodal.stop_signal import StopSignal, sigterm_noted
from multimodal.trackers import Shown, track
from multimodal.train_settings import TrainSettings
from multimodal.train_state import latest_checkpoint, load_state, state_tensors, write_state
from multimodal.trained import TrainedParts
from multimodal.workers import dead_workers_told

__all__ = ["Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """What a run did: its steps, the seconds that they took (loading and encoding apart), and what it skipped.

    skipped   steps without anything to learn, which every sample of was bad: no optimizer step was taken
    """

    steps: int
    seconds: float
    bad: BadSamples
    skipped: int = 0


def train(
    model: VisionLanguageModel,
    source: SampleSource,
    texts: Texts,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = False,
    patches: Kept | FeatureWriter | None = None,
    known_bad: Sequence[BadSample] = (),
    measure: Callable[[], Mapping[str, float]] | None = None,
    samples: Callable[[], Sequence[Shown]] | None = None,
    also_trained: Mapping[str, nn.Parameter] | None = None,
) -> Trained:
    """Train the model's active adapter; checkpoints and metrics.jsonl go to `folder`.

    resume         go on from the newest checkpoint in `folder`: the same weights, bit for bit, as if the run had never stopped; with
                   another number of processes, at the very next picture
    patches        features that are kept already, or the folder that the first epoch fills with them; encoded here where settings.features is
                   `memory` and none are given
    known_bad      samples that the source left out already; they count towards the budget
    measure        figures for metrics.jsonl, asked for every `settings.measure_every` steps
    samples        pictures with what was said about them, for the trackers; asked for after each measurement, where there are trackers
    also_trained   further parameters by name, for baselines that fine-tune a frozen part

    Raises TerminatedError, with a checkpoint written, where SIGTERM asked to end; DataError where a worker process died, or where there was
    nothing to learn: no sample of the data, or of one set of a mixture, can be used.
    """
    if not len(source):
        raise DataError("the training data holds no sample: give data with one or more")
    with opened_accelerator(settings, model, folder) as accelerator, sigterm_noted() as stop, dead_workers_told():
        torch.manual_seed(settings.seed)
        model.to(accelerator.device).train()  # one that was loaded is in eval mode
        if patches is None and settings.features == "fill":
            raise ConfigError("train.features is fill, and no folder is given to fill: give patches, a FeatureWriter")
        if patches is None and settings.features == "memory":
            patches = encode_all(model, source, workers=settings.workers, label="encoding each picture once")
        if patches is not None and not isinstance(patches, FeatureWriter):
            _refuse_all_bad(patches, known_bad, settings)
        loader = _loader(accelerator, model, source, texts, settings, patches)
        run = _Run(accelerator, model, settings, folder, dict(also_trained or {}), loader, stop, Learnt(source))
        first, n_steps = run.restore(len(source)) if resume else (0, settings.n_steps(len(source), accelerator.num_processes))
        run.log.skip(known_bad)
        if settings.checkpointing:
            model.adapted.attachment.checkpoint_layers()
        loader.steps = (n_steps - first) * settings.accumulation
        started = time.perf_counter()
        with learner(model, settings, len(source)), contextlib.closing(StepProgress(first=first, last=n_steps, is_shown=accelerator.is_main_process)) as shown:
            if model.head is None:
                accelerator.print(model.language_loss.told)  # here, where it is known what is hooked, checkpointed and compiled
            for step, group in enumerate(_groups(iter(loader), settings.accumulation), start=first):
                loss = run.step(group, step, n_steps)
                shown.step()
                # Before the checkpoint: a run that is killed between the two measures again.
                if measure is not None and settings.measure_every and (step + 1) % settings.measure_every == 0:
                    with together(model):
                        run.measured(step + 1, measure(), samples)
                run.after(step + 1, n_steps, loss, shown)
        take_off(model)
        if skipped := run.learnt.skipped:
            accelerator.print(f"{skipped} of {n_steps} steps had nothing to learn, and were skipped")
        return Trained(n_steps, time.perf_counter() - started, run.log.bad, skipped)


def _loader(
    accelerator: Accelerator, model: VisionLanguageModel, source: SampleSource, texts: Texts, settings: TrainSettings, patches: Kept | FeatureWriter | None
) -> TrainLoader | FillingLoader:
    """This process's part of the batches; says how texts share rows."""
    batches = new_batches(
        model, source, texts, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers,
        features=None if isinstance(patches, FeatureWriter) else patches, row_tokens=settings.row_tokens, bucket_pool=settings.bucket_pool,
        rank=accelerator.process_index, world=accelerator.num_processes, weights="split" if accelerator.is_fsdp2 else "whole",
    )  # fmt: skip
    accelerator.print(batches.told if model.head is not None else f"{batches.told}; {model.language_loss.head.told}")
    if isinstance(patches, FeatureWriter):
        return FillingLoader(batches.loader, patches, model.tower, source, workers=settings.workers)
    return batches.loader


def _refuse_all_bad(patches: Kept, known_bad: Sequence[BadSample], settings: TrainSettings) -> None:
    """Raise, before the first step, BudgetError for more bad images than the budget, and DataError where no image is left."""
    bad = BadSamples(budget=settings.bad_samples, found=[*known_bad, *patches.bad.values()])
    bad.check()
    if not patches.usable():
        raise DataError(f"none of the {len(patches)} images can be used, so there is nothing to learn: {bad.summary()}; mend the data")


class _Run:
    """One run's moving parts: the wrapped model, the optimizer, the log."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: VisionLanguageModel,
        settings: TrainSettings,
        folder: Path,
        also_trained: dict[str, nn.Parameter],
        loader: TrainLoader | FillingLoader,
        stop: StopSignal,
        learnt: Learnt,
    ) -> None:
        if also_trained and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 trains adapters alone, and also_trained names other weights: train those with DDP")
        if model.tower.adapter is not None and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 trains the language model's adapter alone, and this model's encoder has one too: train it with DDP")
        if model.head is not None and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 trains the language model's adapter alone, and this model has an answer head too: train it with DDP")
        if isinstance(loader, FillingLoader) and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 splits the encoder over processes, so its features cannot be filled in while training: run `adalink features` first")
        self.accelerator, self.settings, self.folder, self.loader, self.stop = accelerator, settings, folder, loader, stop
        self.learnt, self.is_stopping = learnt, False
        self.is_due = False  # a line of the log: of a step that learns nothing it waits for the next
        self.first = self.read = 0  # the run's first step, and the samples that all processes had read before it
        # The first step whose loss was not finite, negative where it was infinite; asked for seldom, since asking waits for the device.
        self.broken = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.parameters = {**TrainedParts.of(model).parameters(), **also_trained}
        optimizer = new_optimizer(self.parameters, settings)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # FSDP2 puts parameters of its own in their places.
        self.parameters |= dict(model.adapted.active_adapter().named_parameters())
        self.log = RunLog(folder, budget=settings.bad_samples, is_main=accelerator.is_main_process)
        if settings.trackers:
            accelerator.init_trackers("adalink")

    def step(self, group: list[Loaded], step: int, n_steps: int) -> torch.Tensor | None:
        """One optimizer step over a group of micro-batches; the mean loss per target comes back, over all ranks. None where there is no target."""
        agreed = agree(self.accelerator, group, self.stop.is_set, self.learnt.ends)
        self.is_stopping = agreed.stop
        self.log.skip(agreed.bad)
        rate = self.rate(step, n_steps)
        self.learnt.add(agreed)
        self.learnt.check(self.log.bad)
        if not agreed.n_targets:
            return None
        torch.manual_seed(step_seed(self.settings.seed, step, self.accelerator.process_index))
        for peak, parameters in zip(self.peaks, self.optimizer.param_groups, strict=True):
            parameters["lr"] = peak * rate
        world = self.accelerator.num_processes
        losses = []
        for i, loaded in enumerate(group):
            with self.accelerator.no_sync(self.model) if i < len(group) - 1 else contextlib.nullcontext():
                # DDP averages gradients over ranks, so each rank divides by its share of the targets.
                part = self._loss(loaded.batch, agreed.n_targets / world)
                self.accelerator.backward(part)
            losses.append(part.detach() / world)
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.accelerator.reduce(torch.stack(losses).sum(), "sum")
        self.broken += ((self.broken == 0) & ~loss.isfinite()) * torch.where(loss.isinf(), -1, 1) * (step + 1)
        return loss

    def rate(self, step: int, n_steps: int) -> float:
        """The share of the peak rate at a step: a function of the samples that were read, so that it goes on where it was with any number of processes.

        Where the run is given in steps, of those. Steps without anything to learn do not move it.
        """
        size = self._stream()["pictures in a step"]
        if self.settings.steps:
            return self.settings.rate(step - self.learnt.skipped, n_steps - self.learnt.skipped)
        done = (self.read - self.learnt.skipped_samples) / size + step - self.first
        return self.settings.rate(done, done + n_steps - step)

    def measured(self, step: int, figures: Mapping[str, float], samples: Callable[[], Sequence[Shown]] | None) -> None:
        """Log figures of the validation pictures, and show some of them to the trackers."""
        self.log.write({"step": step, **figures})
        if self.settings.trackers:
            track(self.accelerator, step, figures, samples() if samples is not None else ())

    def after(self, step: int, n_steps: int, loss: torch.Tensor | None, shown: StepProgress) -> None:
        """Log, and write a checkpoint, where it is due.

        Raises TerminatedError where a process was asked to end, ConfigError where a loss was not finite, DataError where nothing was learnt.
        """
        if step == n_steps:
            self.learnt.check(self.log.bad, is_end=True)
        self.is_due |= step % self.settings.log_every == 0 or step in (1, n_steps)
        if loss is not None and self.is_due:
            self.is_due = False
            self._refuse_broken()
            value = float(loss)
            rate = self.optimizer.param_groups[0]["lr"]
            shown.logged(step, value, rate)
            self.log.write({"step": step, "loss": value, "rate": rate})
            self.accelerator.log({"loss": value, "rate": rate}, step=step)
        if (step % self.settings.checkpoint_every == 0 and not self.learnt.is_nothing) or step == n_steps or self.is_stopping:
            self._refuse_broken()
            self._save(step)
        if self.is_stopping and step < n_steps:
            raise TerminatedError(f"ended by SIGTERM after step {step} of {n_steps}, which is saved in {self.folder / 'checkpoints'}: go on with --resume")

    def restore(self, n_samples: int) -> tuple[int, int]:
        """The step that the newest checkpoint was written after (0 where there is none), and the run's last step.

        Another number of processes reads on at the next picture, and takes as many steps as the rest needs. Raises CheckpointError for
        a checkpoint of another run.
        """
        world = self.accelerator.num_processes
        n_steps = self.settings.n_steps(n_samples, world)
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            self.log.rewind(0)
            return 0, n_steps
        content = load_state(checkpoint, self.parameters, self.optimizer.optimizer)
        first, found, own = content["step"], content["stream"], self._stream()
        self.first, self.read = first, content["data"]["position"]
        self.learnt.load_state_dict(content.get("learnt", {}))
        try:
            self.loader.load_state_dict(content["data"])
            if found["processes"] != world:
                n_steps = self.settings.n_steps_from(first, content["data"]["position"], n_samples, world)
            elif found != own:
                name = "pictures in a step"
                raise CheckpointError(f"{name} was {found[name]} and is {own[name]}")
            if first > n_steps:
                raise CheckpointError(f"it was written after step {first}, and this config ends at {n_steps}")
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint} cannot be continued exactly: {error}; resume with the config and the data of its run") from None
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.log.rewind(first)
        return first, n_steps

    def _loss(self, batch: Batch | None, n_targets: float) -> torch.Tensor:
        if batch is None:  # every sample of it was bad: nothing to learn, but the other ranks wait for this one's gradients
            return self.model(self.loader.blank().to(self.accelerator.device)) * 0.0  # type: ignore[no-any-return]
        return self.model(replace(batch.to(self.accelerator.device), n_targets=n_targets))  # type: ignore[no-any-return]

    def _refuse_broken(self) -> None:
        if at := int(self.broken):
            what = "infinite" if at < 0 else "not a number"
            raise ConfigError(f"the loss is {what} at step {abs(at)}: lower train.learning_rate, or set train.clip; checkpoints from before it stay")

    def _save(self, step: int) -> None:
        tensors = state_tensors(self.parameters, self.optimizer.optimizer)
        if broken := [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
            raise ConfigError(
                f"after step {step} {len(broken)} of {len(tensors)} tensors hold values that are not finite, such as {broken[0]}: no checkpoint is written, "
                "and those from before stay; lower train.learning_rate, or set train.clip"
            )
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            extra: dict[str, Any] = {"stream": self._stream(), "data": self.loader.state_dict(), "learnt": self.learnt.state_dict(), "scaler": scaler}
            write_state(self.folder / "checkpoints", step, tensors, extra, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _stream(self) -> dict[str, int]:
        """What a step reads."""
        world = self.accelerator.num_processes
        return {"pictures in a step": self.settings.batch_size * self.settings.accumulation * world, "processes": world}


def _groups(loader: Iterator[Loaded], size: int) -> Iterator[list[Loaded]]:
    while group := [loaded for _, loaded in zip(range(size), loader, strict=False)]:
        yield group
