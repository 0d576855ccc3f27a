"""A compiled form of a model with adapters, for training: the first steps take minutes, and each length of rows that is new may take more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from adalink import AdaptedModel
from adalink.errors import AttachError, ConfigError
from multimodal.model import VisionLanguageModel
from multimodal.train_settings import Compile

__all__ = ["CompiledModel", "compiled"]


@contextlib.contextmanager
def compiled(model: VisionLanguageModel, mode: Compile) -> Iterator[None]:
    """Inside the block the model learns in its compiled form. Raises ConfigError for a model that does not learn so."""
    loss = model.language_loss
    if mode != "no":
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ConfigError("train.compile makes one graph of the model, and FSDP2 splits it: train with DDP, or with train.compile: no")
        if model.head is not None:
            raise ConfigError("train.compile acts on models that write, and this one chooses among answers: train with train.compile: no")
        loss.call = CompiledModel(model.adapted, mode=mode)
    try:
        yield
    finally:
        loss.call = model.adapted.base


class CompiledModel:
    """Runs an adapted model's frozen model as one compiled graph. The model itself stays as it is: generation runs uncompiled.

    Compile last: attach, then compile, then train. Dynamo does not look at hooks again, so a model whose adapters change is refused.
    """

    def __init__(self, adapted: AdaptedModel, *, mode: Compile = "default", backend: Any = "inductor") -> None:
        self.adapted = adapted
        self.at = adapted.attachment.at
        options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
        self._run = torch.compile(adapted.base, fullgraph=True, backend=backend, **options)

    def __call__(self, **arguments: Any) -> Any:  # the model's own arguments
        """The model's output.

        Raises AttachError where adapters were added or taken away since, ConfigError where the model is not one graph or no compiler works.
        """
        if self.adapted.attachment.at is not self.at:
            raise AttachError("adapters were added or taken away after the model was compiled, and it would not see them: compile it again")
        try:
            return self._run(**arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().splitlines()[0]
            raise ConfigError(f"this model cannot be compiled into one graph ({said}): train with train.compile: no") from error
