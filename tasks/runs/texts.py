"""What a run of texts gives its model: a head, or label words; and what is reported of texts that are cut."""

from __future__ import annotations

from typing import Any

import torch

from multimodal.batches.tokenize import TextRowEncoder
from multimodal.loss.answer_head import LabelWords, word_tokens
from multimodal.model import VisionLanguageModel
from multimodal.sample import SampleSource, counted
from tasks.data.sources import place_of
from tasks.runs.text_task import TextTask
from tasks.task import Task

__all__ = ["cut_note", "equip", "saved_labels"]


def equip(model: VisionLanguageModel, task: TextTask, source: SampleSource) -> None:
    """Let the active adapter choose as the task says. A head of scores starts at the mean of the training data's. Raises ConfigError as LabelWords does."""
    if task.settings.how == "head":
        head = model.add_answer_head(task.labels or ("score",), "squared" if task.gives_scores else "softmax")
        if task.gives_scores:
            scores = [float(answer) for index in range(len(source)) for one in source[index].questions for answer in one.answers]
            torch.nn.init.constant_(head.linear.bias, sum(scores) / max(len(scores), 1))
    elif task.settings.how == "words":
        words = LabelWords(words=task.labels, by=task.settings.score)
        encoder = model.row_encoder()
        assert isinstance(encoder, TextRowEncoder)
        word_tokens(encoder, words)
        model.label_words[model.adapted.active or ""] = words


def saved_labels(task: Task) -> dict[str, Any]:
    """What an adapter's config holds of a task's labels."""
    return {"labels": list(task.labels)} if isinstance(task, TextTask) and task.labels else {}


def cut_note(model: VisionLanguageModel, task: Task, *sources: SampleSource) -> str:
    """How many texts are longer than a row may be, and where the first stands; empty where none is."""
    encoder = model.row_encoder()
    if not isinstance(encoder, TextRowEncoder):
        return ""
    where = [place_of(source, i) for source in sources for i in range(len(source)) if any(encoder.excess(one.text) for one in task.asked(source[i]))]
    if not where:
        return ""
    return f"{counted(len(where), 'row')} of {sum(map(len, sources)):,} have more than {encoder.limit} tokens and are cut (first: {where[0]})"
