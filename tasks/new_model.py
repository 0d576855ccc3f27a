"""The model that a run trains, made of its config, and what it learns of a sample."""

from __future__ import annotations

from multimodal.loader import Texts
from multimodal.model import VisionLanguageModel
from multimodal.sample import SampleSource
from tasks.answer_vocabulary import answer_vocabulary
from tasks.compose import compose
from tasks.config import RunConfig, chosen_methods

__all__ = ["new_model"]


def new_model(config: RunConfig, source: SampleSource) -> tuple[VisionLanguageModel, Texts]:
    """The composed model with new adapters on the language model and, where the config says so, on the encoder; and the texts it learns.

    source: the training data, whose most frequent answers a model that chooses among answers gets. Raises ConfigError and DataError as
    `compose`, `add_adapter` and `answer_vocabulary` do.
    """
    task = config.chosen_task()
    methods = chosen_methods(config.methods)
    model = compose(config.encoder, config.language_model, template=task.template, layer=config.layer, use="read" if config.n_answers else "write")
    model.add_adapter("default", methods)
    if config.encoder_methods:
        model.add_vision_adapter(config.encoder_methods)
    if not config.n_answers:
        return model, task.texts
    vocabulary = answer_vocabulary(config.vqa, source)
    model.add_answer_head(vocabulary.answers)
    return model, vocabulary.texts
