"""A saved adapter on a data set, scored again with other weights or none: images are encoded once. What a search over adapters asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalink.errors import ConfigError, DataError
from multimodal.data.feature_cache.encode import encode_all, pixel_table
from multimodal.generation.settings import GenerationSettings, saved_generation
from multimodal.model import VisionLanguageModel
from tasks.captioning import Captioning
from tasks.data.sources import DataConfig
from tasks.evaluation.compare import Comparison, compare_answers, compare_captions
from tasks.evaluation.evaluate import ReadImages, is_graded, predict, read_images
from tasks.metrics.bootstrap import Resampling
from tasks.runs.compose import load_adapted
from tasks.task import Score, Task
from tasks.vqa import Vqa, graded_question

__all__ = ["Answers", "ScoredAdapter"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model wrote about each item, and the task's score of it."""

    texts: Mapping[int, str]
    score: Score

    @property
    def value(self) -> float:
        """The metric that a run is judged by."""
        value = self.score.metrics[self.score.headline]
        assert value is not None  # of captions and answers none is undefined
        return value


@dataclass(frozen=True, kw_only=True)
class ScoredAdapter:
    """A model with a saved adapter, and the images that it is asked about."""

    model: VisionLanguageModel
    images: ReadImages
    task: Task
    settings: GenerationSettings

    @classmethod
    def load(cls, adapter: Path, data: DataConfig, *, encoder: str | None = None, language_model: str | None = None, model: str | None = None) -> ScoredAdapter:
        """The adapter of a folder that `adalink train` wrote, on its frozen parts or on those that are given, and a data set.

        Raises as `load_adapted`; DataError where nothing of the data set can be used or scored.
        """
        loaded, saved = load_adapted(adapter, encoder=encoder, language_model=language_model, model=model)
        return cls.of(loaded, saved, data)

    @classmethod
    def of(cls, loaded: VisionLanguageModel, saved: Mapping[str, Any], data: DataConfig) -> ScoredAdapter:
        """The same of a model with its adapter, and what the adapter's config says of its task.

        Raises ConfigError where it was trained for none, DataError where nothing of the data set can be used or scored.
        """
        tasks: Mapping[str, Task] = {"captioning": Captioning(), "vqa": Vqa()}
        if saved["task"] not in tasks:
            raise ConfigError(f"the adapter was trained for {saved['task']}, which is not scored: give one of {', '.join(tasks)}")
        opened, task = data.open(), tasks[saved["task"]]
        if not is_graded(task, opened.source):
            raise DataError("the data set has nothing that people wrote, so no score can be had from it: give a validation split, not a test split")
        encoded = pixel_table(opened.source, loaded.tower.preprocess, label="reading") if loaded.changes_features else encode_all(loaded, opened.source)
        return cls(model=loaded, images=read_images(opened, encoded), task=task, settings=saved_generation(saved))

    def compared(self, before: Answers, after: Answers, resampling: Resampling) -> Comparison:
        """What two models wrote about the same items, side by side. Raises DataError where one of them left some out."""
        samples = [self.images.source[index] for index in range(len(self.images.source))]
        if self.task.name == "captioning":
            people = {sample.image_id: sample.captions for sample in samples if sample.image_id in after.texts}
            return compare_captions(before.texts, after.texts, people, resampling=resampling)
        asked = [graded_question(question) for sample in samples for question in sample.questions if question.question_id in after.texts]
        return compare_answers(before.texts, after.texts, asked, resampling=resampling)

    @torch.no_grad()
    def give(self, weights: Mapping[str, Tensor]) -> None:
        """The adapter then has these weights, by the names of its tensors."""
        own = self.model.adapted.active_adapter().tensors()
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    def answers(self, weights: Mapping[str, Tensor] | None = None) -> Answers:
        """With the weights that the adapter has, or with others of the same names, which it then keeps."""
        self.give(weights or {})
        texts = predict(self.model, self.images.source, self.task, self.images.patches, settings=self.settings).texts
        return Answers(texts=texts, score=self.task.score(texts, self.images.source))
