"""The names that modules had in earlier versions of transformers, from its own tables: what is stored under them is still read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["renamings"]


def renamings(model: nn.Module) -> Callable[[str], str]:
    """Maps a module's name in a file to its name in this model; a name that no table knows stays.

    Of LLaVA: `language_model.model.layers.0.mlp.up_proj` -> `model.language_model.layers.0.mlp.up_proj`. A name without the
    prefix of the model inside (a bare model's), or with one too many, is mapped too. Any other nn.Module has no earlier names.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return str
    if not isinstance(model, PreTrainedModel):
        return str
    tables = [table for table in get_model_conversion_mapping(model) if isinstance(table, WeightRenaming)]
    own: Mapping[str, Any] = model.state_dict()

    def renamed(name: str) -> str:
        key, _ = rename_source_key(f"{name}.weight", tables, [], model.base_model_prefix, own)
        return str(key).removesuffix(".weight")

    return renamed
