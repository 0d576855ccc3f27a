"""A file of recorded tensors with what its .json says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
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


def refuse_unchecked(outputs: Mapping[str, Tensor], checked: Collection[str], spec: Mapping[str, Any]) -> None:
    """Fails on an output that a test does not compare, unless it is for information only.

    That is a single number (a statistic of the run), or what the .json says so of: among its `keys`, with the word "information".
    """
    note = [key for key, words in spec.get("keys", {}).items() if "information" in str(words).lower()]
    patterns = [re.sub(r"<[^>]*>|\\\*|I\b", ".*", re.escape(key.removeprefix("out."))) for key in note]
    left = [name for name, value in outputs.items() if name not in checked and value.numel() > 1]
    unknown = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not unknown, f"outputs that this test does not check: {', '.join(unknown)}"
