"""Where a vision transformer keeps its patch embedding and its layers: read from its structure, as for language models."""

from __future__ import annotations

from typing import Any

from torch import nn

from adalink.anatomy import Anatomy, Linear
from adalink.errors import AttachError
from adalink.projections import read_projections

__all__ = ["read_vision"]


def read_vision(model: nn.Module) -> Anatomy:
    """The anatomy of a vision transformer of transformers, timm or open_clip: `embedding` is the convolution that makes the patches.

    Raises AttachError where the model is none: no convolution into the width of its layers, layers of several widths (Swin), or words.
    """
    _refuse_words(model)
    layers = _layers(model)
    linears = tuple(linear for name, child in model.named_modules() if name.startswith(layers + ".") and (linear := _linear(name, child)))
    widths = {linear.name[len(layers) + 1 :].split(".")[0]: linear.n_in for linear in reversed(linears)}  # of each layer's first linear
    if len(set(widths.values())) != 1:
        raise AttachError(
            f"{type(model).__name__} has layers of the widths {sorted(set(widths.values()))}, expected one width throughout: "
            "choose a plain vision transformer (CLIP, SigLIP, DINOv2, ViT)"
        )
    width = next(iter(widths.values()))
    convolutions = [
        name
        for name, child in model.named_modules()
        if isinstance(child, nn.Conv2d) and child.out_channels == width and not name.startswith(layers + ".")
    ]
    if not convolutions:
        raise AttachError(f"{type(model).__name__} has no convolution that makes patches of its layers' width {width}: this structure is not supported")
    names = tuple(f"{layers}.{i}" for i in range(len(list(model.get_submodule(layers).children()))))
    return Anatomy(
        stack="",
        embedding=convolutions[-1],
        layers=names,
        final_norm=None,
        linears=linears,
        width=width,
        vocabulary=0,
        attention="bidirectional",
        projections=read_projections(model, names, {linear.name: (linear.n_in, linear.n_out) for linear in linears}),
    )


def _refuse_words(model: nn.Module) -> None:
    read: Any = getattr(model, "get_input_embeddings", None)
    try:
        words = read() if callable(read) else None
    except NotImplementedError:  # two towers
        words = None
    if isinstance(words, nn.Embedding):
        raise AttachError(f"{type(model).__name__} reads words: attach to it with `get_adalink_model`, or give its vision tower alone")


def _layers(model: nn.Module) -> str:
    """The longest list of modules of one kind that hold linears; the outermost of equals."""
    lists = {
        name: children
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and (children := list(module.children()))
        and len({type(child) for child in children}) == 1
        and any(_linear(name, child) for name, child in children[0].named_modules() if name)
    }
    if not lists:
        raise AttachError(f"{type(model).__name__} has no list of transformer layers: expected a vision transformer (CLIP, SigLIP, DINOv2, ViT)")
    return max(lists, key=lambda name: (len(lists[name]), -name.count(".")))


def _linear(name: str, module: nn.Module) -> Linear | None:
    """A linear that runs as a module: the one inside torch's own multi-head attention does not, so a hook on it would never be called."""
    if type(module) is not nn.Linear:
        return None
    return Linear(name, module.in_features, module.out_features, module.bias is not None)
