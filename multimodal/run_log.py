"""What a run writes as it goes: metrics.jsonl and bad_samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from multimodal.bad_samples import BadSample, BadSamples

__all__ = ["RunLog"]

METRICS_FILE, BAD_FILE = "metrics.jsonl", "bad_samples.jsonl"


class RunLog:
    """metrics.jsonl, one line per logged step, and every bad sample once, whatever the number of epochs that met it."""

    def __init__(self, folder: Path, *, budget: int, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.bad = BadSamples(budget=budget)
        self._seen: set[str] = set()

    def write(self, values: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        self._append(METRICS_FILE, values)

    def skip(self, bad: Sequence[BadSample]) -> None:
        """Count bad samples; raises BudgetError over the budget."""
        for sample in bad:
            if sample.key not in self._seen:
                self._seen.add(sample.key)
                self.bad.add(sample)
                self._append(BAD_FILE, asdict(sample))
        if bad:
            self.bad.check()

    def rewind(self, step: int) -> None:
        """Forget what was written after a step: the resumed run writes it again. Bad samples stay counted."""
        metrics = self.folder / METRICS_FILE
        if metrics.exists() and self.is_main:
            lines = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
            metrics.write_text("".join(line + "\n" for line in lines))
        bad = self.folder / BAD_FILE
        if bad.exists():
            for line in bad.read_text().splitlines():
                sample = BadSample(**json.loads(line))
                self._seen.add(sample.key)
                self.bad.add(sample)

    def _append(self, file: str, values: Mapping[str, object]) -> None:
        if self.is_main:
            with (self.folder / file).open("a") as stream:
                stream.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; a line that a killed process cut off belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
