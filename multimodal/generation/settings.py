"""The settings of generation: a run's, and what a command may choose in the place of those that an adapter was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from adalink.errors import CheckpointError, ConfigError

__all__ = ["GenerationChoice", "GenerationSettings", "saved_generation"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are generated."""

    max_new_tokens: int = 30  # eP-ALM's captions; VQA answers end sooner by themselves
    num_beams: int = 1  # 1 is greedy; 3 in eP-ALM, 5 in most captioning papers; a weak adapter does worse with more (tests/benchmarks/RESULTS.md)
    length_penalty: float = 1.0  # of beams: above 1 prefers longer texts
    cache: Literal["auto", "static"] = "auto"  # static: keys and values in memory of one size, which transformers compiles into CUDA graphs on a GPU

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.cache not in ("auto", "static"):
            raise ConfigError(f"generation.cache is {self.cache!r}: give auto or static")
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens} and num_beams {self.num_beams}: give 1 or more of each")


@dataclass(frozen=True, kw_only=True)
class GenerationChoice:
    """How texts are generated; what is left out is as the adapter was saved with."""

    max_new_tokens: int | None = None  # most tokens of a text
    num_beams: int | None = None  # 1 is greedy
    length_penalty: float | None = None  # of beams: above 1 prefers longer texts
    cache: Literal["auto", "static"] | None = None  # static: of one size, compiled into CUDA graphs on a GPU

    def over(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings with what was chosen in their place. Raises ConfigError as they do."""
        return replace(settings, **{name: value for name, value in vars(self).items() if value is not None})


def saved_generation(task: Mapping[str, Any]) -> GenerationSettings:
    """How the run that trained an adapter generated: what the task section of its config says, else the defaults.

    Names that are not known here, of a later version, are passed over. Raises CheckpointError on values of another type.
    """
    saved = task.get("generation", {})
    known = {field.name: saved[field.name] for field in fields(GenerationSettings) if field.name in saved} if isinstance(saved, dict) else saved
    try:
        return GenerationSettings(**known)
    except (TypeError, ConfigError) as error:
        found = f"the generation settings of the adapter's config are {str(saved)[:60]} ({error})"
        raise CheckpointError(f"{found}; expected max_new_tokens and num_beams, each 1 or more, and length_penalty") from None
