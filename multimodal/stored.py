"""The fingerprint of a part whose weights lie in a folder, read through the memory map: a few pages of each tensor, not the whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adalink import fingerprint
from adalink.errors import DataError
from multimodal.blueprint import draw_language
from multimodal.encoders.blueprint import draw_encoder
from multimodal.frozen import existing_folder
from multimodal.language import LanguageUse

__all__ = ["language_fingerprint", "stored_fingerprint", "tower_fingerprint"]


def tower_fingerprint(spec: str | Path) -> str:
    """The fingerprint of the vision tower of a folder, as an adapter keeps it; empty where `spec` is a name, or it cannot be said."""
    folder = existing_folder(spec)
    if folder is None:
        return ""
    tower = nn.Module()  # as a VisionTower holds its encoder
    tower.encoder = draw_encoder(folder).module
    return stored_fingerprint(tower, tower.get_submodule("encoder.model"), folder)


def language_fingerprint(name_or_folder: str | Path, use: LanguageUse = "write") -> str:
    """The same of a language model."""
    folder = existing_folder(name_or_folder)
    if folder is None:
        return ""
    model = draw_language(folder, use=use).model
    return stored_fingerprint(model, model, folder)


def stored_fingerprint(module: nn.Module, part: nn.Module, folder: Path) -> str:
    """The fingerprint that `module` has once the folder's weights are loaded into `part` of it; empty where that cannot be said.

    module, part   on the meta device; the part is `module` itself or inside it, and holds the weights afterwards
    folder         with *.safetensors

    Empty where there are none, or where their names are not the module's (then only loading can say it). Raises DataError for a
    damaged file.
    """
    stored = _mapped(folder)
    own = dict(part.named_parameters())
    fitting = [names for names in _renamings(own, stored) if all(stored[names[name]].shape == wanted.shape for name, wanted in own.items())]
    if len(fitting) != 1:
        return ""
    part.load_state_dict({name: stored[fitting[0][name]].to(wanted.dtype) for name, wanted in own.items()}, strict=False, assign=True)
    tie = getattr(part, "tie_weights", None)
    if callable(tie):  # a head that is the embedding is not stored
        tie()
    return "" if any(parameter.is_meta for parameter in module.parameters()) else fingerprint(module)


def _renamings(own: Iterable[str], stored: Collection[str]) -> Iterator[dict[str, str]]:
    """Own name -> stored name, for each one word that the stored names may have before them all, and for none."""
    for word in {"", *(name.partition(".")[0] + "." for name in stored)}:
        if all(word + name in stored for name in own):
            yield {name: word + name for name in own}


def _mapped(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files, in memory only where it is read."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise DataError(f"the weights {path} cannot be read: {error}; fetch the file again") from error
    return tensors

