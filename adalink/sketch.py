"""A tensor in a few of its values: enough to tell it from another, with a tolerance that a hash has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Sketch"]

N_SKETCHED = 256  # values of a tensor


@dataclass(frozen=True)
class Sketch:
    """A tensor's shape and evenly spaced values of it, to five digits."""

    shape: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor, n: int = N_SKETCHED) -> Sketch:
        """Of any tensor, in up to `n` values."""
        flat = tensor.detach().float().flatten().cpu()
        picked = flat[:: max(len(flat) // n, 1)][:n]
        return cls(tuple(tensor.shape), tuple(float(f"{value:.5g}") for value in picked.tolist()))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sketch:
        """The reverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError where something does not fit."""
        return cls(tuple(map(int, content["shape"])), tuple(map(float, content["values"])))

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))}, from {min(self.values):.3g} to {max(self.values):.3g}"

    def difference(self, other: Sketch) -> float:
        """The largest, as a share of the larger range; 1 where the shapes differ or a value is no number."""
        if self.shape != other.shape or len(self.values) != len(other.values):
            return 1.0
        ranges = (max(sketch.values) - min(sketch.values) for sketch in (self, other))
        gap = max(abs(one - two) for one, two in zip(self.values, other.values, strict=True)) / max(*ranges, 1e-9)
        return gap if gap == gap else 1.0
