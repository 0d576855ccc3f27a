"""What a run writes as it goes: metrics.jsonl and bad_samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from adalink.atomic import write_whole
from multimodal.bad_samples import BadSample, BadSamples

__all__ = ["RunLog"]

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
            for path, kept in ((metrics, lines), (bad, found)):
                if path.exists():
                    write_whole(path, "".join(line + "\n" for line in kept).encode())

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
