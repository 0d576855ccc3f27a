"""What a run needs to go on exactly where it was: weights, optimizer, random numbers, step, data. safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from adalink.errors import CheckpointError, ConfigError, DataError
from multimodal.training.settings import TrainSettings

__all__ = [
    "BEST", "SCHEDULE", "Best", "latest_checkpoint", "load_state", "put_whole", "read_state", "save_state", "state_tensors", "whole",
    "write_state",
]  # fmt: skip


PREFIX = "step_"
BEST = "best."  # tensors of a checkpoint that are the best weights so far
SCHEDULE = "schedule."  # and those of the methods' schedules


def save_state(
    folder: Path, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, extra: Mapping[str, Any], keep: int
) -> None:
    """Write `folder/step_N`, whole or not at all, and remove all but the newest `keep`; for a program of one process."""
    write_state(folder, step, state_tensors(parameters, optimizer), extra, keep)


def state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, optimizer state and random numbers, on the CPU.

    What FSDP2 splits over processes is put together, so that another number of them can go on: every process must call this.
    """
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = whole(torch.as_tensor(value))
    return tensors


def write_state(folder: Path, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], keep: int) -> None:
    """Write `folder/step_N`, whole or not at all, and remove all but the newest `keep`; one process of several does it.

    Raises DataError where it cannot be written, the disk being full for instance; the checkpoints that are there stay.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.{os.getpid()}"
    try:
        if partial.exists():  # of a killed process that had the same id, as processes in containers do
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save_file(dict(tensors), partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **extra}))
        for file in partial.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # the folder's new name must not reach the disk before its files
            os.close(descriptor)
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"the checkpoint {final} cannot be written ({error}); the one before stays: make room and go on with --resume") from error
    for old in sorted(folder.glob(PREFIX + "*"))[:-keep]:
        shutil.rmtree(old)
    for left in folder.glob(f".{PREFIX}*"):  # of a process that was killed while it wrote
        shutil.rmtree(left)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    found = sorted(folder.glob(PREFIX + "*"))
    return found[-1] if found else None


def load_state(checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, optimizer state and random numbers back; what was given as `extra` comes back, with `step`.

    Raises CheckpointError, with nothing loaded, where the checkpoint is damaged or holds other weights.
    """
    tensors, content = _read(checkpoint)
    _check_weights(checkpoint, tensors, parameters)
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    with torch.no_grad():
        for name, parameter in parameters.items():
            put_whole(parameter, tensors[f"weight.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # AdamW keeps its moments beside the parameter, and its step count on the CPU unless it is fused.
            count_at = parameter.device if is_fused else torch.device("cpu")
            optimizer.state[parameter] = {
                key: value.to(count_at) if value.ndim == 0 else _like(value.to(parameter.device), parameter) for key, value in state.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return content


def read_state(checkpoint: Path, parameters: Mapping[str, nn.Parameter], kind: str = BEST) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was given as `extra`, with `step`, and the tensors of a kind (BEST, SCHEDULE) by name; nothing is changed.

    Raises CheckpointError as `load_state`.
    """
    tensors, content = _read(checkpoint)
    _check_weights(checkpoint, tensors, parameters)
    return content, {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}


@torch.no_grad()
def put_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a whole tensor's values; its part of them where it is split."""
    parameter.copy_(_like(value.to(parameter.device), parameter))


def whole(tensor: Tensor) -> Tensor:
    """On the CPU, put together where FSDP2 splits it: every process must call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _check_weights(checkpoint: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    stored = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if stored != set(parameters):
        raise CheckpointError(
            f"{checkpoint} holds other weights than this config trains: {sorted(stored ^ set(parameters))[:4]} differ; resume with the config of the run"
        )
    for name, parameter in parameters.items():
        if tensors[f"weight.{name}"].shape != parameter.shape:
            raise CheckpointError(f"{checkpoint}: {name} is {list(tensors[f'weight.{name}'].shape)}, this config makes it {list(parameter.shape)}")


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, where its parameter is split."""
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else whole


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = load_file(checkpoint / "state.safetensors")
        content: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(content, dict) or "step" not in content or "rng.cpu" not in tensors:
            raise ValueError(f"it has no {'rng.cpu' if 'step' in content else 'step'}")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}): remove it to go on from the one before") from None
    return tensors, content


# ----------------------------------------
# The best weights that a run measured so far, stored in its checkpoints.


class Best:
    """Judges each measurement by one metric, of which more is better.

    metric  its name; None: the first that is measured
    step    after which the best was measured, 0 before the first
    value   of the metric then
    waited  measurements since then
    """

    def __init__(self, settings: TrainSettings, metric: str | None) -> None:
        self.metric, self.step, self.value, self.waited = metric, 0, -math.inf, 0
        self._settings = settings
        self._weights: dict[str, Tensor] = {}

    def judge(self, step: int, metrics: Mapping[str, float], parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this measurement is the best so far; its weights are then saved. Raises ConfigError where the metric was not measured."""
        self.metric = self.metric or next(iter(metrics), None)
        if self.metric is None or self.metric not in metrics:
            what = self.metric or "a metric to judge by"
            raise ConfigError(f"train.keep_best and train.patience need {what}, and the measurement gave {', '.join(metrics) or 'nothing'}")
        self.waited += 1
        if not metrics[self.metric] > self.value:
            return False
        self.step, self.value, self.waited = step, metrics[self.metric], 0
        if self._settings.keep_best:
            self._weights = {name: whole(parameter).clone() for name, parameter in parameters.items()}
        return True

    @property
    def is_over(self) -> bool:
        """Whether so many measurements were no better that the run should end."""
        return 0 < self._settings.patience <= self.waited

    def put_back(self, parameters: Mapping[str, nn.Parameter]) -> tuple[int, str, float] | None:
        """Give the parameters the best weights; their step, metric and value come back, None where none were saved."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                put_whole(parameters[name], weight)
        return (self.step, self.metric or "", self.value) if self._weights else None

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"figure": self.metric, "step": self.step, "value": self.value if self.step else None, "waited": self.waited}

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return dict(self._weights)

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on judging where a run was. One that is judged by another metric than before, or saved no weights, begins anew."""
        if state.get("step") and self.metric in (None, state["figure"]) and (weights or not self._settings.keep_best):
            self.metric, self.step, self.value, self.waited = state["figure"], state["step"], state["value"], state["waited"]
            self._weights = dict(weights) if self._settings.keep_best else {}
