"""WARP, word-level adversarial reprogramming (arXiv 2101.00121): trained vectors among the words, and a score for each answer of a closed list.

    scores = V state + b        V [A, D], one row for each answer; state [D], what the model's head would read at the last slot
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from adalink.anatomy import Anatomy
from adalink.edit import EMBEDDING, SLOT_PLACES, Placement, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.prompts.prompt import Table, check_words
from adalink.tokens import OTHER, PERCEPT, PROMPT

__all__ = ["WARP"]


@dataclass(frozen=True, kw_only=True)
class WARP:
    """Soft tokens at three places of a row, whose model chooses among answers: with `vqa.answers`, or `add_answer_head`. It writes nothing.

    The state is read at the last slot before the answer, or at the prompt's last token where there is none. It is as wide as what the model's head
    reads: in OPT-350M 512, after its project_out, and not the 1,024 of its layers. The vectors are one table, in the
    order of the row. Its loss is the cross entropy of the answer that most people gave.

    verbaliser  words   V starts as the vectors that the model scores the answers' words by (the mean of an answer's pieces) and is trained
                fixed   V is that, and is not trained: answers of one piece have the scores that the language model itself gives them
                new     V starts as a linear does
    """

    chooses: ClassVar[bool] = True  # as an `Adapter` asks it

    start: int = 0  # slots before everything else
    before_text: int = 0  # slots between the image and the words
    after_text: int = 20  # slots between the question and the answer
    domain: int = PROMPT  # of the slots; 6 to 14 beside another prompt
    verbaliser: Literal["words", "fixed", "new"] = "words"
    most_unlisted: float = 0.5  # share of the training questions of which no answer is in the list, above which training is refused
    init_std: float = 0.02  # of the vectors' normal start
    words: tuple[str, ...] | str = ()  # a text whose embeddings the vectors start as, cut or repeated; or a list of a word for each
    ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)  # what a tokenizer makes of `words`, or in their place

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_words(self, "WARP's")
        check_tuples(self, "WARP's")
        counts = [getattr(self, place) for place in SLOT_PLACES]
        if min(counts) < 0 or not self.length:
            raise ConfigError(f"WARP has {', '.join(map(str, counts))} slots at {', '.join(SLOT_PLACES)}: give 0 or more for each, and 1 or more in all")
        if self.domain != PROMPT and not PERCEPT < self.domain < OTHER:
            raise ConfigError(f"WARP's domain is {self.domain}: give {PROMPT}, or {PERCEPT + 1} to {OTHER - 1} beside another prompt")
        if self.verbaliser not in ("words", "fixed", "new"):
            raise ConfigError(f"WARP's verbaliser is {self.verbaliser!r}: give words, fixed or new")
        if not 0 <= self.most_unlisted <= 1 or self.init_std < 0:
            raise ConfigError(f"WARP's most_unlisted is {self.most_unlisted} and its init_std {self.init_std}: give a share from 0 to 1, and 0 or more")

    @property
    def length(self) -> int:
        """K: the slots of all places."""
        return self.start + self.before_text + self.after_text

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """One slot for each vector."""
        return tuple(Slots(self.domain, count, place) for place in SLOT_PLACES if (count := getattr(self, place)))

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """One table, at the embedding. Raises ConfigError for words that have no ids."""
        return [Placement("soft", EMBEDDING, Table(self.length, anatomy.width, self.init_std).from_words(self, anatomy), (self.domain,))]
