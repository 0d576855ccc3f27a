"""Features that are written while the first epoch reads the pictures, and read from there on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from multimodal.batch import Batch
from multimodal.feature_cache.write import complete
from multimodal.feature_cache.writer import FeatureWriter
from multimodal.loader import Loaded, TrainLoader
from multimodal.sample import SampleSource
from multimodal.vision import VisionTower

__all__ = ["FillingLoader"]


class FillingLoader:
    """A training stream that encodes each picture as it comes and keeps its features; from the second epoch on it reads them.

    What a step learns from is what is kept, rounded as it is kept: the first epoch does not differ from the others, nor from a run whose
    features were written before. Pictures that no step has read by then (after a resume without the folder; in a mixture, of a set that
    comes round seldom) are encoded before the second epoch begins. Where the run ends earlier the folder is not finished, and goes on in
    another run, or in `adalink features`.
    """

    def __init__(self, stream: TrainLoader, writer: FeatureWriter, tower: VisionTower, source: SampleSource, *, workers: int) -> None:
        self._stream, self._writer, self._tower, self._source, self._workers = stream, writer, tower, source, workers
        self.steps = 0

    def __iter__(self) -> Iterator[Loaded]:
        """The next `steps` steps."""
        first = 0 if self._writer.is_whole else min(self.steps, self._stream.steps_to(len(self._source)))
        self._stream.steps = first
        for loaded in self._stream:
            yield self._kept(loaded)
        if self._writer.is_whole or self._stream.steps_to(len(self._source)) == 0:
            self._stream.read_kept(complete(self._writer, self._tower, self._source, workers=self._workers, label="encoding what is left"))
            self._stream.steps = self.steps - first
            yield from self._stream

    def blank(self) -> Batch:
        """As the stream's."""
        return self._stream.blank()

    def state_dict(self) -> dict[str, Any]:
        """As the stream's: what was kept so far is in its folder."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As the stream's."""
        self._stream.load_state_dict(state)

    def _kept(self, loaded: Loaded) -> Loaded:
        batch, contents = loaded.batch, self._writer.contents
        if batch is None or batch.pixels is None:
            return loaded
        records = contents.of(self._tower.encode(batch.pixels))
        self._writer.add(loaded.pictures, records.cpu())
        patches, taps = (records, None) if contents.patches else (None, records)
        return replace(loaded, batch=replace(batch, pixels=None, patches=patches, taps=taps))
