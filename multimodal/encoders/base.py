"""What an encoder yields, what every encoder can do, and what it is made of, found by running it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.sample import MediaKind

__all__ = ["Encoder", "Features", "FinalNorm", "Grid", "Layout", "Loaded", "Preprocess", "Stage", "from_map", "read_layout"]


# ----------------------------------------
# What an encoder yields at one depth, and what every encoder can do.


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The image at one depth of an encoder.

    patches  float[B, N, D]    registers and the CLS token dropped
    cls      float[B, D]       None where the encoder has no CLS token at this depth
    """

    patches: Tensor
    cls: Tensor | None = None


def from_map(feature_map: Tensor) -> Stage:
    """The stage of a feature map [B, C, h, w]: its places in reading order are the patches [B, h * w, C]."""
    return Stage(patches=feature_map.flatten(2).transpose(1, 2))


class Encoder(Protocol):
    """A frozen image model of any library. An implementation is an nn.Module, so that the tower holds its weights."""

    def whole(self, pixels: Tensor) -> object:
        """Runs everything the model has, its own pooling included: what the search for the final norm listens to."""
        ...

    def blocks(self, pixels: Tensor) -> tuple[Stage, ...]:
        """The output of every block, before any final norm."""
        ...

    def last(self, pixels: Tensor) -> Stage:
        """What the model itself gives as its final features; keeps nothing of the depths below."""
        ...


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """An encoder's own preprocessing, without its weights: small to pickle, so worker processes can hold it."""

    transform: Callable[[Image.Image], Tensor]
    kind: MediaKind = "image"

    def __call__(self, image: Image.Image) -> Tensor:
        """float32[3, H, W] of an image of any mode and size."""
        return self.transform(image.convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a loader of one library returns."""

    encoder: nn.Module
    preprocess: Preprocess


# ----------------------------------------
# What a frozen tower says about a batch of images.


@dataclass(frozen=True, kw_only=True)
class Features:
    """One batch of encoded images.

    patches  float[B, N, Dv]   one vector for each place of the image
    pooled   float[L, B, Dv]   one vector for the whole image after each block; Dv may differ from that of the patches
    """

    patches: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.patches.dim() != 3 or self.pooled.dim() != 3 or self.patches.shape[0] != self.pooled.shape[1]:
            raise ConfigError(
                f"features need patches [B, N, Dv] and pooled [L, B, Dv] of the same B, "
                f"got {list(self.patches.shape)} and {list(self.pooled.shape)}; pass what a vision tower returns"
            )

    @property
    def joined(self) -> Tensor:
        """float[B, N + L, Dv]: all of it in one tensor, to be cached: patches first, then the pooled vectors. Patches alone where widths differ."""
        if self.pooled.shape[2] != self.patches.shape[2]:
            return self.patches
        return torch.cat([self.patches, self.pooled.transpose(0, 1)], 1)


# ----------------------------------------
# What an encoder is made of, found by running it once.


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """The encoder's one final norm, and what it is made for: `tokens`, or the `mean` of the patches (encoders that average first)."""

    module: nn.Module
    takes: Literal["tokens", "mean"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """n_blocks: how many depths the encoder shows. is_column: every block has the width of the final features, so all can be pooled."""

    n_blocks: int
    is_column: bool
    norm: FinalNorm | None


def read_layout(encoder: Encoder, module: nn.Module, pixels: Tensor) -> Layout:
    """The layout of an encoder, read off one image [1, 3, H, W] that passes it four times.

    The final norm is the module that is fed the last block's output: its tokens, its CLS token alone (CLIP), or the mean of its
    patches. Encoders name and place it in many ways, and the final features of some are not normed, so what happens is observed.
    A column is an encoder whose final features are the last block's output, as it is or normed; a neck, a last convolution or
    widths that grow from stage to stage make it none.

    Raises ConfigError for an encoder that gives another answer each time (a masked autoencoder drops random patches), or one vector only.
    """
    final, again = encoder.last(pixels), encoder.last(pixels)
    if not _same(final.patches, again.patches):
        raise ConfigError(
            "the encoder gives different features each time for the same image, expected the same: it drops or shuffles patches at random; "
            "choose an encoder without masking"
        )
    if final.patches.shape[1] < 2:
        raise ConfigError("the encoder gives one vector for the whole image, expected patches; choose one whose final features are patches or a map")
    blocks = encoder.blocks(pixels)
    with _fed_to_norms(module) as fed:
        encoder.whole(pixels)
    # The last one counts: where a block changes next to nothing, the norms inside it are fed the same values.
    found = [match for norm, value in fed if (match := _match(norm, value, blocks[-1]))]
    norm = found[-1] if found else None
    widths = {stage.patches.shape[-1] for stage in blocks}
    return Layout(n_blocks=len(blocks), is_column=len(widths) == 1 and _ends_in(blocks[-1], norm, final), norm=norm)


@contextmanager
def _fed_to_norms(module: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collects, in order, what each norm inside `module` is given."""
    fed: list[tuple[nn.Module, Tensor]] = []

    def note(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        fed.append((norm, inputs[0]))

    norms = (part for part in module.modules() if "norm" in type(part).__name__.lower() and not list(part.children()))
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield fed
    finally:
        for handle in handles:
            handle.remove()


def _match(norm: nn.Module, value: Tensor, last: Stage) -> FinalNorm | None:
    n_patches = last.patches.shape[1]
    is_tokens = value.dim() == 3 and torch.equal(value[:, -n_patches:], last.patches)
    if is_tokens or (last.cls is not None and torch.equal(value.flatten(1), last.cls)):
        return FinalNorm(module=norm, takes="tokens")
    if _same(value.flatten(1), last.patches.mean(1)):
        return FinalNorm(module=norm, takes="mean")
    return None


def _ends_in(block: Stage, norm: FinalNorm | None, final: Stage) -> bool:
    is_raw = _same(block.patches, final.patches)
    return is_raw or (norm is not None and norm.takes == "tokens" and _same(norm.module(block.patches), final.patches))


def _same(left: Tensor, right: Tensor) -> bool:
    """True up to the rounding of the dtype: a mean in another order differs in the last bits."""
    if left.shape != right.shape:
        return False
    allowed = 16 * torch.finfo(right.dtype).eps * right.abs().max()
    return bool((left - right).abs().max() <= allowed)


# ----------------------------------------
# Distinguishes the patches of an encoder from its other tokens.


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
                f"cannot distinguish patches from other tokens: {n_tokens} tokens over a first convolution of {high} x {wide} places; "
                f"use an encoder that cuts patches with a convolution"
            )
        return Stage(patches=state[:, n_prefix:], cls=state[:, 0] if n_prefix else None)
