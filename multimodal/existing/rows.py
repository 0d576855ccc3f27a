"""Texts to rows of an existing model: the ids that its own processor makes of the same conversation, and what stands at each of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from adalink import ANSWER, IMAGE, TEXT, Slots
from adalink.errors import AdalinkError, ConfigError, DataError
from multimodal.batches.prepared import NO_IMAGE, Prepared
from multimodal.batches.tokenize import Row, TextTokens, TextTooLong, slots_at
from multimodal.existing.conversation import Prompt, Turn, asked_turns, text_of, user_turn, worded
from multimodal.existing.words import GRIDS, Processor, first_line
from multimodal.language import Language
from multimodal.sample import counted
from multimodal.template import Template, Text

__all__ = ["Blocks", "ConversationRows", "Positions", "positions_of"]

Blocks = Literal["", "images", "prompts"]
"""Which tokens read later ones: none, those of one image (Gemma 3), all of a prompt (PaliGemma)."""

# ----------------------------------------
# Positions in time, height and width (M-RoPE), as the model's own code counts them.


class Positions:
    """A model's `get_rope_index` without its weights, so that worker processes can hold it."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = copy.copy(owner)
        self._owner.__dict__ = {name: value for name, value in vars(owner).items() if "hook" not in name}
        for name, value in vars(nn.Module()).items():
            if name not in ("training",):
                self._owner.__dict__[name] = copy.copy(value)
        self._takes = frozenset(inspect.signature(type(owner).get_rope_index).parameters)  # type: ignore[attr-defined]

    def of(self, ids: Sequence[int], image_ids: frozenset[int], grids: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
        """Time, height and width of each token of a row with these images."""
        row = torch.tensor([ids])
        arguments: Mapping[str, Any] = {
            "input_ids": row,
            "mm_token_type_ids": torch.tensor([[int(id in image_ids) for id in ids]]),
            **dict.fromkeys(GRIDS, torch.cat(list(grids)) if grids else None),
            "attention_mask": torch.ones_like(row),
        }
        owner: Any = self._owner
        places = owner.get_rope_index(**{name: value for name, value in arguments.items() if name in self._takes})[0]
        return tuple(zip(*places[:, 0].tolist(), strict=True))


def positions_of(model: nn.Module) -> Positions | None:
    """How a model counts positions in several dimensions; None where it counts tokens."""
    owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    return None if owner is None else Positions(owner)


# ----------------------------------------
# Rows.


class ConversationRows:
    """Makes the rows of one adapter: its words as the model's chat template wraps them, after the slots that it reserves.

    Pickles without any weights. A `multimodal.batches.tokenize.RowEncoder` for models that have a processor of their own.
    """

    reads_images = True

    def __init__(
        self, template: Template, language: Language, processor: Processor, positions: Positions | None, slots: Sequence[Slots], blocks: Blocks = ""
    ) -> None:
        if any(slot.domain == IMAGE and slot.count for slot in slots):
            raise ConfigError("an adapter with a bridge brings images into a language model, and this model has a connector of its own: leave the bridge out")
        self.template, self.processor, self.positions, self.blocks = template, processor, positions, blocks
        self.name, self.tokenizer = language.name, language.tokenizer
        self.max_positions = language.max_positions
        self.end_ids, self.placeholder = language.end_ids, int(language.tokenizer.pad_token_id)
        self.slots = slots_at(slots)
        self.n_answers = 0
        self._ignored: dict[str, bool] = {}
        self._tokens = TextTokens(language.tokenizer)

    @property
    def reads_turns(self) -> bool:
        """Whether system messages, earlier turns and texts of the user's are read: there is a chat template, and the adapter's asks a question."""
        return self.processor.has_chat and not self.template.raw and "{question}" in self.template.prompt

    def prompt(self, question: Prompt, images: object = None) -> Row:
        """The row that a text is generated from; images: a Prepared, of all turns, or None. Raises TextTooLong, DataError, ConfigError.

        question: one, or the turns of a conversation, whose system message then stands in the place of the template's. A template without
        {question} is about the images alone.
        """
        images = images if isinstance(images, Prepared) else NO_IMAGE
        ids, kinds = self._prompt(question, images)
        return self._row(ids, kinds, len(ids), images, question if isinstance(question, str) else text_of(question[-1]))

    def row(self, text: Text, images: object = None) -> Row:
        """The training row of a text; a text without a target is a prompt. images: as in `prompt`, and it raises the same."""
        images = self._read(text, images if isinstance(images, Prepared) else NO_IMAGE)
        if text.turns and not self.reads_turns:
            raise ConfigError(f"a text has earlier turns, and '{self.name}' reads them where it has a chat template and the prompt has {{question}}")
        has_turns = self.reads_turns and (text.turns or text.places is not None)
        ids, kinds = self._prompt(asked_turns(text, len(images.wording)) if has_turns else text.question, images)
        if text.target is None:
            return self._row(ids, kinds, len(ids), images, text.question)
        target = self._target(text, ids, images)
        # The last token of the target is only ever predicted, so it is not read.
        answer_kind = int(self.processor.marks_answers)
        return self._row(ids + target[:-1], kinds + [answer_kind] * (len(target) - 1), len(ids), images, text.question + text.target, target)

    def _read(self, text: Text, images: Prepared) -> Prepared:
        """The images of a sample that a text reads. Raises ConfigError where there are fewer than it has places for."""
        if text.places is None:
            return images
        if len(text.places) > len(images.wording):
            n_places = counted(len(text.places), "image")
            raise ConfigError(f"a text has places for {n_places}, and its sample has {len(images.wording)}: give each image of the text")
        return images.first(len(text.places))

    def _block(self, domain: Sequence[int]) -> tuple[int, ...]:
        """Which tokens of a row read each other; images that follow each other without a token between are one."""
        if self.blocks == "prompts":
            return tuple(-1 if one == ANSWER else 0 for one in domain)
        if self.blocks == "images":
            number = accumulate(int(one == IMAGE and before != IMAGE) for before, one in pairwise((TEXT, *domain)))
            return tuple(n if one == IMAGE else -1 for n, one in zip(number, domain, strict=True))
        return ()

    def _prompt(self, question: Prompt, images: Prepared) -> tuple[list[int], list[int]]:
        n = len(images.wording)
        if n > 1 and not self.processor.prepares_apart:
            raise ConfigError(f"'{self.name}' prepares an image among several in another way than alone, and here each is prepared alone: ask about one image")
        if "{question}" not in self.template.prompt and not isinstance(question, str):
            question = ""
        if self.template.raw or not self.processor.has_chat:
            question = question if isinstance(question, str) else self._only_question(question)
            text = self.template.prompt.replace("<bos>", "").replace("<eos>", "").replace("<image>", self.processor.marks(n))
            if any(spelling in question for spelling in self.processor.spellings):
                raise DataError(f"the question {question[:60]!r} spells a token of the model's own, and its processor would take it as that: ask without it")
            return self.processor.ids(text.replace("{question}", question), images)
        turns = [user_turn(question, n)] if isinstance(question, str) else list(question)
        own = [] if turns[0]["role"] == "system" else self._system()
        if ignored := next((turn["role"] for turn in turns[:-1] if self._ignores(turn["role"])), None):
            raise ConfigError(f"the chat template of '{self.name}' leaves out the turns of the {ignored}: ask without them")
        try:
            return self.processor.ids([*own, *(worded(turn, self.template) for turn in turns)], images)
        except (ConfigError, TemplateError) as error:
            raise ConfigError(f"'{self.name}' cannot read this prompt about {counted(n, 'image')}: {error}") from None

    def _ignores(self, role: str) -> bool:
        """Whether the chat template leaves out an earlier turn of this role without a word; one that refuses it says so by itself."""
        if role not in self._ignored:
            last = [user_turn("a", 0)]
            turn = {"role": role, "content": [{"type": "text", "text": "b"}]}
            before = [user_turn("c", 0), turn] if role == "assistant" else [turn]
            try:
                self._ignored[role] = role != "user" and self.processor.ids([*before, *last], NO_IMAGE) == self.processor.ids([*before[:-1], *last], NO_IMAGE)
            except (AdalinkError, TemplateError):
                self._ignored[role] = False
        return self._ignored[role]

    def _only_question(self, turns: Sequence[Turn]) -> str:
        """Of a conversation that is one question. Raises ConfigError for another one."""
        if len(turns) > 1:
            why = "the adapter's template is raw" if self.processor.has_chat else "the model has no chat template"
            raise ConfigError(f"'{self.name}' reads one question and not a conversation of {len(turns)} turns, since {why}: ask without the turns before it")
        return text_of(turns[0])

    def _target(self, text: Text, prompt: list[int], images: Prepared) -> list[int]:
        """What the assistant's turn holds after its first tokens, which mark it, up to the token that ends it."""
        target = str(text.target)
        wording = self.template.target.replace("<eos>", "")
        if self.processor.has_chat and not self.template.raw:
            turn = {"role": "assistant", "content": [{"type": "text", "text": wording.replace("{text}", target)}]}
            asked = [worded(one, self.template) for one in asked_turns(text, len(images.wording))]
            own = [] if asked[0]["role"] == "system" else self._system()
            whole, _ = self.processor.ids([*own, *asked, turn], images, ends=True)
            if whole[: len(prompt)] == prompt:
                rest = whole[len(prompt) :]
                end = next((i for i, id in enumerate(rest) if id in self.end_ids), None)
                return [*rest, self.end_ids[0]] if end is None else rest[: end + 1]
        return [*self._tokens.ids(tuple(wording.split("{text}")), target), self.end_ids[0]]

    def _system(self) -> list[Turn]:
        return [{"role": "system", "content": [{"type": "text", "text": self.template.system}]}] if self.template.system else []

    def _places(self, ids: Sequence[int], images: Prepared) -> tuple[tuple[int, int, int], ...]:
        """Raises ConfigError for a row without the tokens by which the model finds its images."""
        assert self.positions is not None
        try:
            return self.positions.of(ids, self.processor.image_ids, images.grids)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ConfigError(
                f"'{self.name}' finds no positions for the images of a row: does the template write the tokens around an image? ({first_line(error)})"
            ) from None

    def _row(self, ids: list[int], kinds: list[int], n_prompt: int, images: Prepared, text: str, target: Sequence[int] = ()) -> Row:
        places = [i for i, id in enumerate(ids[:n_prompt]) if id in self.processor.image_ids]
        vector, domain = [-1] * len(ids), [TEXT] * n_prompt + [ANSWER] * (len(ids) - n_prompt)
        for number, i in enumerate(places):
            vector[i], domain[i] = number, IMAGE
        whole, n_answer = list(ids), len(ids) - n_prompt
        for at, slots in ((n_prompt, self.slots["after_text"]), (places[-1] + 1 if places else 0, self.slots["before_text"]), (0, self.slots["start"])):
            for values, filler in ((whole, [self.placeholder]), (kinds, [0]), (vector, [-1])):
                values[at:at] = filler * len(slots)
            domain[at:at] = slots
        if self.max_positions is not None and len(whole) > self.max_positions:
            raise TextTooLong(
                f"a text needs {len(whole)} tokens with its images, and the language model has {self.max_positions} positions: shorten it ({text[:60]!r}...)"
            )
        n_seen = len(places)
        if n_seen < images.n_vectors and len(images.wording) > 1:
            raise ConfigError(
                f"'{self.name}' cannot read {len(images.wording)} images in one conversation: its template has places for {n_seen} of their "
                f"{images.n_vectors} tokens; ask about fewer images"
            )
        if n_seen != images.n_vectors:
            raise DataError(f"the row has {n_seen} image tokens for {images.n_vectors} vectors of its images: was the processor made for another model?")
        assert n_answer == max(len(target) - 1, 0)
        first = len(whole) - n_answer - 1
        rope = () if self.positions is None else self._places(whole, images)
        source = tuple(range(first, first + len(target)))
        return Row(
            tuple(whole), tuple(domain), source, tuple(target), vector=tuple(vector), kind=tuple(kinds), block=self._block(domain), rope=rope
        )  # fmt: skip
