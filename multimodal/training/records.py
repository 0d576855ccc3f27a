"""What a run writes as it goes: metrics.jsonl and bad_samples.jsonl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from adalink.checkpoint.start import digest_of
from adalink.errors import CheckpointError, DataError
from adalink.files import write_whole
from adalink.lifecycle.flat import read_flat
from multimodal.data.order import set_sizes
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.sample import BadSample, BadSamples, SampleSource
from multimodal.training.distributed import Agreed
from multimodal.training.settings import TrainSettings

__all__ = ["TrainedSoFar", "RunLog", "LoggedSamples", "changed_settings", "flat", "refuse_another_model", "run_facts", "track"]


METRICS_FILE, BAD_FILE = "metrics.jsonl", "bad_samples.jsonl"
VAL_LOSS = "val_loss"  # in a measurement: the loss on the validation data


class RunLog:
    """metrics.jsonl, one line per logged step, and every bad sample once, whatever the number of epochs that met it."""

    def __init__(self, folder: Path, *, budget: int, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.bad = BadSamples(budget=budget)
        self._seen: set[tuple[str, str]] = set()  # (key, reason)

    def write(self, values: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        self._append(METRICS_FILE, values)

    def skip(self, bad: Sequence[BadSample]) -> None:
        """Count bad samples; raises BudgetError over the budget."""
        for sample in bad:
            if (sample.key, sample.reason) not in self._seen:
                self._count(sample)
                self._append(BAD_FILE, {name: value for name, value in asdict(sample).items() if value or name != "file"})
        if bad:
            self.bad.check()

    def rewind(self, step: int) -> None:
        """Forget what was written after a step: the resumed run writes it again. Bad samples stay counted."""
        metrics, bad = self.folder / METRICS_FILE, self.folder / BAD_FILE
        lines = [line for line in _whole_lines(metrics) if json.loads(line)["step"] <= step]
        found = _whole_lines(bad)
        for line in found:
            self._count(BadSample(**json.loads(line)))
        if self.is_main:
            for path, retained in ((metrics, lines), (bad, found)):
                if path.exists():
                    write_whole(path, "".join(line + "\n" for line in retained).encode())

    def _count(self, sample: BadSample) -> None:
        self._seen.add((sample.key, sample.reason))
        self.bad.add(sample)

    def _append(self, file: str, values: Mapping[str, object]) -> None:
        if self.is_main:
            with (self.folder / file).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, without one that a killed process did not finish; none where there is no file."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return whole


# ----------------------------------------
# What TensorBoard or Weights & Biases log at a measurement: metrics, and images with their generated texts.


@dataclass(frozen=True, kw_only=True)
class LoggedSamples:
    """An image with its generated text. key: the sample's, which the tracker lists it under."""

    key: str
    image: Image.Image
    text: str


def track(accelerator: Accelerator, step: int, metrics: Mapping[str, float], logged: Sequence[LoggedSamples] = ()) -> None:
    """Log to every tracker of the run; nothing where there is none, and on the main process alone."""
    accelerator.log(dict(metrics), step=step)
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        {"tensorboard": _to_tensorboard, "wandb": _to_wandb}[tracker.name](tracker, step, logged)


def _to_tensorboard(tracker: Any, step: int, logged: Sequence[LoggedSamples]) -> None:
    """Image and text under one name each, so that the page has a slider over the steps."""
    for one in logged:
        tracker.writer.add_image(f"samples/{one.key}", np.asarray(one.image.convert("RGB")), step, dataformats="HWC")
        tracker.writer.add_text(f"samples/{one.key}", one.text, step)
    tracker.writer.flush()  # whoever looks while it trains sees this measurement


def _to_wandb(tracker: Any, step: int, logged: Sequence[LoggedSamples]) -> None:
    import wandb  # type: ignore[import-not-found]  # late: an extra, and only where it is asked for

    if logged:
        tracker.log({"samples": [wandb.Image(one.image, caption=f"{one.key}: {one.text}") for one in logged]}, step=step)


# ----------------------------------------
# What a run is a function of, stored in its checkpoints: a resume that differs is refused, or logs the difference.


def run_facts(model: VisionLanguageModel, settings: TrainSettings) -> dict[str, Any]:
    """As JSON: the training's settings by name, and what the model is made of."""
    parts, head = TrainedParts.of(model), model.head
    template = model.template_of(model.adapted.active or "")
    made = {
        **{role: part.fingerprint for role, part in model.adapted.parts.items()},
        "methods": _methods(parts.edits.methods),
        "vision_methods": _methods(parts.vision.methods) if parts.vision is not None else {},
        **({"connector_methods": _methods(parts.connector.methods)} if parts.connector is not None else {}),
        **({"modules_to_save": sorted(parts.edits.copies)} if parts.edits.copies else {}),
        "template": template.saved(),
        **({"teachers": model.language_loss.followed.digests} if model.language_loss.followed is not None else {}),
        **({"fixed": digest_of(fixed)} if (fixed := dict(parts.edits.named_buffers())) else {}),
        **({"pull_towards": [read_flat(folder, model.adapted).digest for folder in settings.pull_towards]} if settings.pull_towards else {}),
        "answers": hashlib.sha256("\n".join(head.answers).encode()).hexdigest()[:16] if head is not None else "",
    }
    return json.loads(json.dumps({"train": dataclasses.asdict(settings), "model": made}, default=str))  # type: ignore[no-any-return]


def refuse_another_model(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint's model was made of something else; a checkpoint without these facts was written by an earlier version."""
    was, now = flat(found.get("model", {})), flat(own["model"])
    # A setting that came since the checkpoint was written is off where it changes nothing; a prompt's place was the start.
    known = {name for name, value in now.items() if value and value != "start"} | was.keys()
    if was and (different := [name for name in {**was, **now} if was.get(name) != now.get(name) and name in known]):
        name = different[0]
        others = f", and {', '.join(different[1:4])} differ too" if len(different) > 1 else ""
        raise CheckpointError(f"{name} was {was.get(name)!r} and is {now.get(name)!r}{others}")


def changed_settings(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """`train.learning_rate 0.001 -> 0.0005` for each setting of the training that is another now."""
    was, now = found.get("train", {}), {name: value for name, value in own["train"].items() if name != "stop_at"}  # changes no step
    return [f"train.{name} {was[name]} -> {now[name]}" for name in now if name in was and was[name] != now[name]]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def _methods(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"kind": type(method).__name__, **dataclasses.asdict(method)} for name, method in methods.items()}


# ----------------------------------------
# What a run has read and trained on so far, over all its processes.


class TrainedSoFar:
    """Counts the samples that were asked for and those that could be used, by set of a mixture, and the steps that had nothing to learn.

    skipped          steps without a target: no optimizer step was taken
    skipped_samples  samples that they read
    """

    def __init__(self, source: SampleSource) -> None:
        self._sizes = set_sizes(source)
        self._asked, self._good = [0] * len(self._sizes), [0] * len(self._sizes)
        self.skipped = self.skipped_samples = 0

    @property
    def ends(self) -> list[int]:
        """The index after the last sample of each set."""
        return list(accumulate(self._sizes.values()))

    @property
    def is_nothing(self) -> bool:
        """Whether no sample could be used yet."""
        return not any(self._good)

    def add(self, agreed: Agreed) -> None:
        """Count a step."""
        self._asked = [before + more for before, more in zip(self._asked, agreed.asked, strict=True)]
        self._good = [before + more for before, more in zip(self._good, agreed.good, strict=True)]
        if not agreed.n_targets:
            self.skipped += 1
            self.skipped_samples += sum(agreed.asked)

    def check(self, bad: BadSamples, *, is_end: bool = False) -> None:
        """Raises DataError where all samples of a set were asked for and none could be used; at the end of a run also where it trained on nothing."""
        for (name, size), asked, good in zip(self._sizes.items(), self._asked, self._good, strict=True):
            if asked >= size and not good:
                which = f"the {size} samples of {name}" if name else f"the {size} samples"
                raise DataError(f"none of {which} can be used, so the run cannot train on them: {bad.summary()}; mend the data, or give other data")
        if is_end and self.is_nothing:
            raise DataError(f"none of the {sum(self._asked)} samples that were read can be used, so nothing was trained: {bad.summary()}; mend the data")

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"asked": self._asked, "good": self._good, "skipped": self.skipped, "skipped_samples": self.skipped_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; a checkpoint of an earlier version, which holds no counts, is taken to have trained on what it read."""
        self._asked = list(state.get("asked", self._asked))
        self._good = list(state.get("good", [1] * len(self._sizes)))
        self.skipped, self.skipped_samples = state.get("skipped", 0), state.get("skipped_samples", 0)
