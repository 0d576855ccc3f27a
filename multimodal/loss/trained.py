"""What a composed model trains beside its frozen parts: the adapter's edits, the encoder's and the connector's where they are adapted, an answer head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from adalink import Adapter
from multimodal.loss.answer_head import AnswerHead

__all__ = ["TrainedParts", "trained_summary"]


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """The trained modules: edits in the language model, in the encoder and on the connector, the head that chooses answers."""

    edits: Adapter
    vision: Adapter | None = None
    connector: Adapter | None = None
    head: AnswerHead | None = None

    @staticmethod
    def of(model: Any) -> TrainedParts:
        """Those of a model's active adapter. Raises ConfigError where none is active."""
        connector = None if model.connectors is None else model.connectors.of(model.adapted.active)
        return TrainedParts(edits=model.adapted.active_adapter(), vision=model.tower.adapter, connector=connector, head=model.head)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name: `adalink.image.down.weight`, `vision.lora...`, `connector.lora...`, `head.linear.bias`."""
        beside = {"vision": self.vision, "connector": self.connector, "head": self.head}
        found = dict(self.edits.named_parameters())
        return found | {name: one for role, module in beside.items() if module is not None for name, one in module.named_parameters(role)}

    def counts(self) -> dict[str, int]:
        """How many parameters each method and the head has: `adalink`, `vision.lora`, `connector.lora`, `head`."""
        beside = {"vision": self.vision, "connector": self.connector}
        seen = {f"{role}.{name}": count for role, one in beside.items() if one is not None for name, count in one.n_parameters().items()}
        head = {} if self.head is None else {"head": sum(parameter.numel() for parameter in self.head.parameters())}
        return {**self.edits.n_parameters(), **seen, **head}


def trained_summary(model: Any) -> str:
    """The active adapter's parameters and their share of all; a line more for the encoder's and one for the head's, where there are some."""
    lines = [model.adapted.trainable_summary(also_frozen=sum(parameter.numel() for parameter in model.tower.encoder.parameters()))]
    trained = TrainedParts.of(model)
    for place, adapter in (("encoder", trained.vision), ("connector", trained.connector)):
        if adapter is not None:
            counts = adapter.n_parameters()
            lines.append(f"in the {place}: {sum(counts.values()):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})")
    if model.head is not None:
        lines.append(f"in the head: {sum(parameter.numel() for parameter in model.head.parameters()):,} ({len(model.head.answers):,} answers)")
    return "\n".join(lines)
