"""The queries, keys and values of each layer's self-attention: which linear makes them, and which part of what it gives."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Part", "Projections", "closing_norms", "read_elsewhere", "read_projections", "reader_of"]

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
