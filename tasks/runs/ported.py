"""What a ported adapter is worth: the old base with it, the new base without it, the new base with it, on the same items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from adalink import AdaptedModel, Adapter
from adalink.attachment.modules_to_save import copied
from adalink.errors import ScoreError
from adalink.lifecycle.port import Base
from multimodal.existing.tower import ModelTower
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from tasks.evaluation.compare import Comparison, Difference
from tasks.metrics.bootstrap import Resampling, aligned
from tasks.runs.scored import Answers, ScoredAdapter

__all__ = ["PortScores", "base_of", "base_of_language", "port_scores"]

OLD, ALONE, PORTED = "old base with the adapter", "new base alone", "new base with the ported adapter"


def base_of(model: VisionLanguageModel) -> Base:
    """A composed model, or one that sees already, as a port compares it."""
    template = ""
    if isinstance(model.tower, ModelTower):
        own = (getattr(model.tower.processor.real, "chat_template", None), getattr(model.language.tokenizer, "chat_template", None))
        template = str(next((one for one in own if one), ""))
    return _base(model.adapted, model.language.tokenizer, template)


def base_of_language(language: Language) -> Base:
    """A language model alone."""
    return _base(AdaptedModel(language.model), language.tokenizer, "")


def _base(adapted: AdaptedModel, tokenizer: Any, template: str) -> Base:
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    words = {token: word for word, token in tokenizer.get_vocab().items()}
    return Base(adapted=adapted, words=words, ids={**ids, "image": next(iter(adapted.image_ids), None)}, chat_template=template)


@dataclass(frozen=True, kw_only=True)
class PortScores:
    """Scores by row, and their comparisons.

    answers   OLD (where the old base was given), ALONE and PORTED
    gained    ALONE before, PORTED after
    changed   OLD before, PORTED after; None without the old base
    """

    answers: Mapping[str, Answers]
    gained: Comparison
    changed: Comparison | None

    @property
    def _gain(self) -> Difference:
        headline = self.answers[PORTED].score.headline
        found = next((row for row in self.gained.differences if row.name == headline), self.gained.differences[0])  # of answers: all of them, then types
        return replace(found, name=headline)

    def sentence(self, most_negative: float | None = None) -> str:
        """What the scores say in one sentence. Raises ScoreError where the adapter is not surely better than the new base alone, or breaks too much.

        most_negative: the share of all items that may be right on the old base and wrong on the new one, at most (see `FlipRates.check`).
        """
        gain = self._gain
        between = "" if gain.interval is None else f" ({gain.interval.low:+.2f} .. {gain.interval.high:+.2f})"
        found = f"{gain.name} {gain.after:.2f} with the ported adapter and {gain.before:.2f} on the new base alone, {gain.after - gain.before:+.2f}{between}"
        if not gain.is_sure or gain.after < gain.before:
            raise ScoreError(f"the ported adapter is not surely better than the new base alone: {found}; train one on the new base, or --accept it")
        if most_negative is not None and self.changed is not None:
            try:
                self.changed.rates.check(most_negative)
            except ScoreError as error:
                raise ScoreError(f"{error}; or --accept it") from None
        return f"the ported adapter is surely better than the new base alone: {found}"

    def lines(self) -> list[str]:
        """For the screen: a row for each model with the headline metric, and the flips from the old base to the new one."""
        headline = self.answers[PORTED].score.headline
        rows = [("", headline), *((name, f"{one.value:.2f}") for name, one in self.answers.items())]
        return [*aligned(rows), *([] if self.changed is None else self.changed.rates.lines())]

    def document(self) -> dict[str, Any]:
        """For JSON, and for the folder's config: scores, the gain with its interval, flips."""
        gain, change = self._gain, self.changed
        return {
            "metric": gain.name,
            "items": len(self.gained.pairs),
            "scores": {name: one.value for name, one in self.answers.items()},
            "gain_interval": None if gain.interval is None else [gain.interval.low, gain.interval.high],
            **({} if change is None else {"negative_flip_rate": change.negative_flip_rate, "positive_flip_rate": change.positive_flip_rate}),
        }


def port_scores(ported: ScoredAdapter, old: ScoredAdapter | None, *, resampling: Resampling | None = None) -> PortScores:
    """The scores of a ported adapter, of the new base without it, and of the old base with it.

    The new base alone has an untrained adapter, as the first row of every report: a composed model sees nothing without one.
    """
    resampling = resampling or Resampling()
    found = {} if old is None else {OLD: old.answers()}
    found[PORTED] = ported.answers()
    found[ALONE] = _alone(ported)
    changed = None if old is None else ported.compared(found[OLD], found[PORTED], resampling)
    order = [name for name in (OLD, ALONE, PORTED) if name in found]
    return PortScores(answers={name: found[name] for name in order}, gained=ported.compared(found[ALONE], found[PORTED], resampling), changed=changed)


def _alone(scored: ScoredAdapter) -> Answers:
    """With the adapter's methods as they start; copies of modules as the new base has them. The model then has the adapter again."""
    adapted = scored.model.adapted
    adapter = adapted.active_adapter()
    own = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = Adapter(adapter.methods, adapted.anatomy, copied(adapted.base, adapted.anatomy, tuple(adapter.copies)))
    found = scored.answers(untrained.tensors())
    scored.give(own)
    return found
