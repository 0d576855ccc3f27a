"""Adapters in a few bits a weight (ComPEFT, arXiv 2311.13171): what training changed, rounded or as signs with one size, beside a start that is drawn again.

The signs are those of the entries that changed most, and all of them change by alpha standard deviations of the whole change. Unlike the paper, which
takes a LoRA's start for zeros, the start is taken off first: its noise is larger than what training adds to it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adalink.attachment.modules_to_save import copied
from adalink.checkpoint.compressed import COMPRESSED_FILE, ZERO, CompressionMethod, encode, read_compressed
from adalink.checkpoint.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, load_weights, read_config, write_adapter
from adalink.edit import Adapter
from adalink.errors import CheckpointError, ConfigError
from adalink.files import new_folder
from adalink.lifecycle.flat import Flat, derived_from, read_flat
from adalink.model import AdaptedModel

__all__ = ["Coded", "check_compressed", "check_settings", "coded", "compress", "copy_beside", "decompress", "size_of_change", "source_of", "strongest"]


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A compressed adapter.

    content   the file
    weights   what a reader makes of it, by tensor
    n         weights of the adapter
    density   share of the weights that differ from the start
    retained  share of the change's squared norm that lies in those weights
    error     ||change as coded - change|| / ||change||
    """

    content: bytes
    weights: Mapping[str, Tensor]
    n: int
    density: float
    retained: float
    error: float

    @property
    def bits(self) -> float:
        """Of the file for each weight, its header too."""
        return 8 * len(self.content) / self.n

    def summary(self, n_before: int) -> str:
        """One line. n_before: bytes of the uncompressed file."""
        return (
            f"{n_before:,} -> {len(self.content):,} bytes ({n_before / len(self.content):.1f} times less; {16 / self.bits:.1f} times less than float16), "
            f"{self.bits:.2f} bits a weight with the header; {100 * self.density:.1f} % of the weights change, with {100 * self.retained:.1f} % of the "
            f"squared norm; relative error {self.error:.3f}"
        )


def compress(
    folder: Path, out: Path, *, method: CompressionMethod = "int4", keep: float = 0.5, alpha: float = 1.5, start: Flat | None
) -> Coded:
    """Write an adapter folder that holds codes in place of weights; every reader of adapter folders takes it.

    keep, alpha  of ternary: the share of weights that change, and by how many standard deviations
    start        what the change is counted from (`adalink.lifecycle.flat.start_of`); None: zeros, at a loss

    Parts beside the adapter (an adapted encoder, an answer head) are copied as they are.
    Raises ConfigError for values out of range, CheckpointError for a folder that is compressed already or equals its start.
    """
    config, flat = read_config(folder), source_of(folder)
    done = coded(flat, start, method=method, keep=keep, alpha=alpha)
    of_signs = {"keep": keep, "alpha": alpha, "changed": done.density} if method == "ternary" else {}
    settings = {"method": method, **of_signs, "start": ZERO if start is None else "drawn"}
    with new_folder(out) as part:
        copy_beside(folder, part)
        write_adapter(part, done.weights, dataclasses.replace(config, derived=derived_from("compress", {str(folder): flat}, settings)), compressed=done.content)
    return done


def source_of(folder: Path) -> Flat:
    """The weights of a folder that is to be compressed. Raises CheckpointError where it is compressed already."""
    if (folder / COMPRESSED_FILE).exists():
        raise CheckpointError(f"the adapter in {folder} is compressed already, by {read_compressed(folder / COMPRESSED_FILE).method}: decompress it first")
    return read_flat(folder)


def coded(flat: Flat, start: Flat | None, *, method: CompressionMethod = "int4", keep: float = 0.5, alpha: float = 1.5) -> Coded:
    """The codes of an adapter's weights, and what they decode to. Arguments and errors as in `compress`."""
    check_settings(keep, alpha)
    change = flat.vector if start is None else flat.vector - start.vector
    if not change.any():
        raise CheckpointError("the adapter equals its start, so there is nothing to compress: was it trained?")
    scale = size_of_change(change, alpha) if method == "ternary" else 0.0
    chosen = flat.over(strongest(change, keep).double() if method == "ternary" else change)
    shaped = {name: chosen.vector[place].reshape(shape) for (name, place), shape in zip(chosen.parts().items(), flat.shapes, strict=True)}
    dtypes, base = dict(zip(flat.names, flat.dtypes, strict=True)), None if start is None else start.tensors()
    content, decoded = encode(shaped, dtypes, method, base, ZERO if start is None else start.digest, scale)
    found = torch.cat([decoded.changes[name].flatten() for name in flat.names])
    norm, moved = change.square().sum(), found != 0
    return Coded(
        content=content, weights=decoded.added(base), n=len(change), density=float(moved.double().mean()), retained=float(change[moved].square().sum() / norm),
        error=float(((found - change).square().sum() / norm).sqrt()),
    )  # fmt: skip


def check_settings(keep: float, alpha: float) -> None:
    """Raise ConfigError where one is out of range."""
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}: give the share of the weights that change, above 0 and up to 1")
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"alpha is {alpha}: give a number above 0, such as 1.5")


def check_compressed(folder: Path) -> None:
    """Raise CheckpointError where a folder is not compressed."""
    if not (folder / COMPRESSED_FILE).exists():
        raise CheckpointError(f"the adapter in {folder} is not compressed: it has no {COMPRESSED_FILE}, so give a folder of `adalink compress`")


def decompress(folder: Path, out: Path, frozen: AdaptedModel) -> None:
    """Write a compressed adapter as an ordinary folder: byte for byte the weights that loading it and saving it give.

    frozen  the frozen model that it was trained on, for its start
    Raises CheckpointError where the folder is not compressed, is damaged, or its start cannot be drawn again.
    """
    check_compressed(folder)
    config = read_config(folder)
    adapter = Adapter(config.methods, frozen.anatomy, copied(frozen.base, frozen.anatomy, config.modules_to_save))
    load_weights(folder, adapter)
    with new_folder(out) as part:
        copy_beside(folder, part)
        write_adapter(part, adapter.tensors(), config, adapter.n_parameters())


def copy_beside(folder: Path, out: Path) -> None:
    """What a folder holds beside the adapter itself: an adapted encoder, an answer head."""
    for path in sorted(folder.iterdir()):
        if path.name not in (WEIGHTS_FILE, COMPRESSED_FILE, CONFIG_FILE, CARD_FILE):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)


def strongest(change: Tensor, keep: float) -> Tensor:
    """int8 [P]: the signs of the entries of float64 [P] whose magnitude is among the share `keep` of the greatest, with every tie; 0 elsewhere.

    As the authors' code, it is those from the (P - int(P keep))-th smallest on: one entry more than the share.
    """
    magnitude = change.abs()
    n_less = len(change) - int(len(change) * keep * (1 + 1e-12))  # 0.29 of 100 is 28.999999999999996
    least = torch.kthvalue(magnitude, n_less).values if n_less else magnitude.min()
    return (change.sign() * (magnitude >= least)).to(torch.int8)


def size_of_change(change: Tensor, alpha: float) -> float:
    """What each entry with a sign changes by: alpha standard deviations (unbiased) of all P entries, those that are dropped too."""
    return alpha * float(change.std())
