"""Tells the patches of an encoder from its other tokens."""

from __future__ import annotations

from math import ceil
from typing import Any

from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.encoders.stage import Stage, from_map

__all__ = ["Grid"]

# No encoder puts more than this many tokens (CLS, distillation, registers) before its patches.
_MOST_PREFIX_TOKENS = 16


class Grid:
    """Listens, inside a `with`, to the size of a model's first convolution; `stage` then cuts states by it.

    A vision transformer cuts patches with a convolution of h x w places, so P + N tokens hold N = h * w patches; a stack of
    convolutions or merging stages halves the sides k times, so N = ceil(h / 2^k) * ceil(w / 2^k) for the least k that fits.
    Examples: 197 tokens over 14 x 14 are 1 + 196; 49 over 56 x 56 are 0 + 49 (Swin); 201 over 14 x 14 are 5 + 196 (four registers).
    """

    def __init__(self, model: nn.Module) -> None:
        self._convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        self._side = (0, 0)

    def __enter__(self) -> Grid:
        if self._convolution is not None:
            self._handle = self._convolution.register_forward_hook(self._measure)
        return self

    def __exit__(self, *_: object) -> None:
        if self._convolution is not None:
            self._handle.remove()

    def _measure(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self._side = (output.shape[-2], output.shape[-1])

    def stage(self, state: Tensor) -> Stage:
        """The stage of a feature map [B, C, h, w] or of tokens [B, P + N, D], of which the first is the CLS token where P > 0.

        Raises ConfigError where no grid of patches fits the number of tokens.
        """
        if state.dim() == 4:
            return from_map(state)
        n_tokens, (high, wide) = state.shape[1], self._side
        sizes = (ceil(high / 2**k) * ceil(wide / 2**k) for k in range(8))
        n_patches = next((size for size in sizes if size <= n_tokens), 0)
        n_prefix = n_tokens - n_patches
        if n_patches == 0 or n_prefix > _MOST_PREFIX_TOKENS:
            raise ConfigError(
                f"cannot tell patches from other tokens: {n_tokens} tokens over a first convolution of {high} x {wide} places; "
                f"use an encoder that cuts patches with a convolution"
            )
        return Stage(patches=state[:, n_prefix:], cls=state[:, 0] if n_prefix else None)
