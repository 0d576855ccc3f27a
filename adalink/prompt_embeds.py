"""Prompts as the embeddings that a frozen model reads once its adapter has edited them: what a serving engine can take in place of ids."""

from __future__ import annotations

from torch import Tensor, nn

from adalink.edit import Adapter
from adalink.errors import ConfigError
from adalink.existing import is_encoder_decoder
from adalink.model import AdaptedModel
from adalink.tokens import ANSWER, DOMAIN_NAMES, TokenMap

__all__ = ["check_prompt_only", "prompt_embeds"]


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
