"""Answers chosen among a vocabulary: a trained head over the pooled state of the frozen language model, which reads image and question.

    model = VisionLanguageModel.compose("timm:...", "google-bert/bert-base-uncased", template=template, use="read")
    model.add_adapter("vqa", methods)
    model.add_answer_head(vocabulary.answers)

The head learns the score that each answer would get (binary cross entropy with soft scores, as the field trains VQAv2); the prediction is
the answer of the highest one. A head belongs to one adapter, and lies in its folder: `answers.json` and `answer_head.safetensors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink import PAD, TEXT, AdaptedModel, TokenMap
from adalink.anatomy import setting
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from multimodal.batches.collate import NO_TARGET, Batch
from multimodal.language import READER_ADVICE, Language, LanguageUse

__all__ = ["AnswerHead", "answer_loss", "chosen_answers", "load_head", "new_head", "pooled_state", "save_head", "state_width", "use_for"]

ANSWERS_FILE, HEAD_FILE = "answers.json", "answer_head.safetensors"


class AnswerHead(nn.Module):
    """Scores of A answers from a pooled state: one linear.

    answers: the text of each output. Raises ConfigError for none, or one of them twice.
    """

    def __init__(self, answers: Sequence[str], width: int) -> None:
        super().__init__()
        if not answers or len(set(answers)) < len(answers):
            raise ConfigError(f"a head was given {len(answers)} answers, {len(set(answers))} of them different: give one or more, each once")
        self.answers = tuple(answers)
        self.linear = nn.Linear(width, len(answers))
        nn.init.constant_(self.linear.bias, -math.log(len(answers)))  # at the start about one of the answers is right, not half of them

    def forward(self, state: Tensor) -> Tensor:
        """[B, D] -> logits [B, A], in the dtype of the head's weights."""
        logits: Tensor = self.linear(state.to(self.linear.weight.dtype))
        return logits


def use_for(task: Mapping[str, Any]) -> LanguageUse:
    """What the language model of a saved adapter is for, from what its config says of its task."""
    return "read" if task.get("answers") else "write"


def state_width(model: Any) -> int:
    """D of the pooled state: what the model's own head reads, where it has one."""
    head = model.get_output_embeddings()
    return int(setting(model.config, "hidden_size") if head is None else head.weight.shape[1])


def new_head(adapted: AdaptedModel, answers: Sequence[str]) -> AnswerHead:
    """A head for the state of this model. Raises ConfigError for an encoder-decoder model."""
    base: Any = adapted.base
    if base.config.is_encoder_decoder:
        raise ConfigError(f"{type(base).__name__} is an encoder-decoder, and a head chooses an answer from one stack: give {READER_ADVICE}")
    return AnswerHead(answers, state_width(base)).to(adapted.device)


def pooled_state(adapted: AdaptedModel, language: Language, batch: Batch, token_map: TokenMap) -> Tensor:
    """[B, D]: the last layer's state of each row's first word (BERT's CLS) where words read both ways, of its last token where they read back."""
    stack: Any = adapted.base.get_submodule(adapted.anatomy.stack)
    is_causal = adapted.anatomy.attention == "causal"
    options = {"use_cache": False} if is_causal else {}
    with adapted.attachment.bind(token_map):
        output = stack(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position + language.first_position, **options)
    order = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    place = ((batch.domain != PAD) * order).argmax(1) if is_causal else (batch.domain == TEXT).long().argmax(1)
    state: Tensor = output.last_hidden_state
    return torch.take_along_dim(state, place[:, None, None], 1)[:, 0]


def answer_loss(head: AnswerHead, state: Tensor, batch: Batch) -> Tensor:
    """float []: binary cross entropy with the answers' scores, summed over answers and rows, divided by `batch.n_targets`.

    Raises ConfigError for a batch of texts to write.
    """
    if batch.score is None:
        raise ConfigError("a head chooses this model's answers, and the batch holds texts to write: make its rows with model.row_encoder()")
    logits = head(state)
    is_target = batch.target != NO_TARGET
    wanted = torch.zeros_like(logits).scatter_add(1, batch.target.where(is_target, 0), batch.score.where(is_target, 0.0).to(logits.dtype))
    return nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / batch.n_targets


def chosen_answers(heads: Sequence[AnswerHead | None], state: Tensor) -> list[str]:
    """Each row's answer, by its own adapter's head. Raises ConfigError where some rows have a head and others write."""
    if None in heads:
        raise ConfigError(f"{heads.count(None)} of {len(heads)} rows write their answer, and the others' adapters choose it: ask them apart")
    different = list(dict.fromkeys(head for head in heads if head is not None))
    best = torch.stack([head(state).argmax(-1) for head in different]).tolist()  # of every row, by each head: the device is waited for once
    return [head.answers[best[different.index(head)][i]] for i, head in enumerate(heads) if head is not None]


def save_head(folder: Path, head: AnswerHead) -> None:
    """Write the head and its answers into an adapter's folder."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in head.named_parameters()}
    write_whole(folder / HEAD_FILE, save(tensors, metadata={"format": "pt"}))
    write_whole(folder / ANSWERS_FILE, (json.dumps(list(head.answers), ensure_ascii=False, indent=0) + "\n").encode())


def load_head(folder: Path, adapted: AdaptedModel, n_answers: int) -> AnswerHead:
    """The head of an adapter's folder. Strict: raises CheckpointError where answers and weights are missing, damaged, or do not fit together.

    n_answers: what the adapter's config says.
    """
    try:
        answers = json.loads((folder / ANSWERS_FILE).read_bytes())
        stored = load_file(folder / HEAD_FILE)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the adapter in {folder} chooses its answers, and they cannot be read ({error}): copy or train it again") from None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not len(set(answers)) == len(answers) == n_answers:
        what = f"{len(answers)} entries" if isinstance(answers, list) else f"a {type(answers).__name__}"
        raise CheckpointError(f"{folder / ANSWERS_FILE} holds {what}, expected {n_answers} different answers: was it changed by hand?")
    head = new_head(adapted, answers)
    wanted = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    if (found := {name: tuple(tensor.shape) for name, tensor in stored.items()}) != wanted:
        raise CheckpointError(f"{folder / HEAD_FILE} holds {found}, and a head of {n_answers} answers on this model is {wanted}")
    head.load_state_dict(stored)
    return head
