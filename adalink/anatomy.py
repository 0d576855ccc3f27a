"""Where a frozen transformer keeps its embedding, layers, norm, head and linears: read from its structure, with no table per architecture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from adalink.errors import AttachError
from adalink.host_config import setting
from adalink.projections import Projections, closing_norms, read_elsewhere, read_projections, reader_of

__all__ = ["Anatomy", "InputSpec", "Linear", "Positions"]


@dataclass(frozen=True)
class InputSpec:
    """An input that the edits can read beside the hidden states: `count` vectors of width `width` for each row."""

    count: int
    width: int


@dataclass(frozen=True)
class Linear:
    """A linear inside the stack; `name` is relative to the stack."""

    name: str
    n_in: int
    n_out: int
    has_bias: bool


@dataclass(frozen=True)
class Positions:
    """The module that turns position ids into vectors that are added (table) or into rotations. `module` is empty where it was not found."""

    module: str
    kind: Literal["table", "rotary"]
    padding_row: int | None = None  # what tokens with the padding id have, where the model counts from the ids


@dataclass(frozen=True)
class Anatomy:
    """The parts of a frozen model that edits are placed in.

    stack        dotted name, in the model, of the module that holds embedding and layers: the encoder of an encoder-decoder model
    embedding    dotted name in the stack
    layers       dotted names in the stack, in the order they run
    final_norm   dotted name in the stack, None where there is none
    linears      every linear inside the layers that runs on the stack's own tokens: in cross-attention, not those of keys and values
    width        D, of the embedding's output (OPT-350M's embedding is narrower than its layers)
    vocabulary   V
    inputs       what a composed model feeds beside the ids, for instance `image`
    attention    whether a token reads what is before it or everything
    positions    None where the model reads distances alone (T5, Bloom)
    projections  queries, keys and values of each layer; () where they were not found
    closing      the norm that ends each layer of a post-LN model; () where layers end with the sum
    reader       dotted name, in the model, of the decoder that reads what the stack gives; None where none does
    images       where an image's features meet the words: `before` the stack, in embeddings that it is given (LLaVA); `inside` it, before its
                 layers (Chameleon, GIT); `across`, read by cross-attention, so that every token is a word (BLIP, IDEFICS)
    """

    stack: str
    embedding: str
    layers: tuple[str, ...]
    final_norm: str | None
    linears: tuple[Linear, ...]
    width: int
    vocabulary: int
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    attention: Literal["causal", "bidirectional"] = "causal"
    positions: Positions | None = None
    projections: tuple[Projections, ...] = ()
    closing: tuple[str, ...] = ()
    reader: str | None = None
    images: Literal["before", "inside", "across"] = "before"

    @property
    def layer_width(self) -> int:
        """D inside the layers: what their first linear reads."""
        return self.linears[0].n_in

    @property
    def merges_late(self) -> bool:
        """Whether the words' embeddings meet the image's features inside the stack: the first layer's input is then where every token is."""
        return self.images == "inside" and self.positions is not None and self.positions.kind == "rotary"

    @staticmethod
    def read(model: nn.Module, inputs: Mapping[str, InputSpec] | None = None) -> Anatomy:
        """The anatomy of a Hugging Face style model (one with `get_input_embeddings`).

        Raises AttachError where the model has no word embedding or no list of layers that follows it.
        """
        words = _word_embedding(model)
        stack, embedding, layers = _stack(model, words)
        module = model.get_submodule(stack)
        names = tuple(f"{layers}.{i}" for i in range(len(_layer_list(module, layers))))
        found = [linear for name, child in module.named_modules() if name.startswith(layers + ".") and (linear := _linear(name, child))]
        elsewhere = read_elsewhere(module, [linear.name for linear in found])
        linears = tuple(linear for linear in found if linear.name not in elsewhere)
        final_norm = _final_norm(module, layers)
        return Anatomy(
            stack=stack,
            embedding=embedding,
            layers=names,
            final_norm=final_norm,
            linears=linears,
            width=words.embedding_dim,
            vocabulary=words.num_embeddings,
            inputs=dict(inputs or {}),
            attention=_attention(module.get_submodule(names[0])),
            positions=_positions(module, embedding),
            projections=read_projections(module, names, {linear.name: (linear.n_in, linear.n_out) for linear in linears}),
            closing=closing_norms(module, names, final_norm),
            reader=reader_of(model, stack),
            images=_images(module, bool(elsewhere)),
        )

    def linears_named(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears whose LAST path component is one of `targets` ("q_proj" never means "qq_proj").

        Raises AttachError with the names that would have worked.
        """
        known = {linear.name.rsplit(".", 1)[-1] for linear in self.linears}
        if unknown := sorted(set(targets) - known):
            raise AttachError(f"no linear of this model is named {', '.join(unknown)}; its linears are named {', '.join(sorted(known))}")
        return tuple(linear for linear in self.linears if linear.name.rsplit(".", 1)[-1] in targets)


def _word_embedding(model: nn.Module) -> nn.Embedding:
    read = getattr(model, "get_input_embeddings", None)
    try:
        found = read() if callable(read) else None
    except NotImplementedError:  # two towers, none of which is the model's own
        found = None
    if not isinstance(found, nn.Embedding):
        raise AttachError(
            f"{type(model).__name__} has no word embedding: expected a transformers model whose get_input_embeddings() gives an nn.Embedding; "
            "of a model of several parts give the one that reads words"
        )
    return found


def _stack(model: nn.Module, words: nn.Embedding) -> tuple[str, str, str]:
    """(stack, embedding in it, layers in it): the smallest module that holds the word embedding and a list of layers after it.

    Encoder-decoder models have two of the same depth; the first is the encoder. A tower for images or sounds has an embedding of its
    own nearer to its layers than the words are; of lists as near to the words, layers that read words alone come first, then as many
    as the config says.
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tied = [name for name, module in tables.items() if module is words or module.weight is words.weight]
    found = _nearest(model, tied)
    if words.weight.is_meta:  # weights that are kept elsewhere are not seen to be tied
        alike = [name for name, module in tables.items() if module.weight.shape == words.weight.shape]
        found = _nearest(model, [name for name in alike if f".{name}".startswith(f".{_common(*found)}".rstrip(".") + ".")])
    layers, embedding = found
    if len(kinds := _kinds(_layer_list(model, layers))) > 1:
        raise AttachError(
            f"the layers {layers} of {type(model).__name__} are of several kinds ({', '.join(kinds)}), and edits are placed alike in each: "
            "expected a model whose layers are alike and which holds its images as tokens, such as LLaVA or Qwen2-VL"
        )
    common = _common(layers, embedding)
    return common, _relative(embedding, common), _relative(layers, common)


def _nearest(model: nn.Module, words: list[str]) -> tuple[str, str]:
    """(layers, embedding): the list of layers that has most of its path in common with a word embedding. Raises AttachError for none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and _is_layers(module)}
    lists = {name: module for name, module in lists.items() if not _in_tower(model, name, words)} or lists
    n_layers = setting(getattr(model, "config", None), "num_hidden_layers")
    pairs = [
        ((_depth(_common(name, embedding)), _reads_words_alone(module[0]), len(module) == n_layers, -_depth(name)), name, embedding)
        for name, module in lists.items()
        for embedding in words
    ]
    if not pairs:
        raise AttachError(f"{type(model).__name__} has no list of transformer layers beside its word embedding: this structure is not supported")
    return max(pairs, key=lambda pair: pair[0])[1:]  # the first of equals


def _in_tower(model: nn.Module, layers: str, words: list[str]) -> bool:
    """Whether what is nearest to the layers is an embedding of something else than words: patches, frames, another vocabulary."""
    depth = max(_depth(_common(layers, embedding)) for embedding in words)
    return any(
        _depth(_common(layers, name)) > depth
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding) and name not in words and not name.startswith(layers + ".")
    )


def _kinds(module: nn.ModuleList) -> list[str]:
    """The classes of the layers; one where all hold linears of the same names, whatever their classes."""
    linears = {tuple(name for name, child in layer.named_modules() if _linear(name, child)) for layer in module}
    return sorted({type(layer).__name__ for layer in module})[: None if len(linears) > 1 else 1]


def _reads_words_alone(layer: nn.Module) -> bool:
    """Not so for a layer that is given an image's features beside the hidden states (IDEFICS has such between its own), or the parts of a resampler."""
    return not isinstance(layer, nn.ModuleList) and not any(
        name.startswith(("image", "vision", "visual", "media")) for name in inspect.signature(type(layer).forward).parameters
    )


def _images(stack: nn.Module, is_across: bool) -> Literal["before", "inside", "across"]:
    """Where an image's features meet the words."""
    takes = inspect.signature(type(stack).forward).parameters
    if is_across or any(isinstance(child, nn.ModuleList) and len(child) and not _reads_words_alone(child[0]) for child in stack.children()):
        return "across"
    return "inside" if any(word in name for name in takes for word in ("pixel_values", "image", "video", "patches")) else "before"


def _is_layers(module: nn.ModuleList) -> bool:
    return len(module) > 0 and any(_linear(name, child) for name, child in module[0].named_modules())


def _layer_list(stack: nn.Module, name: str) -> nn.ModuleList:
    found = stack.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def _linear(name: str, module: nn.Module) -> Linear | None:
    """nn.Linear, or GPT-2's Conv1D, which is a linear with a transposed weight."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Linear(name, module.in_features, module.out_features, bias)
    if type(module).__name__ == "Conv1D":
        n_in, n_out = module.get_parameter("weight").shape
        return Linear(name, n_in, n_out, bias)
    return None


def _final_norm(stack: nn.Module, layers: str) -> str | None:
    """The norm beside the layers that is not the embedding's: of the direct children of their parent, the first after the layers, or else the last."""
    parent, _, last = layers.rpartition(".")
    named = stack.get_submodule(parent).named_children()
    children = [name for name, child in named if name == last or ("norm" in type(child).__name__.lower() and "emb" not in name)]
    norms = [*children[children.index(last) + 1 :], *reversed(children[: children.index(last)])]
    return f"{parent}.{norms[0]}".lstrip(".") if norms else None


def _attention(layer: nn.Module) -> Literal["causal", "bidirectional"]:
    """What the attention inside a layer says of itself; a decoder that says nothing is causal."""
    said = [module.is_causal for module in layer.modules() if hasattr(module, "is_causal")]
    return "bidirectional" if said and not any(said) else "causal"


def _positions(stack: nn.Module, embedding: str) -> Positions | None:
    """A learned table of positions beside the word embedding (others are of segments, or of words again), or a module of rotations in the stack.

    A table with a padding row counts from the ids (RoBERTa): tokens with the padding id are not counted, and have that row.
    """
    beside = embedding.rpartition(".")[0]
    tables = {
        f"{beside}.{name}".lstrip("."): child
        for name, child in stack.get_submodule(beside).named_children()
        if isinstance(child, nn.Embedding) and name != embedding.rpartition(".")[2] and ("pos" in name or "wpe" in name)
    }
    if tables:
        longest = max(tables, key=lambda name: tables[name].num_embeddings)
        return Positions(longest, "table", tables[longest].padding_idx)
    rotary = [name for name, child in stack.named_children() if any("inv_freq" in buffer for buffer, _ in child.named_buffers(recurse=False))]
    if rotary:
        return Positions(rotary[0], "rotary")
    return Positions("", "table") if "position_ids" in inspect.signature(type(stack).forward).parameters else None


def _common(first: str, second: str) -> str:
    parts = []
    for a, b in zip(first.split(".")[:-1], second.split(".")[:-1], strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def _relative(name: str, ancestor: str) -> str:
    return name[len(ancestor) + 1 :] if ancestor else name


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0
