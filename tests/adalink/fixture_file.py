"""A file of recorded tensors with what its .json says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class FixtureFile:
    """spec: the .json; tensors: the .safetensors."""

    spec: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, under the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
