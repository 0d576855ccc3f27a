"""What a run has read and learnt from so far, over all its processes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from adalink.errors import DataError
from multimodal.bad_samples import BadSamples
from multimodal.mixing import set_sizes
from multimodal.processes import Agreed
from multimodal.sample import SampleSource

__all__ = ["Learnt"]


class Learnt:
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
        """Raises DataError where all samples of a set were asked for and none could be used; at the end of a run also where it learnt from nothing."""
        for (name, size), asked, good in zip(self._sizes.items(), self._asked, self._good, strict=True):
            if asked >= size and not good:
                which = f"the {size} samples of {name}" if name else f"the {size} samples"
                raise DataError(f"none of {which} can be used, so nothing is learnt from them: {bad.summary()}; mend the data, or give other data")
        if is_end and self.is_nothing:
            raise DataError(f"none of the {sum(self._asked)} samples that were read can be used, so nothing was learnt: {bad.summary()}; mend the data")

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"asked": self._asked, "good": self._good, "skipped": self.skipped, "skipped_samples": self.skipped_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; a checkpoint of an earlier version, which holds no counts, is taken to have learnt from what it read."""
        self._asked = list(state.get("asked", self._asked))
        self._good = list(state.get("good", [1] * len(self._sizes)))
        self.skipped, self.skipped_samples = state.get("skipped", 0), state.get("skipped_samples", 0)
