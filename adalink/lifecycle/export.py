"""Adapters for other programs: merged into the weights or written as a LoRA of peft where that is exact, or prompts as embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, is_conv1d, token_ids
from adalink.attachment.attach import attach
from adalink.attachment.existing import SOUND_KEYS, image_token_ids, is_encoder_decoder
from adalink.attachment.modules_to_save import write_copies
from adalink.checkpoint.peft_format import write_peft
from adalink.edit import Adapter, Method, Placement, execution_device, weight_of
from adalink.errors import AttachError, ConfigError
from adalink.methods.adalink import AdaLink, Bottleneck
from adalink.methods.budgets.adalora import AdaLoRA, Triplet
from adalink.methods.budgets.sparse import Delta, SparseDelta
from adalink.methods.hira import Hadamard, HiRA
from adalink.methods.lora import LoRA, LowRank
from adalink.model import AdaptedModel
from adalink.tokens import ANSWER, DOMAIN_NAMES, IMAGE, PAD, TEXT, TokenMap

__all__ = [
    "EmbeddingLora", "check_embedding_lora", "check_foldable", "check_mergeable", "check_prompt_only", "embedding_lora", "fold_embedding", "is_tied",
    "merge_linears", "prompt_embeds", "untie", "write_embedding_lora",
]  # fmt: skip


# ----------------------------------------
# Adapters made part of the weights, where that is exact: AdaLink in the embedding table, LoRA in the linears.
#
# What comes out is a plain model: no hook, no adapter, any engine that loads it.


ROWS_AT_ONCE = 8192  # of the table, so that a large vocabulary needs no second copy in the edit's dtype


def check_foldable(methods: Mapping[str, Method]) -> None:
    """Raise ConfigError, before anything is loaded, for methods that are no table: AdaLink on text with scope `all` alone is one."""
    method = _check_only(methods, AdaLink, "folded")
    if not _edits_text_alike(method):
        raise ConfigError(
            f"only AdaLink on text alone with scope 'all' is a table, and this one has the modalities {', '.join(method.modalities)} and scope "
            f"{method.scope!r}: keep the adapter beside the model, or export the embeddings of prompts"
        )


def _edits_text_alike(method: AdaLink) -> bool:
    """Whether every text token of an id is edited alike, wherever it stands, and nothing else is."""
    return method.modalities == ("text",) and method.scope == "all"


def check_mergeable(methods: Mapping[str, Method]) -> None:
    """Raise ConfigError, before anything is loaded, for more than one of the methods that `merge_linears` takes; trained copies alone have none."""
    if methods:
        kinds = list(map(type, methods.values()))
        method = _check_only(methods, next((kind for kind in (HiRA, AdaLoRA, SparseDelta) if kind in kinds), LoRA), "merged")
        if isinstance(method, HiRA) and len(method.groups) > 1:
            raise ConfigError(f"HiRA with one group can be merged, and this one has {', '.join(method.groups)}: keep it beside the model")


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
    """Add s B A to the weight of every linear that a LoRA or AdaLoRA edits (W * (B A) where it is HiRA, D where SparseDelta), and its bias to the linear's.

    The model has no adapter attached to it.

    Trained copies of modules are written over the modules themselves.

    Exact to rounding for an adapter that is LoRA, AdaLoRA, SparseDelta or HiRA alone whose groups each edit every token of the model: `all`, or `text`
    in a model that reads nothing else. Of an encoder-decoder model the encoder is merged, since its linears are what was edited.

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
            edit = placement.edit
            _merge(edit.as_lora() if isinstance(edit, Triplet) else edit, linear)  # type: ignore[arg-type]  # checked above


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
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        raise AttachError(f"{where} is a {type(linear).__name__}, expected a linear with a plain weight matrix: load the model without quantization to merge")
    if isinstance(placement.edit, LowRank) and placement.edit.bias is not None and linear.bias is None:
        raise ConfigError(f"{placement.role} has a bias and {where} has none: only a LoRA with bias none or auto can be merged here")


def _merge(edit: LowRank | Hadamard | Delta, linear: nn.Linear) -> None:
    """The target's features alone, where one linear makes queries, keys and values at once."""
    features = slice(edit.target.start, edit.target.stop)
    weight = linear.weight[:, features].T if is_conv1d(linear) else linear.weight[features]  # [D_out, D_in]
    product = edit.delta.double() if isinstance(edit, Delta) else edit.up.weight.double() @ edit.down.weight.double()
    change = edit.scale * product if isinstance(edit, LowRank) else weight.double() * product if isinstance(edit, Hadamard) else product
    weight.copy_(weight.double() + change)
    if isinstance(edit, LowRank) and edit.bias is not None:
        linear.bias[features].copy_(linear.bias[features].double() + edit.bias.double())


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
# AdaLink on text as a LoRA of the word embedding: the edit reads a token's own embedding alone, so each token has one value of it.


@dataclass(frozen=True)
class EmbeddingLora:
    """A LoRA of the word embedding: the embedding of the token t gains B A[:, t] (times the embedding's own scale, where it has one).

    module  dotted name of the word embedding in the model
    a       float [R, V]: act(down(E[t])) of every token, and a last row of ones where AdaLink has a bias; 0 for tokens that are no text
    b       float [D, R]
    """

    module: str
    a: Tensor
    b: Tensor


def check_embedding_lora(methods: Mapping[str, Method]) -> None:
    """Raise ConfigError, before anything is loaded, for methods that do not edit every text token of an id alike."""
    method = _check_only(methods, AdaLink, "written as a LoRA of the word embedding")
    if not _edits_text_alike(method):
        raise ConfigError(
            f"a LoRA of the word embedding edits a token by its id, in the prompt and in the answer, and never an image; this AdaLink has the modalities "
            f"{', '.join(method.modalities)} and scope {method.scope!r}: give one on text alone with scope 'all', or keep it beside the model"
        )


def embedding_lora(model: nn.Module, adapter: Adapter, example: Mapping[str, Any] | None = None) -> EmbeddingLora:
    """An adapter that is AdaLink on text with scope `all`, nonlinear or not, as a LoRA of the frozen model's word embedding.

    The model may read images and sounds too: their tokens have columns of zeros, and their vectors come from a tower.
    Exact to rounding in a model that edits rows of the table, times a number at most. peft leaves an output head alone that is the same table,
    so the head may be tied.

    example: arguments of a call with `input_ids`, on the model's device, for a model that does not run on words alone (BLIP-2).

    Raises ConfigError for other adapters, an encoder-decoder model (whose decoder reads the same table and is not edited), and a model that looks
    its images up in the same table; AttachError where the embedding is more than a table, or embeddings change before they are edited.
    """
    check_embedding_lora(adapter.methods)
    _check_decoder(model)
    if any(hasattr(module, "vocabulary_mapping") for module in model.modules()):
        raise ConfigError("this model looks its images up in the table of its words, which AdaLink on text leaves alone: keep the adapter beside the model")
    anatomy = Anatomy.read(model)
    module = f"{anatomy.stack}.{anatomy.embedding}".lstrip(".")
    table: Any = model.get_submodule(module)
    others = [token for token in (*image_token_ids(model), *token_ids(getattr(model, "config", None), *SOUND_KEYS)) if token < anatomy.vocabulary]
    bottleneck = adapter.placements[0].edit
    assert isinstance(bottleneck, Bottleneck)
    up, device = bottleneck.up.weight, execution_device(model, module)
    every = torch.arange(anatomy.vocabulary, device=device)
    words = every[~torch.isin(every, torch.tensor(others, device=device))][:12]
    scale = _scale(table, weight_of(model, f"{module}.weight"), words)
    _check_reads(model, adapter, table, example or {"input_ids": words[None]}, others)
    with torch.no_grad():
        a = torch.cat([bottleneck.act(bottleneck.down(table(ids).to(up))).T for ids in every.split(ROWS_AT_ONCE)], 1)  # [R, V]
        b = up.detach() / scale
        if bottleneck.up.bias is not None:
            a, b = torch.cat([a, torch.ones_like(a[:1])]), torch.cat([b, bottleneck.up.bias.detach()[:, None] / scale], 1)
        a[:, others] = 0
    return EmbeddingLora(module, a, b)


def write_embedding_lora(model: nn.Module, adapter: Adapter, folder: str | Path, example: Mapping[str, Any] | None = None) -> EmbeddingLora:
    """Write what `embedding_lora` makes as a folder that peft loads on the same model. Arguments and errors as there."""
    lora = embedding_lora(model, adapter, example)
    last, rank = lora.module.rpartition(".")[2], len(lora.a)
    is_only = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == last] == [lora.module]
    key = f"base_model.model.{lora.module}.lora_embedding_"
    write_peft(folder, adapter, model, {f"{key}A": lora.a, f"{key}B": lora.b}, r=rank, lora_alpha=rank, target_modules=[last if is_only else lora.module])
    return lora


@torch.no_grad()
def _scale(table: nn.Embedding, weight: Tensor, ids: Tensor) -> float:
    """What the embedding multiplies its rows by, as peft reads it. Raises AttachError where it does something else."""
    scale = torch.as_tensor(getattr(table, "embed_scale", 1.0), dtype=torch.float64)
    rows = weight[ids.to(weight.device)]
    if table.max_norm is not None or scale.numel() != 1 or not torch.allclose(table(ids).to(rows.device), rows * scale.to(rows), rtol=1e-2):
        raise AttachError(
            f"the word embedding is a {type(table).__name__} that does more than to look up rows and to multiply them by its embed_scale: "
            "keep the adapter beside the model"
        )
    return float(scale)


@torch.no_grad()
def _check_reads(model: Any, adapter: Adapter, table: nn.Module, example: Mapping[str, Any], others: list[int]) -> None:
    """Raise AttachError where the edit of words reads something else in this call than the word embedding gives. others: ids of images and sounds."""

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Read(args[0])

    ids: Tensor = example["input_ids"]
    is_word = ~torch.isin(ids, torch.tensor(others, device=ids.device)) & (ids < model.get_input_embeddings().num_embeddings)
    attachment = attach(model, adapter)
    handle = adapter.placements[0].edit.register_forward_pre_hook(read)
    found, reason = None, "it ran without editing a word"
    try:
        with attachment.bind(TokenMap(torch.where(is_word, TEXT, PAD), torch.zeros_like(ids[:, 0]))):
            model(**example)
    except _Read as stopped:
        found, reason = stopped.embeds, "it changes the embeddings of words between the look-up and the edit"
    except Exception as error:  # of any model that needs more than words
        reason = f"a call to find out ended with {type(error).__name__} (a model that does not run on words alone needs an example of its inputs)"
    finally:
        handle.remove()
        attachment.detach()
    if found is None or not torch.equal(found[is_word], table(ids[is_word]).to(found)):
        raise AttachError(f"a LoRA of the word embedding may be another edit in this {type(model).__name__}, since {reason}: keep the adapter beside the model")


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
    stack = model.base.get_submodule(model.anatomy.stack)

    def looked_up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        raise _Read(output)

    def merged(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_alone(kwargs)
        raise _Read(kwargs["inputs_embeds"])

    # Both after the attachment's own hooks, so they see what the edits made. A model that sees already puts its images among the words first.
    sees = token_map.host is not None
    embedding = stack.get_submodule(model.anatomy.embedding)
    handle = stack.register_forward_pre_hook(merged, with_kwargs=True) if sees else embedding.register_forward_hook(looked_up)
    try:
        with model.attachment.bind(token_map):
            (model.base if sees else stack)(input_ids=ids, use_cache=False)
    except _Read as found:
        return found.embeds
    finally:
        handle.remove()
    raise AssertionError("the stack ran without its word embedding")


def _check_alone(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError where a call of the layers is given more than embeddings, masks [B, T] and positions [B, T]."""
    plain = ("attention_mask", "position_ids")
    more = [name for name, value in arguments.items() if _has_tensor(value) and not (name in plain and isinstance(value, Tensor) and value.ndim == 2)]
    if more := sorted(set(more) - {"inputs_embeds", "cache_position"}):
        raise ConfigError(
            f"this model makes {', '.join(more)} of a prompt's images beside its embeddings, which a file of embeddings cannot carry: "
            "keep the adapter beside the model"
        )


def _has_tensor(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or any(map(_has_tensor, inside))


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
