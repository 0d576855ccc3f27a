"""What each family of language models lets its texts share: a row, a cache, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multimodal.prefill import has_row_cache

__all__ = ["EAGER_FAMILIES", "SDPA_FAMILIES", "may_fork", "may_pack", "windows"]

# Families that take a 4D mask with position ids, each proven equal in tests/multimodal/test_packing_families.py. Others may refuse one
# (Bloom), or take it and be silently wrong (MPT, and Gemma2 where sdpa drops its cap).
SDPA_FAMILIES = frozenset(
    "biogpt falcon gemma gemma3_text gpt2 gpt_neox llama mistral olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm".split()
)
EAGER_FAMILIES = frozenset("gemma2 gpt_neo gptj xglm".split())

_ROTATES_BY_LENGTH = ("dynamic", "longrope")  # rotations that depend on how long the call's rows are


def may_pack(model: Any) -> bool:
    """Whether the model is exact with several texts in a row, told by a 4D mask and position ids."""
    config = model.config
    if config.model_type in SDPA_FAMILIES:
        implementations: tuple[str, ...] = ("sdpa", "eager", "flex_attention")
    else:
        implementations = ("eager",) if config.model_type in EAGER_FAMILIES else ()
    if config._attn_implementation not in implementations:
        return False
    # Falcon's ALiBi and GPT-Neo's local layers count from the row's beginning, whatever the positions are.
    counts_columns = getattr(config, "alibi", False) or "local" in (getattr(config, "attention_layers", None) or ())
    return not counts_columns and not getattr(config, "use_bidirectional_attention", False)


def may_fork(model: Any) -> bool:
    """Whether the model reads a text after the kept keys and values of what came before as it would read both at once.

    Not where attention looks ahead (an encoder; pictures and prompts of PaliGemma), where states and not tokens are kept (Mamba), and
    where rotations change with a row's length.
    """
    config = model.config
    # Composite models mark pictures that are read both ways.
    if config.get_text_config() is not config or not model.can_generate() or not has_row_cache(model):
        return False
    looks_ahead = not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False)
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return not looks_ahead and not _is_encoder(model) and rotation not in _ROTATES_BY_LENGTH


def windows(config: Any) -> Mapping[str, int | None]:
    """Kind of layer -> how many places back it reads, itself among them; {"": None} where all layers are alike and read everything.

    The names are those under which the model takes its masks.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention", "sliding_attention"} or kinds == {"sliding_attention"}:
        return {"full_attention": None, "sliding_attention": window}
    return {"": window if not kinds and getattr(config, "use_sliding_window", True) else None}


def _is_encoder(model: Any) -> bool:
    """Whether the model's attention says that it is not causal."""
    said = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(said) and not any(said)
