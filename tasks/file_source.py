"""A data set that lies in files: its samples in memory, its pictures on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from multimodal.bad_samples import BadSample
from multimodal.lengths import Measure, measured
from multimodal.sample import Sample

__all__ = ["FileSource"]


class FileSource:
    """Samples whose images are paths, in the order of the annotations; nothing is decoded here.

    problems   what the annotations name and the data set cannot give: pictures that are not there, images without a text.
    item_ids   every id that an official result file for this split must hold, in the file's order: of images, or of questions. Those
               that `problems` keep from being asked about are among them.
    """

    def __init__(self, samples: Iterable[Sample], problems: Iterable[BadSample], *, read_from: Path, item_ids: Iterable[int] = ()) -> None:
        """Raises DataError where no sample is left; `read_from` is the annotation file, for the message."""
        self._samples = tuple(samples)
        self.problems = tuple(problems)
        self.item_ids = tuple(item_ids)
        if not self._samples:
            first = f"; {len(self.problems)} cannot be used, the first because {self.problems[0].detail}" if self.problems else ""
            raise DataError(f"{read_from} gives no sample{first}")

    @cached_property
    def texts_fingerprint(self) -> str:
        """Of keys, ids and all texts; pictures do not count, and neither does the folder in which they lie."""
        digest = hashlib.sha256()
        for sample in self._samples:
            words = [sample.key, str(sample.image_id), *sample.captions]
            for asked in sample.questions:
                words += [f"{asked.question_id} {len(asked.answers)}", asked.text, asked.question_type, asked.answer_type, *asked.answers, *asked.marks]
            words.append(f"{len(sample.captions)} {len(sample.questions)}")
            digest.update("".join(f"{len(word)} {word}\n" for word in words).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.lengths.TextLengths`: all texts are in memory."""
        return measured(self._samples, len(self), measure)
