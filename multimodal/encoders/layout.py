"""What an encoder is made of, found by running it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.errors import ConfigError
from multimodal.encoders.stage import Encoder, Stage

__all__ = ["FinalNorm", "Layout", "read_layout"]


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
    """The layout of an encoder, read off one picture [1, 3, H, W] that passes it four times.

    The final norm is the module that is fed the last block's output: its tokens, its CLS token alone (CLIP), or the mean of its
    patches. Encoders name and place it in many ways, and the final features of some are not normed, so what happens is observed.
    A column is an encoder whose final features are the last block's output, as it is or normed; a neck, a last convolution or
    widths that grow from stage to stage make it none.

    Raises ConfigError for an encoder that gives another answer each time (a masked autoencoder drops random patches), or one vector only.
    """
    final, again = encoder.last(pixels), encoder.last(pixels)
    if not _same(final.patches, again.patches):
        raise ConfigError(
            "the encoder gives different features each time for the same picture, expected the same: it drops or shuffles patches at random; "
            "choose an encoder without masking"
        )
    if final.patches.shape[1] < 2:
        raise ConfigError("the encoder gives one vector for the whole picture, expected patches; choose one whose final features are patches or a map")
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
