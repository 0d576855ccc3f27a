"""Answers chosen among a vocabulary: a trained head over the pooled state of the frozen language model, which reads image and question.

    model = VisionLanguageModel.compose("timm:...", "google-bert/bert-base-uncased", template=template, use="read")
    model.add_adapter("vqa", methods)
    model.add_answer_head(vocabulary.answers)

The head learns the score that each answer would get (binary cross entropy with soft scores, as the field trains VQAv2), which one answer is right
(softmax; with the method WARP the answer of the most people), or a number (squared error); the prediction is the answer of the highest score, or the
number. A head belongs to one adapter, and lies in its
folder: `answers.json` and `answer_head.safetensors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink import PAD, TEXT, WARP, AdaptedModel, Method, TokenMap
from adalink.anatomy import setting
from adalink.edit import weight_of
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from adalink.tokens import uploaded
from multimodal.batches.collate import NO_TARGET, Batch, collate
from multimodal.batches.packing import arrangement, separate_rows
from multimodal.batches.tokenize import Row, RowEncoder
from multimodal.language import READER_ADVICE, Language, LanguageUse

__all__ = [
    "AnswerHead", "HeadLoss", "LabelWords", "ScoreBy", "answer_loss", "chosen_answers", "chosen_words", "load_head", "new_head", "pooled_state",
    "save_head", "state_width", "use_for", "warp_of", "word_scores", "word_tokens",
]  # fmt: skip

ANSWERS_FILE, HEAD_FILE = "answers.json", "answer_head.safetensors"


HeadLoss = Literal["binary", "softmax", "squared"]
_LOSSES: Mapping[str, tuple[str, str]] = {  # name and unit
    "binary": ("binary cross entropy", "nats per question"), "softmax": ("cross entropy", "nats per question"),
    "squared": ("squared error", "squares per question"),
}  # fmt: skip


class AnswerHead(nn.Module):
    """Scores of A answers from a pooled state: one linear.

    answers: the text of each output. warp: the method whose verbaliser it is, None for a head that learns by `loss`.
    Raises ConfigError for no answers, or one of them twice; for WARP also where letters alone tell two apart, or there is one.
    """

    def __init__(self, answers: Sequence[str], width: int, warp: WARP | None = None, loss: HeadLoss = "binary") -> None:
        super().__init__()
        if not answers or len(set(answers)) < len(answers):
            raise ConfigError(f"a head was given {len(answers)} answers, {len(set(answers))} of them different: give one or more, each once")
        self.answers = tuple(answers)
        self.linear, self.warp = nn.Linear(width, len(answers)), warp
        self.loss: HeadLoss = loss if warp is None else "softmax"
        if warp is None:
            nn.init.constant_(self.linear.bias, -math.log(len(answers)))  # at the start about one of the answers is right, not half of them
            return
        _check_list(answers)
        if warp.verbaliser == "fixed":
            for name, parameter in list(self.linear.named_parameters()):
                delattr(self.linear, name)
                self.linear.register_buffer(name, parameter.detach())

    @property
    def loss_name(self) -> tuple[str, str]:
        """What it learns by and in which unit, for logs and reports."""
        return _LOSSES[self.loss]

    @torch.no_grad()
    def start_from(self, base: Any, pieces: Sequence[Sequence[int]]) -> None:
        """Make the scores those that the language model gives the answers' words: of each answer the mean of the rows of its pieces, bias and all.

        Raises ConfigError for an answer without pieces, and where the rows are not as wide as the states.
        """
        if empty := [answer for answer, ids in zip(self.answers, pieces, strict=True) if not ids]:
            raise ConfigError(f"the answer {empty[0]!r} has no pieces of words with this tokenizer: leave it out of the list")
        head = base.get_output_embeddings() or base.get_input_embeddings()
        rows, bias = weight_of(head, "weight"), None if getattr(head, "bias", None) is None else weight_of(head, "bias")
        if rows.shape[1] != self.linear.in_features:
            raise ConfigError(
                f"the words of {type(base).__name__} are of width {rows.shape[1]}, and its states of width {self.linear.in_features}: give WARP's verbaliser "
                "new, or a model whose head scores words"
            )
        for number, ids in enumerate(pieces):
            self.linear.weight[number] = rows[list(ids)].to(self.linear.weight.dtype).mean(0)
            self.linear.bias[number] = 0 if bias is None else bias[list(ids)].to(self.linear.bias.dtype).mean()

    def forward(self, state: Tensor) -> Tensor:
        """[B, D] -> logits [B, A], in the dtype of the head's weights."""
        logits: Tensor = self.linear(state.to(self.linear.weight.dtype))
        return logits


def warp_of(methods: Mapping[str, Method]) -> WARP | None:
    """The WARP among an adapter's methods."""
    return next((method for method in methods.values() if isinstance(method, WARP)), None)


def _check_list(answers: Sequence[str]) -> None:
    """Raise ConfigError for answers that WARP cannot choose among."""
    if len(answers) == 1:
        raise ConfigError(f"WARP was given one answer, {answers[0]!r}, so there is nothing to choose: give two or more")
    known: dict[str, str] = {}
    for answer in answers:
        if (other := known.setdefault(" ".join(answer.lower().split()), answer)) is not answer:
            raise ConfigError(f"the answers {other!r} and {answer!r} differ in capitals and spaces alone: leave one of them out")


def use_for(task: Mapping[str, Any]) -> LanguageUse:
    """What the language model of a saved adapter is for, from what its config says of its task."""
    return "read" if task.get("answers") else "write"


def state_width(model: Any) -> int:
    """D of the pooled state: what the model's own head reads, where it has one."""
    head = model.get_output_embeddings()
    return int(setting(model.config, "hidden_size") if head is None else head.weight.shape[1])


def new_head(
    adapted: AdaptedModel, answers: Sequence[str], methods: Mapping[str, Method], pieces_of: Callable[[str], Sequence[int]] | None = None,
    loss: HeadLoss = "binary",
) -> AnswerHead:
    """A head for the state of this model. Raises ConfigError for an encoder-decoder model, and as `AnswerHead` and its `start_from`.

    methods: of its adapter. pieces_of: an answer's tokens, from which WARP's head starts; None for a head that is loaded.
    """
    base: Any = adapted.base
    if base.config.is_encoder_decoder:
        raise ConfigError(f"{type(base).__name__} is an encoder-decoder, and a head chooses an answer from one stack: give {READER_ADVICE}")
    head = AnswerHead(answers, state_width(base), warp_of(methods), loss)
    if pieces_of is not None and head.warp is not None and head.warp.verbaliser != "new":
        head.start_from(base, [pieces_of(answer) for answer in head.answers])
    return head.to(adapted.device)


def pooled_state(adapted: AdaptedModel, language: Language, batch: Batch, token_map: TokenMap) -> Tensor:
    """[B, D]: the last layer's state of one token of each row: of the last slot after the text, where the row's adapter has some there.

    Elsewhere of the first word (BERT's CLS) where words read both ways, and of the last token where they read back, or the adapter is WARP's.
    """
    stack: Any = adapted.base.get_submodule(adapted.anatomy.stack)
    is_causal = adapted.anatomy.attention == "causal"
    options: dict[str, Any] = {"use_cache": False} if is_causal else {}
    if batch.kind is not None:
        options["token_type_ids"] = batch.kind
    with adapted.attachment.bind(token_map):
        output = stack(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position + language.first_position, **options)
    read = _read_slots(adapted, token_map)
    order = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    last, first = ((batch.domain != PAD) * order).argmax(1), (batch.domain == TEXT).long().argmax(1)
    is_slot = (token_map.domain == read[:, :1]) & (token_map.ordinal == read[:, 1:2])
    place = torch.where(is_slot.any(1), is_slot.long().argmax(1), torch.where(read[:, 2] == 1, last, last if is_causal else first))
    state: Tensor = output.last_hidden_state
    return torch.take_along_dim(state, place[:, None, None], 1)[:, 0]


def _read_slots(adapted: AdaptedModel, token_map: TokenMap) -> Tensor:
    """int64 [B, 3]: domain and ordinal of the slot that each row is read at, -2 where there is none, and whether its last token is read then."""
    found: dict[int, list[int]] = {}
    for name, index in adapted.indices.items():
        adapter: Any = adapted.adapters[name]
        after = [slot.domain for slot in adapter.slots if slot.place == "after_text" and slot.count]
        count = sum(slot.count for slot in adapter.slots if after and slot.domain == after[-1])
        found[index] = [after[-1] if after else -2, count - 1, int(adapter.chooses)]
    indices = token_map.row.tolist() if token_map.indices is None else token_map.indices
    return uploaded([found.get(index, [-2, 0, 0]) for index in indices], token_map.row.device)


def answer_loss(head: AnswerHead, state: Tensor, batch: Batch) -> Tensor:
    """float []: the head's loss with the answers' scores, summed over answers and rows, divided by `batch.n_targets`.

    Of WARP's head: cross entropy of each row's answer of the highest score, the first of them; rows without an answer in the list teach nothing.
    Raises ConfigError for a batch of texts to write.
    """
    if batch.score is None:
        raise ConfigError("a head chooses this model's answers, and the batch holds texts to write: make its rows with model.row_encoder()")
    logits = head(state)
    is_target = batch.target != NO_TARGET
    if head.warp is not None:
        score, target = nn.functional.pad(batch.score.where(is_target, -1.0), (0, 1), value=-1.0), nn.functional.pad(batch.target, (0, 1), value=NO_TARGET)
        best = target.gather(1, score.argmax(1, keepdim=True))[:, 0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, best, ignore_index=NO_TARGET, reduction="sum") / batch.n_targets
    wanted = torch.zeros_like(logits).scatter_add(1, batch.target.where(is_target, 0), batch.score.where(is_target, 0.0).to(logits.dtype))
    if head.loss == "softmax":
        return nn.functional.cross_entropy(logits, wanted, reduction="sum") / batch.n_targets
    if head.loss == "squared":
        return ((logits - wanted).square() * is_target.any(1, keepdim=True)).sum() / batch.n_targets
    return nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / batch.n_targets


def chosen_answers(heads: Sequence[AnswerHead | None], state: Tensor) -> list[str]:
    """Each row's answer, by its own adapter's head; of one that learns by squared error its number, in full.

    Raises ConfigError where some rows have a head and others write.
    """
    if None in heads:
        raise ConfigError(f"{heads.count(None)} of {len(heads)} rows write their answer, and the others' adapters choose it: ask them apart")
    different = list(dict.fromkeys(head for head in heads if head is not None))
    scores = [head(state) for head in different]
    best = torch.stack([one[:, 0].double() if head.loss == "squared" else one.argmax(-1).double() for head, one in zip(different, scores, strict=True)])
    found = dict(zip(different, best.tolist(), strict=True))  # of every row, by each head: the device is waited for once
    return [repr(found[head][i]) if head.loss == "squared" else head.answers[int(found[head][i])] for i, head in enumerate(heads) if head is not None]


def save_head(folder: Path, head: AnswerHead) -> None:
    """Write the head and its answers into an adapter's folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_whole(folder / HEAD_FILE, save(tensors, metadata={"format": "pt"}))
    write_whole(folder / ANSWERS_FILE, (json.dumps(list(head.answers), ensure_ascii=False, indent=0) + "\n").encode())


def load_head(folder: Path, adapted: AdaptedModel, task: Mapping[str, Any], methods: Mapping[str, Method]) -> AnswerHead:
    """The head of an adapter's folder. Strict: raises CheckpointError where answers and weights are missing, damaged, or do not fit together.

    task, methods: what the adapter's config says.
    """
    n_answers: int = task["answers"]
    try:
        answers = json.loads((folder / ANSWERS_FILE).read_bytes())
        stored = load_file(folder / HEAD_FILE)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the adapter in {folder} chooses its answers, and they cannot be read ({error}): copy or train it again") from None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not len(set(answers)) == len(answers) == n_answers:
        what = f"{len(answers)} entries" if isinstance(answers, list) else f"a {type(answers).__name__}"
        raise CheckpointError(f"{folder / ANSWERS_FILE} holds {what}, expected {n_answers} different answers: was it changed by hand?")
    head = new_head(adapted, answers, methods, loss=task.get("head_loss", "binary"))
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if (found := {name: tuple(tensor.shape) for name, tensor in stored.items()}) != wanted:
        raise CheckpointError(f"{folder / HEAD_FILE} holds {found}, and a head of {n_answers} answers on this model is {wanted}")
    head.load_state_dict(stored)
    return head


# ----------------------------------------
# A class chosen by its word: each label is scored as the text that the frozen model would write after the prompt, and the most probable one wins.


ScoreBy = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class LabelWords:
    """The words of the classes, and how their tokens' log-probabilities become one score: their sum, or their mean, which favours no short word.

    Raises ConfigError for fewer than two words, or one twice.
    """

    words: tuple[str, ...]
    by: ScoreBy = "sum"

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise ConfigError(f"the label words are {', '.join(self.words) or 'none'}: give two or more, each once")


def word_tokens(encoder: RowEncoder, labels: LabelWords) -> list[tuple[int, ...]]:
    """The tokens of each label. Raises ConfigError for one without a token, or with an unknown one."""
    targets = [encoder.target_ids(word) for word in labels.words]
    if wrong := [word for word, ids in zip(labels.words, targets, strict=True) if not ids or encoder.tokenizer.unk_token_id in ids]:
        raise ConfigError(f"the label word {wrong[0]!r} has no token of its own in this model's vocabulary: give another word in text.labels")
    return targets


@torch.no_grad()
def word_scores(model: Any, prompts: Sequence[Row], labels: LabelWords, adapter: str | None, *, packed: bool = True) -> Tensor:
    """float64 [B, K]: each label's score after each prompt, log p(tokens | prompt).

    model    a `multimodal.model.VisionLanguageModel` without an encoder
    prompts  rows of the adapter's row encoder
    packed   the prompt once, in one row with its K labels, where the model and the adapter read such a row exactly; else a row for each

    Raises ConfigError for a label without a token or with an unknown one, TextTooLong for one that the model has no positions for.
    """
    encoder = model.row_encoder(adapter)
    targets = word_tokens(encoder, labels)
    edits = None if adapter is None else model.adapted.adapters[adapter]
    arrange = arrangement(model.language.model, edits)[0] if packed else separate_rows
    rows = [list(arrange([encoder.answered(prompt, word) for word in labels.words])) for prompt in prompts]
    flat = [row for of_prompt in rows for row in of_prompt]
    batch = collate(
        flat, [number for number, of_prompt in enumerate(rows) for _ in of_prompt], torch.zeros(len(rows), 0, 0), kind="patches", side="right",
        pad_id=encoder.placeholder,
    ).to(model.device)  # fmt: skip
    losses = model.language_loss.of_targets(batch, model.token_map(batch, [adapter] * len(flat))).double()
    if len(flat) == len(prompts):  # the targets of all labels, one after the other
        sums = torch.stack([part.sum(1) for part in losses.split([len(ids) for ids in targets], 1)], 1)
    else:
        sums = losses.sum(1).view(len(prompts), len(targets))
    return -sums / torch.tensor([len(ids) if labels.by == "mean" else 1 for ids in targets], device=sums.device)


def chosen_words(model: Any, batch: Batch, names: Sequence[str | None], labels: Sequence[LabelWords | None]) -> list[str]:
    """Each row's label of the highest score, by its own adapter. batch: left-padded prompts; labels: of each row.

    Raises ConfigError where some rows have label words and others write, and as `word_scores`.
    """
    if None in labels:
        raise ConfigError(f"{labels.count(None)} of {len(labels)} rows write their answer, and the others' adapters choose a word: ask them apart")
    prompts = _prompts_of(batch)
    found = [""] * len(prompts)
    for name in dict.fromkeys(names):
        own = [number for number, one in enumerate(names) if one == name]
        chosen = labels[own[0]]
        assert chosen is not None
        best = word_scores(model, [prompts[number] for number in own], chosen, name).argmax(1).tolist()
        for number, label in zip(own, best, strict=True):
            found[number] = chosen.words[label]
    return found


def _prompts_of(batch: Batch) -> list[Row]:
    """The rows that a batch of prompts was padded from."""
    pairs = zip(batch.ids.tolist(), batch.domain.tolist(), strict=True)
    known = [[(token, domain) for token, domain in zip(*pair, strict=True) if domain != PAD] for pair in pairs]
    return [Row(tuple(token for token, _ in row), tuple(domain for _, domain in row)) for row in known]
