"""The file adapter_model.compressed: what training changed in an adapter, in a few bits a weight, to be added to the adapter's start.

One safetensors file: the library checks its header, names, shapes and dtypes. Each tensor T of the adapter has

    ternary      T.code uint8: which entries changed, and their signs; `scale` float32 []: what each of them changed by
    int4         T.code uint8: two entries a byte, the first in the low half; T.scale [rows]: the step of each row
    int8         T.code int8: one entry a byte; T.scale as above
    T.change     of a vector (a norm, a bias) in int4 and int8: the change itself; nothing of a tensor that did not change
    sparse       T.index int32 [k] and T.value [k]: the entries that are not the start's, and their values, exactly; T.value alone, in the tensor's
                 shape, where most of them are not

Scales and changes are in float16 where that holds them to 0.1 %, else in float32. A row is what one index of the first dimension gives. The
metadata name the method, the digest of the start, the digest of what decoding gives, and each tensor's dtype, shape and code.

The code of a ternary tensor is a Rice code of the gaps between the entries that changed (Golomb 1966, Rice 1979), with the best parameter b: all
quotients in unary (ones, then a zero), all remainders of b bits, then the signs, one bit each. With b = 0 it is a bitmap of the entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from adalink.checkpoint.start import digest_of
from adalink.errors import CheckpointError

__all__ = [
    "COMPRESSED_FILE", "ZERO", "Code", "Compressed", "CompressionMethod", "decode_signs", "encode", "encode_signs", "encode_sparse", "read_compressed",
]  # fmt: skip

COMPRESSED_FILE = "adapter_model.compressed"
ZERO = "zero"  # in place of the digest of a start: all zeros
CompressionMethod = Literal["int8", "int4", "ternary"]
SPARSE = "sparse"  # what a method that trains few entries is written by
LEVELS = {"int8": 127, "int4": 7}  # the largest code, on both sides of 0
RICE = range(8)  # parameters that are tried
_FORMAT = "1"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_PLACES = torch.arange(7, -1, -1, dtype=torch.uint8)  # of bits in a byte, the highest first
_BYTES = (torch.arange(256)[:, None] >> _PLACES & 1).to(torch.uint8)  # the bits of each byte


# ----------------------------------------
# Signs as bits.


@dataclass(frozen=True)
class Code:
    """The signs of a tensor: how many are not zero, the Rice parameter b, and the bits, uint8 [bytes]."""

    n: int
    parameter: int
    bits: Tensor


def encode_signs(signs: Tensor) -> Code:
    """int8 [P] of -1, 0 and 1 as a code, of the smallest of the parameters."""
    where = signs.nonzero()[:, 0]
    n, gaps = len(where), where.diff(prepend=where.new_tensor([-1])) - 1
    best = min(RICE, key=lambda b: int((gaps >> b).sum()) + n * b)
    quotients, places = gaps >> best, torch.arange(best - 1, -1, -1)
    unary = torch.ones(int(quotients.sum()) + n, dtype=torch.uint8)
    unary[(quotients + 1).cumsum(0) - 1] = 0
    return Code(n, best, _packed(torch.cat([unary, ((gaps[:, None] >> places) & 1).to(torch.uint8).flatten(), (signs[where] > 0).to(torch.uint8)])))


def decode_signs(code: Code, size: int, name: str) -> Tensor:
    """int8 [size]: the reverse. Raises CheckpointError, by the tensor's name, where the bits end early, go on, or leave the tensor."""
    bits, n, b = _bits(code.bits), code.n, code.parameter
    ends = torch.from_numpy((bits == 0).numpy().nonzero()[0])[:n]  # numpy finds them five times as fast
    start = int(ends[-1]) + 1 if n and len(ends) == n else 0  # of the remainders
    after = start + n * b  # where the signs begin
    if b not in RICE or len(ends) < n or not after + n <= len(bits) < after + n + 8 or bits[after + n :].any():
        n_whole = min(len(ends), max(len(bits) - start, 0) // (b + 1)) if len(ends) == n else len(ends)
        what = f"ends after {n_whole:,} of {n:,} gaps" if n_whole < n else f"goes on after its {n:,} gaps"
        raise CheckpointError(f"{name}.code {what}: copy or compress it again")
    powers = 1 << torch.arange(b - 1, -1, -1)
    gaps = ((ends.diff(prepend=ends.new_tensor([-1])) - 1) << b) + (bits[start:after].view(n, b) * powers).sum(1)
    where = (gaps + 1).cumsum(0) - 1
    if n and int(where[-1]) >= size:
        raise CheckpointError(f"{name}.code goes to entry {int(where[-1]):,} of {size:,}: copy or compress it again")
    signs = torch.zeros(size, dtype=torch.int8)
    return signs.scatter_(0, where, 2 * bits[after : after + n].to(torch.int8) - 1)


def _packed(bits: Tensor) -> Tensor:
    """uint8 [N] of 0 and 1 -> uint8 [ceil(N / 8)], the first bit highest, zeros at the end."""
    whole = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (whole << _PLACES).sum(1, dtype=torch.uint8)


def _bits(packed: Tensor) -> Tensor:
    """The reverse, with the zeros at the end."""
    return _BYTES.index_select(0, packed.int()).flatten()


# ----------------------------------------
# The file.


@dataclass(frozen=True)
class Compressed:
    """What a file holds. changes: float64 in the adapter's shapes, in sparse the values and NaN for the start's; dtypes: of the adapter's tensors."""

    method: CompressionMethod | Literal["sparse"]
    start: str
    digest: str
    changes: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]

    def added(self, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The adapter's tensors: start + change, added in float64, or in sparse the values that are given. start: None for zeros."""
        if self.method == SPARSE:
            base = {name: torch.zeros_like(value) if start is None else start[name].to(value) for name, value in self.changes.items()}
            return {name: torch.where(value.isnan(), base[name], value).to(self.dtypes[name]) for name, value in self.changes.items()}
        return {
            name: (change if start is None else change + start[name].to(self.dtypes[name])).to(self.dtypes[name]) for name, change in self.changes.items()
        }

    def weights(self, start: Mapping[str, Tensor] | None, path: Path) -> dict[str, Tensor]:
        """As `added`. Raises CheckpointError where they are not what was written: another start, or a damaged file."""
        shapes, own = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (self.changes if start is None else start, self.changes))
        if shapes != own:
            other = next(name for name in sorted({*shapes, *own}) if shapes.get(name) != own.get(name))
            raise CheckpointError(f"{path} is damaged, or of other methods: {other} is {own.get(other)}, expected {shapes.get(other)}; copy it again")
        found = self.added(start)
        if digest_of(found) != self.digest:
            raise CheckpointError(f"{path} is damaged: its weights have the digest {digest_of(found)}, and {self.digest} was written; copy it again")
        return found


def encode(
    changes: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    method: CompressionMethod,
    start: Mapping[str, Tensor] | None,
    start_digest: str,
    scale: float,
) -> tuple[bytes, Compressed]:
    """The content of a file, and what reading it gives.

    changes   float64 in the adapter's shapes; in ternary their signs
    scale     of ternary: what an entry with a sign changes by
    start     what the changes are added to; None: zeros
    """
    tensors = {"scale": torch.tensor(scale, dtype=torch.float32)} if method == "ternary" else {}
    codes = {}
    for name, change in sorted(changes.items()):
        code: list[object] = [str(dtypes[name]).removeprefix("torch."), list(change.shape)]
        if method == "ternary":
            signs = encode_signs(change.sign().to(torch.int8).flatten())
            tensors[f"{name}.code"] = signs.bits
            code += [signs.n, signs.parameter]
        elif change.any():
            tensors |= {f"{name}.{part}": tensor for part, tensor in _rounded(change, method).items()}
        codes[name] = code
    metadata = {"format": _FORMAT, "method": method, "start": start_digest, "digest": "", "tensors": json.dumps(codes, separators=(",", ":"))}
    metadata["digest"] = digest_of(_read(tensors, metadata).added(start))
    return save(tensors, metadata), _read(tensors, metadata)


def encode_sparse(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor] | None, start_digest: str) -> bytes:
    """The content of a file of the entries that are not the start's; reading it gives `tensors` exactly, which hold no NaN. start: None for zeros."""
    stored, codes = {}, {}
    for name, tensor in sorted(tensors.items()):
        base = torch.zeros_like(tensor) if start is None else start[name].to(tensor)
        index = (tensor != base).flatten().nonzero()[:, 0]
        if len(index) * (4 + tensor.itemsize) >= tensor.nbytes or tensor.numel() >= 2**31:
            stored[f"{name}.value"] = tensor
        else:
            stored |= {f"{name}.index": index.int(), f"{name}.value": tensor.flatten()[index]}
        codes[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    metadata = {"format": _FORMAT, "method": SPARSE, "start": start_digest, "digest": digest_of(tensors), "tensors": json.dumps(codes, separators=(",", ":"))}
    return save(stored, metadata)


def read_compressed(path: Path) -> Compressed:
    """The file's content. Raises CheckpointError where it is missing, damaged, or of another version."""
    try:
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            return _read({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy or compress the adapter again") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or compress it again") from None


def _read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Compressed:
    if metadata.get("format") != _FORMAT or metadata["method"] not in (*LEVELS, "ternary", SPARSE):
        raise CheckpointError(f"the format is {metadata.get('format')}, and this version of adalink reads {_FORMAT}: update adalink")
    method, codes = metadata["method"], json.loads(metadata["tensors"])
    changes, used = {}, {"scale"} if method == "ternary" else set()
    for name, (_, shape, *rest) in codes.items():
        own = {part: tensors[f"{name}.{part}"] for part in ("code", "scale", "change", "index", "value") if f"{name}.{part}" in tensors}
        used |= {f"{name}.{part}" for part in own}
        if method == SPARSE:
            changes[name] = _scattered(own, shape, name)
        elif method == "ternary":
            n, parameter = map(int, rest)
            signs = decode_signs(Code(n, parameter, own["code"]), torch.Size(shape).numel(), name)
            changes[name] = signs.view(shape) * tensors["scale"].double()
        else:
            changes[name] = _unrounded(own, shape, method, name)
    if unknown := sorted(set(tensors) - used):
        raise CheckpointError(f"{unknown[0]} is of no tensor that the metadata list: copy or compress it again")
    dtypes = {name: _DTYPES[code[0]] for name, code in codes.items()}
    return Compressed(cast("CompressionMethod | Literal['sparse']", method), metadata["start"], metadata["digest"], changes, dtypes)


def _scattered(own: Mapping[str, Tensor], shape: list[int], name: str) -> Tensor:
    """float64 of the shape, NaN where the start's value stays. Raises CheckpointError for places out of order or after the end."""
    if "index" not in own:
        return own["value"].double().reshape(shape)
    index, size = own["index"].long(), torch.Size(shape).numel()
    if len(index) != len(own["value"]) or (len(index) and (int(index[0]) < 0 or int(index[-1]) >= size or not bool((index.diff() > 0).all()))):
        raise CheckpointError(f"{name}.index has {len(index):,} places out of order, or after the last of {size:,} entries: copy it again")
    return torch.full((size,), float("nan"), dtype=torch.float64).scatter_(0, index, own["value"].double()).reshape(shape)


# ----------------------------------------
# Whole numbers with a scale for each row.


def _rounded(change: Tensor, method: str) -> dict[str, Tensor]:
    """A tensor's part of the file, in int4 or int8: codes from -7 to 7, or from -127 to 127."""
    if change.dim() < 2:
        return {"change": _short(change)}
    most, rows = LEVELS[method], change.reshape(len(change), -1)
    scale = _short(rows.abs().amax(1) / most)
    step = scale.double().clamp(min=torch.finfo(torch.float64).tiny)
    codes = (rows / step[:, None]).round().clamp(-most, most).to(torch.int8)
    if method == "int8":
        return {"code": codes, "scale": scale}
    halves = torch.nn.functional.pad(codes.flatten() & 15, (0, codes.numel() % 2)).view(-1, 2).to(torch.uint8)
    return {"code": halves[:, 0] | (halves[:, 1] << 4), "scale": scale}


def _unrounded(own: Mapping[str, Tensor], shape: list[int], method: str, name: str) -> Tensor:
    """float64 of the shape. Raises CheckpointError where the code is of another length."""
    if not own or "change" in own:
        return own["change"].double().reshape(shape) if own else torch.zeros(shape, dtype=torch.float64)
    code, size = own["code"], torch.Size(shape).numel()
    if method == "int4":
        halves = torch.stack([code & 15, code >> 4], 1).flatten().to(torch.int8)
        code = ((halves ^ 8) - 8)[:size]
        if len(halves) - size not in (0, 1) or halves[size:].any():
            raise CheckpointError(f"{name}.code ends after {len(halves):,} of {size:,} entries, or goes on: copy or compress it again")
    return (code.view(shape[0], -1) * own["scale"].double()[:, None]).reshape(shape)


def _short(values: Tensor) -> Tensor:
    """In float16 where that holds each of them to 0.1 %, else in float32."""
    half = values.half()
    return half if bool(((half.double() - values).abs() <= 1e-3 * values.abs()).all()) else values.float()
