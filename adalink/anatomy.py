"""Where a frozen transformer keeps its embedding, layers, norm, head and linears: read from its structure, with no table per architecture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from adalink.errors import AttachError

__all__ = [
    "Anatomy", "FrozenModule", "InputSpec", "Linear", "Part", "Positions", "Projections", "closing_norms", "in_rows", "is_conv1d", "max_positions",
    "read_elsewhere", "read_projections", "reader_of", "setting", "text_config", "token_ids",
]  # fmt: skip


# ----------------------------------------
# The queries, keys and values of each layer's self-attention: which linear makes them, and which part of what it gives.


# By the last path component, whatever the architecture. The field has no others for three linears of their own.
SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
FUSED = ("c_attn", "qkv")  # one linear gives [queries | keys | values]; others (query_key_value) mix them by head, and are not taken

# Modules whose queries are the stack's tokens and whose keys and values are an encoder's, by their names and classes, and the linears of those.
CROSS = re.compile("cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)
ENCODERS_SIDE = re.compile("(k|v|kv|key|value)(_|$)|(c_attn|kv_proj|to_kv)$")


@dataclass(frozen=True)
class Part:
    """Features [start, stop) of what a linear gives. `linear` is relative to the stack; n_in and n_out are the whole linear's."""

    linear: str
    start: int
    stop: int
    n_in: int
    n_out: int


@dataclass(frozen=True)
class Projections:
    """Self-attention of one layer. Key and value are narrower than the query where queries share heads (grouped-query models).

    key_norm   whether keys are normalised after their linear: then what the linear gives is not what is attended to
    distances  name of the module that adds a bias for the distance between two tokens (T5), empty where none does
    """

    query: Part
    key: Part
    value: Part
    key_norm: bool
    distances: str


def read_projections(stack: nn.Module, layers: Sequence[str], widths: Mapping[str, tuple[int, int]]) -> tuple[Projections, ...]:
    """One for each layer, or () where a layer has no self-attention that is understood. widths: linear -> (n_in, n_out)."""
    found = [_projections(stack, layer, widths) for layer in layers]
    return tuple(one for one in found if one is not None) if all(found) else ()


def read_elsewhere(stack: nn.Module, linears: Sequence[str]) -> frozenset[str]:
    """Of these linears, those that run on what an encoder gave (an image's features): the keys and values of cross-attention."""
    found = set()
    for name in linears:
        parent, _, last = name.rpartition(".")
        above = [parent[: match.start()] for match in re.finditer(r"\.|$", parent)]
        is_cross = any(CROSS.search(path.rpartition(".")[2]) or CROSS.search(type(stack.get_submodule(path)).__name__) for path in above)
        if is_cross and ENCODERS_SIDE.match(last):
            found.add(name)
    return frozenset(found)


def closing_norms(stack: nn.Module, layers: Sequence[str], final_norm: str | None) -> tuple[str, ...]:
    """The norm that ends each layer of a post-LN model (BERT, OPT-350M); () for a pre-LN model, which has one final norm instead."""
    if final_norm is not None:
        return ()
    norms = [[name for name, child in stack.get_submodule(layer).named_modules() if _is_norm(child)] for layer in layers]
    return tuple(f"{layer}.{names[-1]}" for layer, names in zip(layers, norms, strict=True)) if all(norms) else ()


def reader_of(model: nn.Module, stack: str) -> str | None:
    """Dotted name, in the model, of the decoder that reads what the stack gives; None where none does.

    It is beside the stack: a query transformer of an existing vision-language model (BLIP-2) reads an encoder too, but not this one.
    """
    for name, module in model.named_modules():
        is_beside = stack and name != stack and name.rpartition(".")[0] == stack.rpartition(".")[0]
        has_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
        if is_beside and has_layers and "encoder_attention_mask" in inspect.signature(type(module).forward).parameters:
            return name
    return None


def _projections(stack: nn.Module, layer: str, widths: Mapping[str, tuple[int, int]]) -> Projections | None:
    inside = [name for name in widths if name.startswith(layer + ".")]
    for name in inside:
        parent, _, last = name.rpartition(".")
        for triple in SEPARATE:
            names = [f"{parent}.{one}" for one in triple]
            if last == triple[0] and all(one in widths for one in names):
                query, key, value = (Part(one, 0, widths[one][1], *widths[one]) for one in names)
                return _of(stack, parent, query, key, value)
        n_in, n_out = widths[name]
        if last in FUSED and n_out == 3 * n_in:
            query, key, value = (Part(name, i * n_in, (i + 1) * n_in, n_in, n_out) for i in range(3))
            return _of(stack, parent, query, key, value)
    return None


def _of(stack: nn.Module, attention: str, query: Part, key: Part, value: Part) -> Projections:
    module = stack.get_submodule(attention)
    return Projections(
        query=query,
        key=key,
        value=value,
        key_norm=any(name.startswith("k") and _is_norm(child) for name, child in module.named_children()),
        distances=attention if hasattr(module, "relative_attention_bias") else "",
    )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


# ----------------------------------------
# What the config of a frozen model says of its words: read where it stands, since a model of several parts keeps it in the config of one.


# Where models of several parts keep what speaks of the words, beside those that transformers itself looks through.
TEXT_PARTS = ("thinker_config", "language_config", "llm_config", "lm_config", "vlm_config")


def text_config(config: Any, side: Literal["read", "written"] = "read") -> Any:
    """The part of a model's config that speaks of the words that it reads, or of those that its decoder writes. The config itself mostly."""
    encoder = getattr(config, "encoder", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(encoder, "model_type"):
        return encoder if side == "read" and getattr(encoder, "vocab_size", None) is not None else config.decoder  # without words it reads images
    found = config
    if hasattr(config, "get_text_config"):
        try:
            found = config.get_text_config()
        except ValueError:  # an encoder of words and a decoder of something else
            found = config.get_text_config(encoder=True)
    if found is not config:
        return found
    nested = next((getattr(config, name) for name in TEXT_PARTS if hasattr(getattr(config, name, None), "model_type")), None)
    return config if nested is None else text_config(nested, side)


def setting(config: Any, *names: str, side: Literal["read", "written"] = "read") -> Any:
    """The first of these settings that is not None: of the part that speaks of the words, then of the whole. None where neither says it."""
    found = (getattr(part, name, None) for part in (text_config(config, side), config) for name in names)
    return next((value for value in found if value is not None), None)


def max_positions(config: Any, side: Literal["read", "written"] = "read") -> int | None:
    """How many positions a model has for the words of a row; None where there is no last one (T5, Bloom)."""
    part = {"read": "encoder", "written": "decoder"}[side]
    names: tuple[str, ...] = ("max_position_embeddings", f"max_{part}_position_embeddings", "n_positions", "max_sequence_length")
    if getattr(text_config(config, side), "relative_attention_num_buckets", None) is not None:  # T5's old configs hold an `n_positions` all the same
        names = names[:1]
    limit = setting(config, *names, side=side)
    return limit if isinstance(limit, int) and limit > 0 else None  # DeBERTa writes -1 for none


def token_ids(config: Any, *names: str) -> tuple[int, ...]:
    """The ids of these names, in order of the names and each once: of the whole config, or else of its parts. A list gives all that it holds."""
    for places in ([config], _parts(config)):
        found = [getattr(place, name, None) for name in names for place in places]
        ids = [token for value in found for token in (value if isinstance(value, list | tuple) else [value])]
        if ids := [token for token in ids if isinstance(token, int) and token >= 0]:
            return tuple(dict.fromkeys(ids))
    return ()


def _parts(config: Any) -> list[Any]:
    """Every config inside a config, at any depth; what speaks of the words first."""
    nested = [value for value in vars(config).values() if hasattr(value, "model_type")] if hasattr(config, "__dict__") else []
    first = text_config(config)
    return [*([first] if first is not config else []), *nested, *(inner for value in nested for inner in _parts(value))]


class FrozenModule:
    """A frozen module that something reads and does not own: it is in no state dict, and copies of its reader refer to the same one."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModule:
        return FrozenModule(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[type[FrozenModule], tuple[()]]:
        return FrozenModule, ()  # another process attaches it anew


@dataclass(frozen=True)
class InputSpec:
    """An input that the edits can read beside the hidden states: `count` vectors of width `width` for each row.

    times          of a clip: how many moments the vectors are of, each of as many places; 0 where they have none
    is_time_first  all places of a moment come together, and not all moments of a place
    """

    count: int
    width: int
    times: int = 0
    is_time_first: bool = True


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
    words        the word embedding itself; of no module where none is read
    host         the model itself, for methods that build layers of its kind
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
    words: FrozenModule = field(default_factory=FrozenModule, compare=False, repr=False)
    host: FrozenModule = field(default_factory=FrozenModule, compare=False, repr=False)

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
            words=FrozenModule(words),
            host=FrozenModule(model),
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
    if words.weight.is_meta:  # weights that are stored elsewhere do not look tied
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
    if is_conv1d(module):
        n_in, n_out = module.get_parameter("weight").shape
        return Linear(name, n_in, n_out, bias)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, which keeps its weight transposed: [n_in, n_out]."""
    return type(module).__name__ == "Conv1D"


def in_rows(weight: Tensor, linear: nn.Module) -> Tensor:
    """[n_out, n_in], of a linear's weight or what is like it; the other way round likewise."""
    return weight.T if is_conv1d(linear) else weight


def _final_norm(stack: nn.Module, layers: str) -> str | None:
    """The norm beside the layers that is not the embedding's: of the direct children of their parent, the first after the layers, or else the last."""
    parent, _, last = layers.rpartition(".")
    named = stack.get_submodule(parent).named_children()
    children = [name for name, child in named if name == last or ("norm" in type(child).__name__.lower() and "emb" not in name)]
    norms = [*children[children.index(last) + 1 :], *reversed(children[: children.index(last)])]
    return f"{parent}.{norms[0]}".lstrip(".") if norms else None


def _attention(layer: nn.Module) -> Literal["causal", "bidirectional"]:
    """What the attention inside a layer says of itself; a decoder that says nothing is causal."""
    stated = [module.is_causal for module in layer.modules() if hasattr(module, "is_causal")]
    return "bidirectional" if stated and not any(stated) else "causal"


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
