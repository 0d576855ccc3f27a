"""The training loop: frozen parts, an adapter's weights in the optimizer, one pass over a stream that can be resumed exactly."""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from adalink.checkpoint.precision import quantised_names
from adalink.errors import CheckpointError, ConfigError, DataError, TerminatedError
from multimodal.batches.collate import Batch
from multimodal.data.feature_cache.encode import FillingLoader, encode_all
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.data.inputs import CachedFeatures
from multimodal.data.loader import Loaded, Texts, TrainLoader, new_batches
from multimodal.data.order import Mixture, shard_sizes_of, windows_of
from multimodal.data.workers import dead_workers_named
from multimodal.loading import is_spread, on_device
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.progress import StepProgress
from multimodal.sample import BadSample, BadSamples, SampleSource, counted
from multimodal.training.distributed import (
    StopSignal,
    agree,
    check_trackers,
    deterministic,
    host_group,
    interrupts_noted,
    n_nodes,
    opened_accelerator,
    rewrapped,
    seed_all,
    sigterm_noted,
    step_seed,
    take_off,
    together,
)
from multimodal.training.prepare import Pull, Schedules, mean_loss, new_optimizer, offloaded, parameter_groups, training_form
from multimodal.training.records import LoggedSamples, RunLog, TrainedSoFar, changed_settings, refuse_another_model, run_facts, track
from multimodal.training.settings import TrainSettings
from multimodal.training.stages import Stages
from multimodal.training.state import BEST, SCHEDULE, Best, latest_checkpoint, load_state, read_state, state_tensors, write_state

__all__ = ["Trained", "check_training", "train"]

TIMED = slice(5, 25)  # of a process's steps, those whose mean is what a step takes: the first ones warm up
_STEP_SIZE = "pictures in a step"  # the key that checkpoints have
_NOT_SCALED = (
    "the language model is in float16 and train.precision is no, so the loss is not scaled and small gradients become 0: "
    "give base.language_model.dtype: bfloat16, or on a GPU train.precision: fp16"
)


@dataclass(frozen=True)
class Trained:
    """What a run did: its steps, the seconds that they took (loading and encoding apart), and what it skipped.

    skipped   steps without anything to learn, which every sample of was bad: no optimizer step was taken
    best      with train.keep_best, the step that the weights are of, and the metric that was best there; None: the weights are the last
    step_seconds  the mean of steps 6 to 25 of this process, or of as many of them as there were; None: there were at most 5
    """

    steps: int
    seconds: float
    bad: BadSamples
    skipped: int = 0
    best: tuple[int, str, float] | None = None
    step_seconds: float | None = None


def train(
    model: VisionLanguageModel,
    source: SampleSource,
    texts: Texts,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = False,
    patches: CachedFeatures | FeatureWriter | None = None,
    known_bad: Sequence[BadSample] = (),
    measure: Callable[[], Mapping[str, float]] | None = None,
    judged_by: str | None = None,
    samples: Callable[[], Sequence[LoggedSamples]] | None = None,
    also_trained: Mapping[str, nn.Parameter] | None = None,
) -> Trained:
    """Train the model's active adapter; checkpoints and metrics.jsonl go to `folder`.

    resume         go on from the newest checkpoint in `folder`: the same weights as if the run had never stopped, bit for bit (on a CPU; on
                   CUDA with settings.deterministic); with another number of processes, at the very next image
    patches        features that are cached already, or the folder that the first epoch fills with them; encoded here where settings.features is
                   `memory` and none are given
    known_bad      samples that the source left out already; they count towards the budget
    measure        metrics for the screen and metrics.jsonl, asked for every `settings.measure_every` steps
    judged_by      the one of them, of which more is better, that settings.keep_best and settings.patience go by; the first where none is named
    samples        images with their generated texts, for the trackers; asked for after each measurement, where there are trackers
    also_trained   further parameters by name, for baselines that fine-tune a frozen part

    Raises TerminatedError, with a checkpoint written, where SIGTERM or Ctrl-C asked to end; DataError where a worker process died, or where
    there was nothing to learn: no sample of the data, or of one set of a mixture, can be used; and as `check_training`.
    """
    if not len(source):
        raise DataError("the training data holds no sample: give data with one or more")
    windows_of(source, settings.order, settings.window)  # refuses an order that the data does not have, before any image is read
    one_way = deterministic(settings.deterministic)
    with opened_accelerator(settings, model, folder) as accelerator, sigterm_noted() as stop, dead_workers_named(), one_way:
        seed_all(settings.seed)
        on_device(model, accelerator.device).train()  # one that was loaded is in eval mode
        facts = check_training(model, settings, folder, resume=resume, also_trained=also_trained)
        if patches is None and settings.features == "fill":
            raise ConfigError("train.features is fill, and no folder is given to fill: give patches, a FeatureWriter")
        if measure is None and (settings.keep_best or settings.patience):
            raise ConfigError("train.keep_best and train.patience judge what `measure` gives, and there is none: give measure")
        if patches is None and settings.features == "memory":
            patches = encode_all(model, source, workers=settings.workers, label="encoding each image once")
        if patches is not None and not isinstance(patches, FeatureWriter):
            _refuse_all_bad(patches)
        loader = _loader(accelerator, model, source, texts, settings, patches)
        run = _Run(accelerator, model, settings, folder, dict(also_trained or {}), loader, stop, TrainedSoFar(source), Best(settings, judged_by), facts)
        first, n_steps = run.begin(len(source), resume)
        run.log.skip(known_bad)
        if settings.checkpointing:
            model.adapted.attachment.checkpoint_layers()
        last = max(first, min(n_steps, settings.stop_at or n_steps))
        loader.steps = (last - first) * settings.accumulation
        if shard_sizes_of(source) is not None or isinstance(source, Mixture):
            accelerator.print(loader.order_note)
        started = time.perf_counter()
        with training_form(model, settings, len(source)), interrupts_noted(stop):
            if model.head is None:
                accelerator.print(model.language_loss.attention_note)
                accelerator.print(model.language_loss.note)  # here, where it is known what is hooked, checkpointed and compiled
            if settings.offload != "no":
                accelerator.print("activations wait for the backward pass in the host's pinned memory")
            n_steps = run.learn(first, n_steps, last, measure, samples)
        seconds = time.perf_counter() - started
        take_off(model)
        best = run.best.put_back({**TrainedParts.of(model).parameters(), **(also_trained or {})})
        if skipped := run.trained_so_far.skipped:
            accelerator.print(f"{counted(skipped, 'step')} of {n_steps} had nothing to learn, and {'was' if skipped == 1 else 'were'} skipped")
        return Trained(n_steps, seconds, run.log.bad, skipped, best, mean(timed) if (timed := run.step_times[TIMED]) else None)


def check_training(
    model: VisionLanguageModel, settings: TrainSettings, folder: Path, *, resume: bool = False, also_trained: Mapping[str, nn.Parameter] | None = None
) -> Mapping[str, Any]:
    """Refuse, before any image is read, what a training with these settings would refuse; what the run is a function of (`run_facts`) comes back.

    Warns of a base in float16 whose loss is not scaled.

    Raises ConfigError for learning rates of methods that are not there, trackers that are not installed, and settings that the model does not
    support; CheckpointError where the run to go on with trained another model.
    """
    check_trackers(settings)
    parameters = {**TrainedParts.of(model).parameters(), **(also_trained or {})}
    parameter_groups(parameters, settings)
    if idle := sorted({name.split(".", 1)[0] for name in parameters if not any(stage is None or stage.names(name) for stage in settings.staged)}):
        warnings.warn(f"no stage of train.stages trains {', '.join(idle)}, so it stays as it begins", stacklevel=2)
    if settings.stages and Schedules(model):
        raise ConfigError("train.stages and a method with a schedule of its own were given, and both say what trains when: leave one of them out")
    _pull(model, settings)
    with training_form(model, settings, 0):
        own = run_facts(model, settings)
    if settings.precision == "no" and any(weight.dtype == torch.float16 for weight in model.adapted.base.parameters()):
        warnings.warn(_NOT_SCALED, stacklevel=2)
    checkpoint = latest_checkpoint(folder / "checkpoints") if resume else None
    if checkpoint is not None:
        facts = read_state(checkpoint, parameters)[0].get("facts", {})
        with _continued(checkpoint):
            refuse_another_model(facts, own)
    return own


@contextlib.contextmanager
def _continued(checkpoint: Path) -> Iterator[None]:
    """Inside the block, an error names the checkpoint that is refused."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} cannot be continued exactly: {error}; resume with the config and the data of its run") from None


def _pull(model: VisionLanguageModel, settings: TrainSettings) -> Pull | None:
    """What moves the weights towards those of saved adapters after each step; None where nothing does."""
    return Pull(model, settings.pull_towards, settings.pull) if settings.pull_towards and settings.pull else None


def _loader(
    accelerator: Accelerator,
    model: VisionLanguageModel,
    source: SampleSource,
    texts: Texts,
    settings: TrainSettings,
    patches: CachedFeatures | FeatureWriter | None,
) -> TrainLoader | FillingLoader:
    """This process's part of the batches; says how texts share rows."""
    batches = new_batches(
        model, source, texts, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers,
        features=None if isinstance(patches, FeatureWriter) else patches, row_tokens=settings.row_tokens, bucket_pool=settings.bucket_pool,
        order=settings.order, window=settings.window, nodes=n_nodes(accelerator), rank=accelerator.process_index, world=accelerator.num_processes,
        weights="split" if accelerator.is_fsdp2 else "whole", draw_frames=settings.draw_frames,
    )  # fmt: skip
    accelerator.print(batches.note if model.head is not None else f"{batches.note}; {model.language_loss.head.note}")
    if isinstance(patches, FeatureWriter):
        tower: Any = model.tower  # one that encodes: without an encoder no folder is filled
        return FillingLoader(batches.loader, patches, tower, source, workers=settings.workers)
    return batches.loader


def _refuse_all_bad(patches: CachedFeatures) -> None:
    if not patches.usable():
        bad = BadSamples(budget=0, found=patches.bad.values())
        raise DataError(f"none of the {counted(len(patches), 'image')} can be used, so there is nothing to learn: {bad.summary()}; mend the data")


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
        trained_so_far: TrainedSoFar,
        best: Best,
        facts: Mapping[str, Any],
    ) -> None:
        if also_trained and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 trains adapters alone, and also_trained names other weights: train those with DDP")
        if model.changes_features and accelerator.is_fsdp2:
            trained = "encoder has one too" if model.tower.adapter is not None else "connector is trained too"
            raise ConfigError(f"FSDP2 trains the language model's adapter alone, and this model's {trained}: train it with DDP")
        if model.head is not None and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 trains the language model's adapter alone, and this model has an answer head too: train it with DDP")
        if isinstance(loader, FillingLoader) and accelerator.is_fsdp2:
            raise ConfigError("FSDP2 splits the encoder over processes, so its features cannot be filled in while training: run `adalink features` first")
        if accelerator.is_fsdp2 and (quantised := quantised_names(model)):
            raise ConfigError(f"FSDP2 cannot split quantised weights ({quantised[0]}): train with DDP, or leave `quantise` under `base` out")
        if is_spread(model) and accelerator.num_processes > 1:
            raise ConfigError(
                f"base.device_map spreads the model over all devices, and {accelerator.num_processes} processes were started: start one, or leave it out"
            )
        self.accelerator, self.settings, self.folder, self.loader, self.stop = accelerator, settings, folder, loader, stop
        self.trained_so_far, self.best, self.ended_by = trained_so_far, best, 0
        self.bare, self.facts = model, facts
        self.is_due = False  # a line of the log: of a step that learns nothing it waits for the next
        self.step_times: list[float] = []
        self.first = self.read = 0  # the run's first step, and the samples that all processes had read before it
        # The first step whose loss was not finite, negative where it was infinite; asked for seldom, since asking waits for the device.
        self.broken = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.parameters = {**TrainedParts.of(model).parameters(), **also_trained}
        self.pull = _pull(model, settings)
        optimizer = new_optimizer(self.parameters, settings)
        self.host = host_group(accelerator)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(model, optimizer, device_placement=[not is_spread(model), True])
        self.stages = Stages(settings, self.optimizer.optimizer, drops=accelerator.is_fsdp2)
        # FSDP2 puts parameters of its own in their places.
        self.parameters |= dict(model.adapted.active_adapter().named_parameters())
        self.schedules = Schedules(model)
        self.log = RunLog(folder, budget=settings.bad_samples, is_main=accelerator.is_main_process)
        if settings.trackers:
            accelerator.init_trackers("adalink", init_kwargs={"wandb": {"dir": str(folder)}})  # TensorBoard's files lie in FOLDER/adalink

    def learn(
        self, first: int, n_steps: int, last: int, measure: Callable[[], Mapping[str, float]] | None,
        samples: Callable[[], Sequence[LoggedSamples]] | None,
    ) -> int:  # fmt: skip
        """Take the steps from `first` to `last` of `n_steps`; the last one comes back, which may be earlier where patience ends the run."""
        every, judges = self.settings.measure_every, self.settings.keep_best or self.settings.patience > 0
        progress = StepProgress(first=first, last=n_steps, is_visible=self.accelerator.is_main_process)
        with contextlib.closing(self.stages), contextlib.closing(progress) as displayed:
            for step, group in enumerate(_groups(iter(self.loader), self.settings.accumulation), start=first):
                is_timed = len(self.step_times) < TIMED.stop
                before = self._clock() if is_timed else 0.0
                loss = self.step(group, step, n_steps)
                if is_timed:
                    self.step_times.append(self._clock() - before)
                displayed.step()
                # Before the checkpoint: a run that is killed between the two measures again.
                if measure is not None and every and ((step + 1) % every == 0 or (judges and step + 1 == n_steps)):
                    self._refuse_broken()
                    with together(self.bare):
                        metrics = measure()
                    self.measured(step + 1, metrics, samples, displayed)
                    if self.best.is_over:
                        self.accelerator.print(f"{self.settings.patience} measurements were no better than that of step {self.best.step}: the run ends")
                        last = step + 1
                self.after(step + 1, last, loss, displayed)
                if self.best.is_over:
                    break
        self.schedules.end()
        return last

    def _clock(self) -> float:
        """Seconds, once the device has done what it was asked: that waits, so few steps are timed."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, group: list[Loaded], step: int, n_steps: int) -> torch.Tensor | None:
        """One optimizer step over a group of micro-batches; the mean loss per target comes back, over all ranks. None where there is no target."""
        agreed = agree(self.accelerator, group, self.stop.number, self.trained_so_far.ends, self.host)
        self.ended_by = agreed.stop
        self.log.skip(agreed.bad)
        progress = self.progress(step, n_steps)
        self.trained_so_far.add(agreed)
        self.trained_so_far.check(self.log.bad)
        if not agreed.n_targets:
            return None
        seed_all(step_seed(self.settings.seed, step, self.accelerator.process_index))
        if self.stages.enter(*progress):
            self.model = rewrapped(self.model)
        world = self.accelerator.num_processes
        if self.schedules:
            self.schedules.before_step(step, lambda: self._loss_now(group[0].batch))
        losses = []
        for i, loaded in enumerate(group):
            is_last = i == len(group) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                # DDP averages gradients over ranks, so each rank divides by its share of the targets.
                with offloaded(self.bare) if self.settings.offload != "no" else contextlib.nullcontext():
                    part = self._loss(loaded.batch, agreed.n_targets / world)
                added = self.schedules.loss(step) if is_last else None
                self.accelerator.backward(part if added is None else part + added)
            losses.append(part.detach() / world)
        self.stages.drop()
        if self.schedules:
            self.accelerator.unscale_gradients()
            self.schedules.after_backward(step)
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        scale = self._scale()
        self.optimizer.step()
        if self.pull is not None:
            self.pull()
        if self._scale() >= scale:  # it falls where the step was skipped, since float16's gradients were too large
            self.schedules.after_step(step)
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.accelerator.reduce(torch.stack(losses).sum(), "sum")
        self.broken += ((self.broken == 0) & ~loss.isfinite()) * torch.where(loss.isinf(), -1, 1) * (step + 1)
        return loss

    def _scale(self) -> float:
        """What float16's loss is multiplied by; 0 where no method has a schedule. accelerate does not see that a fused optimizer skips a step."""
        scaler = self.accelerator.scaler
        return 0.0 if scaler is None or not self.schedules else float(scaler.get_scale())

    def progress(self, step: int, n_steps: int) -> tuple[float, float]:
        """How many steps of how many are done, for learning rates and stages: in samples read, so that it goes on where it was with any number of processes.

        Where the run is given in steps, in those. Steps without anything to learn do not move it.
        """
        size = self._stream()[_STEP_SIZE]
        if self.settings.steps:
            return step - self.trained_so_far.skipped, n_steps - self.trained_so_far.skipped
        done = (self.read - self.trained_so_far.skipped_samples) / size + step - self.first
        return done, done + n_steps - step

    def measured(self, step: int, metrics: Mapping[str, float], samples: Callable[[], Sequence[LoggedSamples]] | None, displayed: StepProgress) -> None:
        """Log metrics of the validation images, judge them, and show some images to the trackers."""
        if self.accelerator.num_processes > 1:
            metrics, *_ = broadcast_object_list([dict(metrics)])  # all decide by the same numbers
        judges = self.settings.keep_best or self.settings.patience > 0
        is_best = judges and self.best.judge(step, metrics, self.parameters)
        displayed.measured(step, metrics, is_best)
        self.log.write({"step": step, **metrics})
        if self.settings.trackers:
            track(self.accelerator, step, metrics, samples() if samples is not None else ())

    def after(self, step: int, n_steps: int, loss: torch.Tensor | None, displayed: StepProgress) -> None:
        """Log, and write a checkpoint, where it is due.

        Raises TerminatedError where a process was asked to end, ConfigError where a loss was not finite, DataError where nothing was trained.
        """
        if step == n_steps:
            self.trained_so_far.check(self.log.bad, is_end=True)
        self.is_due |= step % self.settings.log_every == 0 or step in (1, n_steps)
        if loss is not None and self.is_due:
            self.is_due = False
            self._refuse_broken()
            value = float(loss)
            rate = self.stages.rate
            displayed.logged(step, value, rate)
            line = {"loss": value, "rate": rate, **self.schedules.report()}
            self.log.write({"step": step, **line})
            self.accelerator.log(line, step=step)
        if (step % self.settings.checkpoint_every == 0 and not self.trained_so_far.is_nothing) or step == n_steps or self.ended_by:
            self._refuse_broken()
            self._save(step)
        if self.ended_by and step < n_steps:
            by, saved = "Ctrl-C" if self.ended_by == signal.SIGINT else "SIGTERM", self.folder / "checkpoints"
            raise TerminatedError(f"ended by {by} after step {step} of {n_steps}, which is saved in {saved}: go on with --resume", 128 + self.ended_by)

    def begin(self, n_samples: int, resume: bool) -> tuple[int, int]:
        """The steps that were taken and the run's last one; the methods' schedules go on from there. Raises ConfigError, and as `restore`."""
        first, n_steps = self.restore(n_samples) if resume else (0, self.settings.n_steps(n_samples, self.accelerator.num_processes))
        self.schedules.begin(n_steps, self.settings.seed)
        if first and self.schedules and (checkpoint := latest_checkpoint(self.folder / "checkpoints")) is not None:
            with _continued(checkpoint):
                self.schedules.load_state(read_state(checkpoint, self.parameters, SCHEDULE)[1])
        return first, n_steps

    def restore(self, n_samples: int) -> tuple[int, int]:
        """The step that the newest checkpoint was written after (0 where there is none), and the run's last step.

        Another number of processes reads on at the next image, and takes as many steps as the rest needs. Raises CheckpointError for
        a checkpoint of another run.
        """
        world = self.accelerator.num_processes
        n_steps = self.settings.n_steps(n_samples, world)
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            self.log.rewind(0)
            self.accelerator.print(f"there is no checkpoint in {self.folder / 'checkpoints'}: the run begins anew")
            return 0, n_steps
        content = load_state(checkpoint, self.parameters, self.optimizer.optimizer)
        first, found, own = content["step"], content["stream"], self._stream()
        self.first, self.read = first, content["data"]["position"]
        self.trained_so_far.load_state_dict(content.get("learnt", {}))
        self.best.load_state_dict(content.get("best", {}), read_state(checkpoint, self.parameters)[1])
        with _continued(checkpoint):
            self.loader.load_state_dict(content["data"])
            if found["processes"] != world:
                n_steps = self.settings.n_steps_from(first, content["data"]["position"], n_samples, world)
            elif found != own:
                raise CheckpointError(f"images in a step was {found[_STEP_SIZE]} and is {own[_STEP_SIZE]}")
            if first > n_steps:
                raise CheckpointError(f"it was written after step {first}, and this config ends at {n_steps}")
            self.stages.load_state_dict(content.get("stage", {}), *self.progress(first, n_steps))
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.log.rewind(first)
        self._log_resumed(checkpoint, first, n_steps, content.get("facts"))
        return first, first if self.best.is_over else n_steps

    def _log_resumed(self, checkpoint: Path, first: int, n_steps: int, facts: Mapping[str, Any] | None) -> None:
        self.accelerator.print(f"resumed after step {first} of {n_steps}, from {checkpoint}")
        if facts is None:
            self.accelerator.print("an earlier version wrote that checkpoint, so its settings cannot be compared with these")
        elif changed := changed_settings(facts, self.facts):
            self.accelerator.print(f"settings that are not those of the checkpoint: {'; '.join(changed)}")

    def _loss(self, batch: Batch | None, n_targets: float) -> torch.Tensor:
        if batch is None:  # every sample of it was bad: nothing to learn, but the other ranks wait for this one's gradients
            return self.model(self.loader.blank().to(self.accelerator.device)) * 0.0  # type: ignore[no-any-return]
        return self.model(replace(batch.to(self.accelerator.device), n_targets=n_targets))  # type: ignore[no-any-return]

    def _loss_now(self, batch: Batch | None) -> float:
        """The mean loss per target of a batch over all processes, without dropout; 0 where it has no target."""
        return mean_loss(self.bare, () if batch is None else (batch.to(self.accelerator.device),)) or 0.0

    def _refuse_broken(self) -> None:
        if at := int(self.broken):
            what = "infinite" if at < 0 else "not a number"
            raise ConfigError(f"the loss is {what} at step {abs(at)}: lower train.learning_rate, or set train.clip; checkpoints from before it stay")

    def _save(self, step: int) -> None:
        tensors = state_tensors(self.parameters, self.optimizer.optimizer)
        tensors |= {f"{BEST}{name}": weight for name, weight in self.best.tensors().items()}
        tensors |= {f"{SCHEDULE}{name}": value for name, value in self.schedules.state().items()}
        if broken := [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
            raise ConfigError(
                f"after step {step} {len(broken)} of {len(tensors)} tensors hold values that are not finite, such as {broken[0]}: no checkpoint is written, "
                "and those from before stay; lower train.learning_rate, or set train.clip"
            )
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            states = {"data": self.loader.state_dict(), "learnt": self.trained_so_far.state_dict(), "best": self.best.state_dict()}
            extra: dict[str, Any] = {"stream": self._stream(), "stage": self.stages.state_dict(), **states, "facts": self.facts, "scaler": scaler}
            write_state(self.folder / "checkpoints", step, tensors, extra, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _stream(self) -> dict[str, int]:
        """What a step reads."""
        world = self.accelerator.num_processes
        return {_STEP_SIZE: self.settings.batch_size * self.settings.accumulation * world, "processes": world}


def _groups(loader: Iterator[Loaded], size: int) -> Iterator[list[Loaded]]:
    while group := [loaded for _, loaded in zip(range(size), loader, strict=False)]:
        yield group
