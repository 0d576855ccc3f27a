"""How a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adalink.errors import ConfigError, check_tuples

__all__ = ["Compile", "Stage", "Teachers", "TrainSettings"]

Compile = Literal["no", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]  # torch.compile's own modes, or none
MAX_SEED = 2**40  # an epoch's seed is a million times this, and a generator takes 63 bits


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Two saved adapters that the trained one follows, so that it breaks less of what worked (MUSCLE); none: it learns the texts."""

    old: Path | None = None  # the adapter folder of the version that people use
    new: Path | None = None  # the adapter folder of its successor, whose weights the training starts from
    mask: Literal["new", "student"] = "new"  # whose greedy word, where it is not the text's, calls for the old one
    kl: Literal["teacher_student", "student_teacher"] = "teacher_student"  # KL(teacher || student), or the other way round
    labels: float = 0.0  # weight of the ordinary loss beside

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if (self.old is None) != (self.new is None):
            given, missing = ("old", "new") if self.new is None else ("new", "old")
            raise ConfigError(f"train.teachers.{given} is given and train.teachers.{missing} is not: give both adapter folders, or neither")
        if not 0 <= self.labels < math.inf:
            raise ConfigError(f"train.teachers.labels is {self.labels}: give a weight of 0 or more")

    @property
    def folders(self) -> tuple[Path, Path] | None:
        """Those of old and new; None where there are no teachers."""
        return None if self.old is None or self.new is None else (self.old, self.new)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the steps in which some methods train and the others stand still (PT-PEFT, arXiv 2411.00029)."""

    trains: tuple[str, ...]  # methods or parts of them, named as in train.learning_rates: bridge, prefix, connector, vision, head
    steps: int | None = None  # how many; the last stage may leave it out, and takes the rest
    share: float | None = None  # in place of steps, a share of the run's
    learning_rate: float | None = None  # highest learning rate in this stage, in place of train.learning_rate
    optimizer: Literal["keep", "new"] = "keep"  # whether what trained in the stage before goes on with its optimizer's state and its schedule

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "a stage's")
        if not self.trains:
            raise ConfigError("a stage of train.stages trains nothing: give under `trains` the names of one or more methods, such as [prefix]")
        if self.steps is not None and self.share is not None:
            raise ConfigError(f"a stage of train.stages has steps: {self.steps} and share: {self.share}, which both say how long it is: give one of them")
        if (self.steps or 0) < 0 or not 0 <= (self.share or 0.0) <= 1:
            raise ConfigError(f"a stage of train.stages has steps: {self.steps} and share: {self.share}: give 0 steps or more, or a share from 0 to 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"a stage of train.stages has learning_rate: {self.learning_rate}: give a positive rate")

    def names(self, parameter: str) -> bool:
        """Whether a parameter is of what trains here."""
        return any(f"{parameter}.".startswith(f"{name}.") for name in self.trains)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a run trains."""

    epochs: float = 1.0  # passes over the training images
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 16  # images in each process and micro-batch
    accumulation: int = 1  # micro-batches in one optimizer step
    stop_at: int = 0  # end after this step, in a checkpoint that --resume goes on from as if it had never ended; 0: at the last step
    order: Literal["auto", "global", "shards"] = "auto"  # shuffle all samples, or read shards in a row; auto: shards for URLs whose cache holds a window
    window: int = 16  # with order: shards, the number of shards whose samples are shuffled together, for each machine
    bucket_pool: int = 0  # batches within which images with texts of similar length are grouped, for less padding; 0: off
    row_tokens: int = 0  # most tokens of a row that several images share, for less padding; on a CPU two or three images a row are fastest; 0: off
    learning_rate: float = 1e-3  # highest learning rate; AdamW with linear warmup and cosine
    learning_rates: dict[str, float] = field(default_factory=dict)  # learning rates of single methods or parts, such as {lora: 1e-4, dept.soft: 0.3}
    weight_decay: float = 0.01  # of weight matrices; biases and norms have none
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    warmup: float = 0.03  # share of the steps in which the learning rate rises from 0
    final_rate: float = 0.0  # learning rate at the end, as a share of the highest
    clip: float = 1.0  # largest norm of the gradient; 0: no limit
    precision: Literal["no", "bf16", "fp16"] = "no"  # autocast of the forward pass
    features: Literal["encode", "memory", "fill"] = "encode"  # in every epoch (encode), once to memory, or once to disk (fill)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: Compile = "no"  # torch.compile of the language model: minutes at the start, then faster steps, above all on a GPU
    offload: Literal["no", "activations"] = "no"  # what the backward pass needs waits in the host's memory: less memory of a GPU, more time
    states_gib: float = 0.0  # GiB in each process to cache what enters the lowest layer that the adapter edits (eP-ALM); 0: off
    deterministic: bool = False  # on a GPU: the same bits in each run, by slower operations; a CPU's are the same anyway
    seed: int = 0  # random seed of weights, data order and drawn answers
    workers: int = 0  # worker processes that decode images
    draw_frames: bool = False  # of a video in each epoch other frames, one of each interval; by default the middle ones, which features can be cached of
    checkpoint_every: int = 500  # optimizer steps between two checkpoints; one is also written at the end
    keep: int = 2  # number of checkpoints to keep
    log_every: int = 20  # optimizer steps between two lines of the log
    measure_every: int = 0  # optimizer steps between two measurements on the validation images; 0: none
    keep_best: bool = False  # end with the weights of the best measurement, by the task's metric; needs measure_every
    patience: int = 0  # stop after this many measurements without a better one; needs measure_every; 0: never
    bad_samples: int = 10  # samples that may be skipped before the run stops
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # also log to these
    teachers: Teachers = field(default_factory=Teachers)  # two saved adapters to follow in the place of the texts
    frozen: dict[str, Path] = field(default_factory=dict)  # methods that are not trained, each with the adapter folder that has its weights
    pull_towards: tuple[Path, ...] = ()  # saved adapters of the same methods: after each step the weights move towards their mean (MOS)
    pull: float = 0.1  # the share of that way
    full: bool = False  # also train every weight of the language model, and write it beside the adapter: what adapters are measured against
    stages: tuple[Stage, ...] = ()  # what trains in which part of the steps, such as [{trains: [prefix], share: 0.5}, {trains: [prefix, lora]}]; none: all

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "train's")
        for name in ("batch_size", "accumulation", "checkpoint_every", "keep", "log_every", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}: give 1 or more")
        never_negative = ("steps", "stop_at", "weight_decay", "clip", "workers", "measure_every", "patience", "bad_samples", "seed", "states_gib")
        for name in (*never_negative, "row_tokens", "bucket_pool"):
            if not getattr(self, name) >= 0:  # also true of a NaN
                raise ConfigError(f"train.{name} is {getattr(self, name)}: give 0 or more")
        if self.draw_frames and self.features != "encode":
            raise ConfigError(f"train.draw_frames gives each epoch other frames, and train.features is {self.features}: give encode, or leave it out")
        if (self.keep_best or self.patience) and not self.measure_every:
            name = "keep_best" if self.keep_best else "patience"
            raise ConfigError(f"train.{name} judges measurements, and train.measure_every is 0: give the steps between two of them, such as 100")
        if self.seed > MAX_SEED:
            raise ConfigError(f"train.seed is {self.seed}: give at most {MAX_SEED}, so that epochs have seeds of their own")
        if not self.steps and not self.epochs > 0:
            raise ConfigError(f"train.epochs is {self.epochs} and train.steps 0: give a positive number of one of them")
        if not all(0 < rate < math.inf for rate in (self.learning_rate, *self.learning_rates.values())):
            raise ConfigError(f"train.learning_rate is {self.learning_rate} and train.learning_rates {self.learning_rates}: give positive rates")
        if not 0 <= self.warmup < 1 or not 0 <= self.final_rate <= 1:
            raise ConfigError(f"train.warmup is {self.warmup} and train.final_rate {self.final_rate}: both are shares between 0 and 1")
        if self.compile != "no" and self.checkpointing:
            raise ConfigError(f"train.compile is {self.compile} and train.checkpointing true: a checkpointed layer is no part of one graph, so choose one")
        if self.compile != "no" and self.offload != "no":
            raise ConfigError(f"train.compile is {self.compile} and train.offload {self.offload}: a graph plans its own memory, so choose one")
        if self.states_gib * 2**30 == math.inf:  # in bytes
            raise ConfigError(f"train.states_gib is {self.states_gib}: give a number of GiB, such as half of the memory that is free")
        if self.compile != "no" and self.states_gib:
            raise ConfigError(f"train.compile is {self.compile} and train.states_gib {self.states_gib}: one graph holds every layer, so choose one")
        if self.teachers.folders is not None and (self.compile != "no" or self.states_gib):
            name = f"compile is {self.compile}" if self.compile != "no" else f"states_gib {self.states_gib}"
            raise ConfigError(f"train.{name} and train.teachers are given: what they save is of one adapter, and three read each text; leave one out")
        if not 0 <= self.pull < 1:
            raise ConfigError(f"train.pull is {self.pull}: give 0 or more and less than 1, the share of the way to the mean that a step takes")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas is {self.betas}: both are from 0 to below 1")
        if self.stages:
            self._check_stages()

    def _check_stages(self) -> None:
        """Raise ConfigError for stages that are not as long as the run. Stages that all say their steps say those of the run, where it does not itself."""
        *first, last = self.stages
        if self.patience and len(self.stages) > 1:
            raise ConfigError(f"train.patience is {self.patience}, which ends a run before its later train.stages: give 0, or one stage")
        if any(stage.steps is stage.share is None for stage in first):
            raise ConfigError("train.stages has a stage without steps and share that is not the last, which alone takes the rest: say how long it is")
        steps, shares = ([value for stage in self.stages if (value := getattr(stage, name)) is not None] for name in ("steps", "share"))
        is_open = last.steps is last.share is None
        if steps and shares:
            raise ConfigError("train.stages counts some stages in steps and others in shares: count all of them alike")
        if steps and not is_open and not self.steps:
            object.__setattr__(self, "steps", sum(steps))
        if steps and not self.steps:
            raise ConfigError("train.stages counts steps, and how many are left for the last stage train.epochs does not say: give train.steps, or shares")
        total, unit, found = (self.steps, "steps", sum(steps)) if steps else (1, "of the run", sum(shares))
        if found > total + 1e-9 or (not is_open and found < total - 1e-9):
            raise ConfigError(f"train.stages add up to {found:g} {unit}, and the run has {total}: give stages that add up to it, or none for the last")

    @property
    def staged(self) -> tuple[Stage | None, ...]:
        """The stages that last a step or more; one, of everything, where there are none: None."""
        return tuple(stage for stage in self.stages if stage.steps != 0 and stage.share != 0) or (None,)

    def stage_ends(self, n_steps: float) -> list[float]:
        """After how many steps of a run of so many each of `staged` ends."""
        ends = [0.0]
        for stage in self.staged[:-1]:
            assert stage is not None
            ends.append(ends[-1] + (stage.share or 0.0) * n_steps if stage.steps is None else ends[-1] + stage.steps)
        return [*map(round, ends[1:]), n_steps]

    def n_steps(self, n_samples: int, world: int) -> int:
        """Optimizer steps of the whole run: every image is read at least `epochs` times."""
        return self.n_steps_from(0, 0, n_samples, world)

    def n_steps_from(self, step: int, position: int, n_samples: int, world: int) -> int:
        """The run's last step where `step` steps have read `position` images, perhaps with another number of processes."""
        left = math.ceil(self.epochs * n_samples) - position
        return self.steps or step + max(0, -(-left // (self.batch_size * self.accumulation * world)))

    def rate(self, step: float, n_steps: float) -> float:
        """The share of the peak rate at a step: linear warm-up, then a cosine. 0-based; warm-up's first step is not 0.

        Fractions of a step come up where a run goes on with another number of samples in a step.
        """
        n_warm = int(self.warmup * n_steps)
        if step < n_warm:
            return (step + 1) / (n_warm + 1)
        progress = (step - n_warm) / max(n_steps - n_warm, 1)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
