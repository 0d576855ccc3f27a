"""Prompt tuning (Lester et al., arXiv 2104.08691): trained vectors in slots of their own, at the start of the row, before its words or after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.attachment.slots import without_positions
from adalink.edit import EMBEDDING, SLOT_PLACES, Method, Placement, SlotPlace, Slots, weight_of
from adalink.errors import ConfigError
from adalink.tokens import PROMPT, Tokens

__all__ = ["Prompt", "Table", "check_words", "worded"]


class Table(nn.Module):
    """Writes the vector of a slot's ordinal, whatever the slot held. layers: what the vectors pass first, None for nothing."""

    def __init__(self, length: int, width: int, std: float, layers: nn.Sequential | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * std)
        self.layers = layers

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        vectors: Tensor = self.table if self.layers is None else self.layers(self.table)
        return tokens.looked_up(vectors)

    @torch.no_grad()
    def from_words(self, method: Any, anatomy: Anatomy) -> Self:
        """The table, started from the frozen embeddings of the words that a method names; as it was drawn where it names none, and in a plan.

        Raises ConfigError where the words have no ids, or the ids do not fit the table or the model.
        """
        if self.table.is_meta or not (method.words or method.ids):
            return self
        if not method.ids:
            raise ConfigError(
                f"a prompt starts from the words {method.words!r}, and a bare model has no tokenizer: add it to a VisionLanguageModel, or give their `ids`"
            )
        if len(method.ids) != len(self.table):
            raise ConfigError(f"the prompt's ids are those of {len(method.ids)} words, and it has {len(self.table)} slots: give ids for each slot")
        if anatomy.words.module is None:
            raise ConfigError("a prompt starts from words, and an encoder of images has none: leave words and ids out there")
        if (highest := max(max(one) for one in method.ids)) >= anatomy.vocabulary:
            raise ConfigError(f"the prompt's ids go up to {highest}, and the model has {anatomy.vocabulary} words: give ids of this model's tokenizer")
        weight, scale = weight_of(anatomy.words.module, "weight"), getattr(anatomy.words.module, "embed_scale", None)
        for slot, ids in enumerate(method.ids):
            pieces = weight[list(ids)]
            pieces = pieces if scale is None else pieces * torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)
            self.table[slot] = pieces.to(torch.promote_types(weight.dtype, torch.float32)).mean(0)
        return self


def check_words(method: Any, owner: str) -> None:
    """In the __post_init__ of a method that starts from `words` or `ids`: make lists tuples. Raises ConfigError for what is neither."""
    words = method.words if isinstance(method.words, str) else tuple(method.words)
    ids = tuple((one,) if isinstance(one, int) else tuple(one) for one in method.ids)
    if not isinstance(words, str) and not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{owner} words are {list(words)}: give one text, or a list of one word for each slot")
    if not all(one and all(isinstance(id, int) and id >= 0 for id in one) for one in ids):
        raise ConfigError(f"{owner} ids are {[list(one) for one in ids]}: give for each slot one id of 0 or more, or several whose mean it starts as")
    object.__setattr__(method, "words", words)
    object.__setattr__(method, "ids", ids)


def worded(method: Method, ids_of: Callable[[str], Sequence[int]]) -> Method:
    """The method with the ids of its words, and those inside it likewise; itself where nothing starts from words.

    A text is cut, or repeated, to the number of slots. Of a list each word has one slot, which starts as the mean of the word's pieces.
    ids_of: what the model's tokenizer makes of a text, without special tokens. Raises ConfigError for words that do not fit.
    """
    found: Any = method
    values: dict[str, Any] = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)} if dataclasses.is_dataclass(method) else {}
    changed = {name: worded(value, ids_of) for name, value in values.items() if hasattr(value, "place")}
    if values.get("words") and not values["ids"]:
        changed["ids"] = _ids(found.words, found.length, ids_of)
    return dataclasses.replace(found, **changed) if changed else method


def _ids(words: tuple[str, ...] | str, n_slots: int, ids_of: Callable[[str], Sequence[int]]) -> Any:
    """tuple[tuple[int, ...], ...]: of each slot."""
    pieces = [tuple(ids_of(word)) for word in words] if isinstance(words, tuple) else [(id,) for id in ids_of(words)]
    if not all(pieces) or not pieces:
        raise ConfigError(f"a prompt starts from {words!r}, and the tokenizer makes nothing of it, or of a word of it: give other words")
    if isinstance(words, tuple) and len(words) != n_slots:
        raise ConfigError(f"a prompt of {n_slots} slots has a list of {len(words)} words: give one for each slot, or one text, which is cut or repeated")
    return tuple(pieces[i % len(pieces)] for i in range(n_slots))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Soft tokens where the word embeddings are: before `project_in` in a model that has one (OPT-350M).

    form        table   the vectors themselves (ePALM_pt-L)
                mlp     table -> Linear(D, D) -> tanh -> Linear(D, D), trained with it (ePALM)
    positions   counted   the slots are tokens like others, and what follows them starts S positions later
                none      as released with eP-ALM: the text starts at 0, and the slots have no position (see EPALM for each kind of model)
    """

    length: int  # S; 10 in eP-ALM, 20 to 100 elsewhere
    init_std: float = 0.02  # of the normal start: 1.0 in eP-ALM, about 0.02 (the word embeddings' own) elsewhere
    form: Literal["table", "mlp"] = "table"
    positions: Literal["counted", "none"] = "counted"
    at: SlotPlace = "start"  # before the image; between it and the words (before_text); between question and answer (after_text)
    words: tuple[str, ...] | str = ()  # a text whose embeddings the vectors start as, cut or repeated; or a list of a word for each
    ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)  # what a tokenizer makes of `words`, or in their place

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.length < 1:
            raise ConfigError(f"the prompt's length is {self.length}: give 1 or more")
        if self.init_std < 0:
            raise ConfigError(f"the prompt's init_std is {self.init_std}: give 0 or more")
        if self.form not in ("table", "mlp"):
            raise ConfigError(f"the prompt's form is {self.form!r}: give table or mlp")
        if self.positions not in ("counted", "none"):
            raise ConfigError(f"the prompt's positions are {self.positions!r}: give counted or none")
        if self.at not in SLOT_PLACES:
            raise ConfigError(f"the prompt is at {self.at!r}: give {', '.join(SLOT_PLACES[:-1])} or {SLOT_PLACES[-1]}")
        if self.at != "start" and self.positions == "none":
            raise ConfigError(f"the prompt is at {self.at} with positions none, and only slots at the start can be left out of the count: give counted")
        check_words(self, "the prompt's")
        if self.form == "mlp" and (self.words or self.ids):
            raise ConfigError("the prompt's form is mlp, whose vectors are made by a network, and it starts from words: give form table, or no words")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector."""
        return (Slots(PROMPT, self.length, self.at),)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One table, at the embedding. Raises ConfigError for words that have no ids."""
        width = anatomy.width
        layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) if self.form == "mlp" else None
        soft = Placement("soft", EMBEDDING, Table(self.length, width, self.init_std, layers).from_words(self, anatomy), (PROMPT,))
        return [soft, *(without_positions(anatomy, (PROMPT,)) if self.positions == "none" else ())]
