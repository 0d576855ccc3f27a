"""The two frozen parts of scenes, as they ship: a timm encoder and a causal language model, trained apart."""

from __future__ import annotations

from pathlib import Path

from adalink.errors import ConfigError

__all__ = ["encoder_folder", "language_folder", "part_folder"]

_HERE = Path(__file__).parent


def encoder_folder() -> Path:
    """A timm folder: `timm.create_model(f"local-dir:{encoder_folder()}", pretrained=True, num_classes=0)`."""
    return _HERE / "encoder"


def language_folder() -> Path:
    """A transformers folder: `AutoModelForCausalLM.from_pretrained(language_folder())`, and its tokenizer."""
    return _HERE / "language"


def part_folder(name: str) -> Path:
    """The folder of `scenes:encoder` or `scenes:language`, by what follows the colon. Raises ConfigError for another name."""
    folders = {"encoder": encoder_folder, "language": language_folder}
    if name not in folders:
        raise ConfigError(f"there is no embedded part 'scenes:{name}': there are {' and '.join(f'scenes:{known}' for known in folders)}")
    return folders[name]()
