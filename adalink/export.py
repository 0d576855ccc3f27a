"""Adapters for programs that know nothing of adapters: merged into the weights where that is exact, or prompts as embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.attachment.existing import image_token_ids, is_encoder_decoder
from adalink.attachment.modules_to_save import write_copies
from adalink.edit import Adapter, Method, Placement
from adalink.errors import AttachError, ConfigError
from adalink.methods.adalink import AdaLink, Bottleneck
from adalink.methods.lora import LoRA, LowRank
from adalink.model import AdaptedModel
from adalink.tokens import ANSWER, DOMAIN_NAMES, IMAGE, TEXT, TokenMap

__all__ = [
    "check_foldable", "check_mergeable", "check_prompt_only", "fold_embedding", "is_tied", "merge_linears", "prompt_embeds",
    "untie",
]  # fmt: skip


# ----------------------------------------
# Adapters made part of the weights, where that is exact: AdaLink in the embedding table, LoRA in the linears.
#
# What comes out is a plain model: no hook, no adapter, any engine that loads it.


ROWS_AT_ONCE = 8192  # of the table, so that a large vocabulary needs no second copy in the edit's dtype


def check_foldable(methods: Mapping[str, Method]) -> None:
    """Raise ConfigError, before anything is loaded, for methods that are no table: AdaLink on text with scope `all` alone is one."""
    method = _check_only(methods, AdaLink, "folded")
    if method.modalities != ("text",) or method.scope != "all":
        raise ConfigError(
            f"only AdaLink on text alone with scope 'all' is a table, and this one has the modalities {', '.join(method.modalities)} and scope "
            f"{method.scope!r}: keep the adapter beside the model, or export the embeddings of prompts"
        )


def check_mergeable(methods: Mapping[str, Method]) -> None:
    """Raise ConfigError, before anything is loaded, for methods that are more than a LoRA."""
    _check_only(methods, LoRA, "merged")


def fold_embedding(model: nn.Module, adapter: Adapter) -> None:
    """Write E + up(act(down(E))) over the rows of the embedding table [V, D] of a frozen model, which no adapter is attached to.

    Trained copies of modules are written over the modules themselves.

    Exact for an adapter that is AdaLink on text with scope `all` and nothing else: the edit reads no context, so it is a table.
    Logits equal those with the adapter attached to rounding (bit for bit where the table's dtype is the edit's).

    Raises ConfigError where that is not so: another method, images, scope `prompt`, a head that is the same tensor (it would change
    too: see `untie`), an encoder-decoder model (whose decoder reads the same table and is not edited); AttachError where the embedding
    is more than a table.
    """
    check_foldable(adapter.methods)
    (placement,) = adapter.placements
    bottleneck = placement.edit
    assert isinstance(bottleneck, Bottleneck)
    _check_decoder(model)
    if image_token_ids(model):
        raise ConfigError("this model also reads images, whose tokens pass the same table before they are replaced: keep the adapter beside it")
    if is_tied(model):
        raise ConfigError(
            "this model's output head is its embedding table, so folding an adapter into one changes the other: "
            "untie them first, which stores the table twice, or keep the adapter beside the model"
        )
    table, dtype = _table(model).weight, bottleneck.down.weight.dtype
    write_copies(model, adapter)
    with torch.no_grad():
        for rows in table.split(ROWS_AT_ONCE):
            rows.copy_(bottleneck.lookup_table(rows.to(dtype)))


def merge_linears(model: nn.Module, adapter: Adapter) -> None:
    """Add s B A to the weight of every linear that a LoRA edits, and its bias to the linear's, of a model that no adapter is attached to.

    Trained copies of modules are written over the modules themselves.

    Exact to rounding for an adapter that is LoRA alone whose groups each edit every token of the model: `all`, or `text` in a model that
    reads nothing else. Of an encoder-decoder model the encoder is merged, since its linears are what was edited.

    Raises ConfigError where that is not so: another method, a group for some tokens, a bias for a linear that has none; AttachError for a
    linear that is no plain matrix. Nothing is changed then.
    """
    check_mergeable(adapter.methods)
    needed = {TEXT, ANSWER} | ({IMAGE} if image_token_ids(model) else set())
    stack = model.get_submodule(Anatomy.read(model).stack)
    placed = [(placement, stack.get_submodule(placement.port.module)) for placement in adapter.placements]
    for placement, linear in placed:
        _check_merge(placement, linear, needed)
    write_copies(model, adapter)
    with torch.no_grad():
        for placement, linear in placed:
            _merge(placement.edit, linear)  # type: ignore[arg-type]  # checked above


def is_tied(model: nn.Module) -> bool:
    """Whether the output head is the embedding table itself."""
    head = _head(model)
    return head is not None and head.weight is _table(model).weight


def untie(model: nn.Module) -> None:
    """Give the output head a table of its own, a copy [V, D], and say so in the model's config. Logits stay the same."""
    head: Any = _head(model)
    if is_tied(model):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _check_only(methods: Mapping[str, Method], kind: type[Any], verb: str) -> Any:
    if [type(method) for method in methods.values()] != [kind]:
        found = ", ".join(type(method).__name__ for method in methods.values())
        raise ConfigError(f"an adapter that is one {kind.__name__} alone can be {verb}, and this one has {found}: keep it beside the model")
    return next(iter(methods.values()))


def _check_decoder(model: nn.Module) -> None:
    if is_encoder_decoder(model):
        raise ConfigError(
            "this is an encoder-decoder model, whose adapters edit the encoder's inputs alone while its decoder reads the same table: "
            "keep the adapter beside the model"
        )


def _check_merge(placement: Placement, linear: nn.Module, needed: set[int]) -> None:
    where = placement.port.module
    if not needed <= set(placement.domains):
        raise ConfigError(
            f"the weights of {where} serve every token, and {placement.role} edits some of them: only a LoRA with one group for all domains, "
            "such as groups {all: [all]}, can be merged"
        )
    if type(linear) is not nn.Linear and not _is_conv1d(linear):
        raise AttachError(f"{where} is a {type(linear).__name__}, expected a linear with a plain weight matrix: load the model without quantization to merge")
    assert isinstance(placement.edit, LowRank)
    if placement.edit.bias is not None and linear.bias is None:
        raise ConfigError(f"{placement.role} has a bias and {where} has none: only a LoRA with bias none or auto can be merged here")


def _merge(edit: LowRank, linear: nn.Linear) -> None:
    """The target's features alone, where one linear makes queries, keys and values at once."""
    features = slice(edit.target.start, edit.target.stop)
    change = edit.scale * (edit.up.weight.double() @ edit.down.weight.double())  # [D_out, D_in]
    weight = linear.weight[:, features] if _is_conv1d(linear) else linear.weight[features]
    weight.copy_(weight.double() + (change.T if _is_conv1d(linear) else change))
    if edit.bias is not None:
        linear.bias[features].copy_(linear.bias[features].double() + edit.bias.double())


def _is_conv1d(linear: nn.Module) -> bool:
    """GPT-2's linear, which keeps its weight transposed: [D_in, D_out]."""
    return type(linear).__name__ == "Conv1D"


def _table(model: nn.Module) -> nn.Embedding:
    """The word embedding. Raises AttachError where it does more than to look up rows."""
    anatomy = Anatomy.read(model)
    found = model.get_submodule(anatomy.stack).get_submodule(anatomy.embedding)
    if type(found) is not nn.Embedding or found.max_norm is not None:
        raise AttachError(
            f"the word embedding is a {type(found).__name__} that does more than to look up rows, expected a plain table: keep the adapter beside it"
        )
    return found


def _head(model: nn.Module) -> Any:
    read = getattr(model, "get_output_embeddings", None)
    return read() if callable(read) else None


# ----------------------------------------
# Prompts as the embeddings that a frozen model reads once its adapter has edited them: what a serving engine can take in place of ids.


class _Read(Exception):
    """The embeddings were read; what comes after them is not needed."""

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds = embeds


def prompt_embeds(model: AdaptedModel, ids: Tensor, token_map: TokenMap) -> Tensor:
    """float [B, T, D]: the embeddings of the prompts `ids`, int64 [B, T], after every edit.

    The frozen model alone, given these as `inputs_embeds`, computes what it computes of the ids with the adapter attached, and goes on
    generating by itself. Raises ConfigError where that is not so (see check_prompt_only).
    """
    for name in model.adapters:
        if token_map.serving is None or model.indices[name] in token_map.serving:
            check_prompt_only(model.base, model.adapters[name])  # type: ignore[arg-type]  # a ModuleDict holds modules
    embedding = model.base.get_submodule(model.anatomy.stack).get_submodule(model.anatomy.embedding)

    def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        raise _Read(output)

    handle = embedding.register_forward_hook(read)  # after the attachment's own, so it sees what the edits made
    try:
        with model.attachment.bind(token_map):
            model.base.get_submodule(model.anatomy.stack)(input_ids=ids, use_cache=False)
    except _Read as found:
        return found.embeds
    finally:
        handle.remove()
    raise AssertionError("the stack ran without its word embedding")


def check_prompt_only(model: nn.Module, adapter: Adapter) -> None:
    """Raise ConfigError for an adapter that does more than to edit a prompt's embeddings: inside the layers, or what is generated."""
    for placement in adapter.placements:
        if placement.port.side != "embedding":
            raise ConfigError(
                f"{placement.role} edits the {placement.port.side} of {placement.port.module}, which prompt embeddings cannot carry: "
                "export adapters of the embedding alone (AdaLink, a bridge, a prompt whose positions are counted)"
            )
        if ANSWER in placement.domains and not is_encoder_decoder(model):
            names = {number: name for name, number in DOMAIN_NAMES.items()}
            raise ConfigError(
                f"{placement.role} also edits what is generated ({', '.join(names.get(d, str(d)) for d in placement.domains)}), which an engine that is given "
                "prompt embeddings reads raw: train AdaLink with scope 'prompt'"
            )
