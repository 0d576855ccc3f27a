"""The best weights that a run measured so far, kept in its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.train_settings import TrainSettings
from multimodal.train_state import put_whole, whole

__all__ = ["Best"]


class Best:
    """Judges each measurement by one figure, of which more is better.

    figure  its name; None: the first that is measured
    step    after which the best was measured, 0 before the first
    value   of the figure then
    waited  measurements since then
    """

    def __init__(self, settings: TrainSettings, figure: str | None) -> None:
        self.figure, self.step, self.value, self.waited = figure, 0, -math.inf, 0
        self._settings = settings
        self._weights: dict[str, Tensor] = {}

    def judge(self, step: int, figures: Mapping[str, float], parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this measurement is the best so far; its weights are then kept. Raises ConfigError where the figure was not measured."""
        self.figure = self.figure or next(iter(figures), None)
        if self.figure is None or self.figure not in figures:
            what = self.figure or "a figure to judge by"
            raise ConfigError(f"train.keep_best and train.patience need {what}, and the measurement gave {', '.join(figures) or 'nothing'}")
        self.waited += 1
        if not figures[self.figure] > self.value:
            return False
        self.step, self.value, self.waited = step, figures[self.figure], 0
        if self._settings.keep_best:
            self._weights = {name: whole(parameter).clone() for name, parameter in parameters.items()}
        return True

    @property
    def is_over(self) -> bool:
        """Whether so many measurements were no better that the run should end."""
        return 0 < self._settings.patience <= self.waited

    def put_back(self, parameters: Mapping[str, nn.Parameter]) -> tuple[int, str, float] | None:
        """Give the parameters the best weights; their step, figure and value come back, None where none were kept."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                put_whole(parameters[name], weight)
        return (self.step, self.figure or "", self.value) if self._weights else None

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"figure": self.figure, "step": self.step, "value": self.value if self.step else None, "waited": self.waited}

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return dict(self._weights)

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on judging where a run was. One that is judged by another figure than before, or kept no weights, begins anew."""
        if state.get("step") and self.figure in (None, state["figure"]) and (weights or not self._settings.keep_best):
            self.figure, self.step, self.value, self.waited = state["figure"], state["step"], state["value"], state["waited"]
            self._weights = dict(weights) if self._settings.keep_best else {}
