"""What a composed model trains beside its frozen parts: the adapter's edits, the encoder's where it is adapted, an answer head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from adalink import Adapter
from multimodal.classify import AnswerHead

if TYPE_CHECKING:
    from multimodal.model import VisionLanguageModel

__all__ = ["TrainedParts", "trained_summary"]


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """The trained modules: edits in the language model, edits in the encoder, the head that chooses answers."""

    edits: Adapter
    vision: Adapter | None = None
    head: AnswerHead | None = None

    @staticmethod
    def of(model: VisionLanguageModel) -> TrainedParts:
        """Those of a model's active adapter. Raises ConfigError where none is active."""
        return TrainedParts(edits=model.adapted.active_adapter(), vision=model.tower.adapter, head=model.head)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name: `adalink.image.down.weight`, `vision.lora...`, `head.linear.bias`."""
        seen = self.vision.named_parameters("vision") if self.vision is not None else ()
        chosen = self.head.named_parameters("head") if self.head is not None else ()
        return {**dict(self.edits.named_parameters()), **dict(seen), **dict(chosen)}

    def counts(self) -> dict[str, int]:
        """How many parameters each method and the head has: `adalink`, `vision.lora`, `head`."""
        seen = {} if self.vision is None else {f"vision.{name}": count for name, count in self.vision.n_parameters().items()}
        head = {} if self.head is None else {"head": sum(parameter.numel() for parameter in self.head.parameters())}
        return {**self.edits.n_parameters(), **seen, **head}


def trained_summary(model: VisionLanguageModel) -> str:
    """The active adapter's parameters and their share of all; a line more for the encoder's and one for the head's, where there are some."""
    lines = [model.adapted.trainable_summary(also_frozen=sum(parameter.numel() for parameter in model.tower.encoder.parameters()))]
    if model.tower.adapter is not None:
        counts = model.tower.adapter.n_parameters()
        lines.append(f"in the encoder: {sum(counts.values()):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})")
    if model.head is not None:
        lines.append(f"in the head: {sum(parameter.numel() for parameter in model.head.parameters()):,} ({len(model.head.answers):,} answers)")
    return "\n".join(lines)
