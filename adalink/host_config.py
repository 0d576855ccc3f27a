"""What the config of a frozen model says of its words: read where it stands, since a model of several parts keeps it in the config of one."""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["max_positions", "setting", "text_config", "token_ids"]

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
