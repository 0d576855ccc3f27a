"""What an adapter is bound to: the weights of a frozen model, and what else decides what it computes.

Weights are compared by a hash. Everything else that changes a result and no weight is compared with a tolerance, so that another processor, or
another precision, is not another model: settings of its config, the tokenizer, statistics that are no weights, how images are prepared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalink.attachment.attachment import Attachment
from adalink.attachment.existing import is_encoder_decoder
from adalink.edit import tied_names, weight_of
from adalink.tokens import BASE_ROW, TEXT, TokenMap

__all__ = ["FrozenPart", "Sketch", "differences", "fingerprint", "note_weights", "part_from_json", "part_of", "part_to_json", "sketch_of_states"]


# ----------------------------------------
# A tensor in a few of its values: enough to distinguish it from another, with a tolerance that a hash does not have.


N_SKETCHED = 256  # values of a tensor


@dataclass(frozen=True)
class Sketch:
    """A tensor's shape and evenly spaced values of it, to five digits."""

    shape: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor, n: int = N_SKETCHED) -> Sketch:
        """Of any tensor, in up to `n` values."""
        flat = tensor.detach().float().flatten().cpu()
        picked = flat[:: max(len(flat) // n, 1)][:n]
        return cls(tuple(tensor.shape), tuple(float(f"{value:.5g}") for value in picked.tolist()))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sketch:
        """The reverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError where something does not fit."""
        return cls(tuple(map(int, content["shape"])), tuple(map(float, content["values"])))

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))}, from {min(self.values):.3g} to {max(self.values):.3g}"

    def difference(self, other: Sketch) -> float:
        """The largest, as a share of the larger range; 1 where the shapes differ or a value is no number."""
        if self.shape != other.shape or len(self.values) != len(other.values):
            return 1.0
        ranges = (max(sketch.values) - min(sketch.values) for sketch in (self, other))
        gap = max(abs(one - two) for one, two in zip(self.values, other.values, strict=True)) / max(*ranges, 1e-9)
        return gap if gap == gap else 1.0


N_SAMPLED = 1024  # values of each tensor that go into a fingerprint: 7 B parameters take a second, not a minute
N_COMPARED = 1024  # values of all tensors that are compared where precisions differ, and not less than one of each
# A sketch of each, and how far it may be off as a share of its range. Measured with plain, AVX2 and AVX-512 kernels: hidden states are off by up to
# 0.009 between float32, bfloat16 and float16. Features of a network with batch norms are off by 0.03 between float32 and float16, but by 0.08 between
# two processors in bfloat16, and by 0.46 between that and float32. One step in 255 of a normalised image is 0.004 of it.
TOLERANCES = {"states": 0.05, "pixels": 0.05, "features": 0.05}
FEATURES_IN_BFLOAT16 = 0.2
WORDS = {
    "states": "a model that makes other hidden states of the same tokens",
    "pixels": "images that are prepared otherwise",
    "features": "an encoder that makes other features of the same image",
}
# Settings of a config that change nothing of what a frozen model computes, or that its weights or its precision determine.
SILENT = re.compile(
    r"^_|dtype|drop|_token_id$|_token_index$|^output_|use_cache|architectures|version|initializer|label|problem_type|name_or_path|gradient|return_dict|loss|"
    r"^tie_|quantization|torchscript|task|^finetuning|tokenizer|generat|^model_type$|chunk_size_feed_forward|^(min|max)_length$|beam|^do_sample$|^top_[kp]$|"
    r"^temperature$|^typical_p$|penalty|ngram|bad_words|length_penalty|early_stopping|pruned_heads|attn_implementation|pretraining_tp|auto_map|distributed"
)


@dataclass(frozen=True)
class FrozenPart:
    """A frozen model that an adapter was trained on.

    name         the name or folder it was loaded from
    fingerprint  of its weights, as the checkpoint has them
    dtype        of its weights, as they are computed with
    precision    how its weights are quantised; empty where they are not
    weights      hex: some of its weights in bfloat16, for where a precision has another fingerprint
    buffers      hex: the same of what is not trained, such as the statistics of a batch norm
    config       settings of its config, by their dotted names
    tokenizer    16 hex digits that stand for what the tokenizer makes of texts
    processor    16 hex digits that stand for how images are prepared: size, crop, mean, filter
    sketches     `states` of fixed tokens, `pixels` and `features` of a test image

    Of parts that an earlier version wrote, name and fingerprint alone are known; what is unknown is not compared.
    """

    name: str
    fingerprint: str
    dtype: str = ""
    weights: str = ""
    buffers: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    sketches: Mapping[str, Sketch] = field(default_factory=dict)
    precision: str = ""
    processor: str = ""

    @property
    def kind(self) -> str:
        """`bfloat16`, or `nf4` where that is its precision; empty where it is unknown."""
        return self.precision or self.dtype


@dataclass(frozen=True)
class CheckpointWeight:
    """What identifies a parameter, of its values in the checkpoint.

    sampled  1,024 evenly spaced values in bfloat16, as bytes
    some     a few of them, for `FrozenPart.weights`
    """

    shape: tuple[int, ...]
    sampled: bytes
    some: bytes


@dataclass(frozen=True)
class CheckpointWeights:
    """What identifies a model's parameters, from before they were cast or quantised; `dtype` and `precision` are those after it."""

    of: Mapping[str, CheckpointWeight]
    dtype: str = ""
    precision: str = ""


_NOTED = "checkpoint_weights"  # the attribute of a module


def note_weights(model: nn.Module, *, dtype: str, precision: str = "") -> None:
    """Note what identifies the model's weights, before they are cast or quantised: its fingerprint is then the same in every precision."""
    parameters = _parameters(model, ())
    n = max(N_COMPARED // max(len(parameters), 1), 1)
    of = {name: _identified(weight_of(model, name), n) for name, _ in parameters}
    setattr(model, _NOTED, CheckpointWeights(of, dtype, precision))


def part_of(model: nn.Module, *, name: str = "", without: Sequence[str] = ()) -> FrozenPart:
    """A model as a frozen part: by the name it was loaded from, or its class where it has none.

    without: modules that are no part of it, by their dotted names.
    """
    config: Any = getattr(model, "config", None)
    noted: CheckpointWeights | None = getattr(model, _NOTED, None)
    parameters = _parameters(model, without)
    return FrozenPart(
        name or getattr(config, "name_or_path", "") or type(model).__name__,
        fingerprint(model, without=without),
        dtype=noted.dtype if noted else str(parameters[0][1].dtype).removeprefix("torch.") if parameters else "",
        precision=noted.precision if noted else "",
        weights=_noted_weights(noted, without) if noted else _some([weight_of(model, name) for name, _ in parameters]),
        buffers=_some([tensor for _, tensor in sorted(model.named_buffers()) if tensor.is_floating_point()]),
        config=_settings(config),
    )


def fingerprint(model: nn.Module, *, without: Sequence[str] = ()) -> str:
    """16 hex digits that stand for a model's weights: names, shapes, and 1,024 evenly spaced values of each tensor.

    Values are compared in bfloat16, so a model loaded in float32 and in bfloat16 has one fingerprint; loaded in float16, which rounds otherwise, it has
    another. Of a model that `note_weights` saw before it was cast, the values are the checkpoint's. Buffers do not count, nor does what lies in the
    modules `without`, by their dotted names.
    """
    digest = hashlib.sha256()
    noted: CheckpointWeights | None = getattr(model, _NOTED, None)
    left_out = tuple(f"{module}." for module in without)
    for name in [name for name in noted.of if not name.startswith(left_out)] if noted else [name for name, _ in _parameters(model, without)]:
        weight = noted.of[name] if noted else _identified(weight_of(model, name), 0)
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(weight.sampled)
    return digest.hexdigest()[:16]


def _identified(tensor: Tensor, n: int) -> CheckpointWeight:
    """Of a parameter's values; n: how many of them are compared with a tolerance."""
    flat = tensor.detach().reshape(-1)
    sampled = flat[:: max(flat.numel() // N_SAMPLED, 1)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
    return CheckpointWeight(tuple(tensor.shape), sampled, _picked(flat, n) if n else b"")


def _noted_weights(noted: CheckpointWeights, without: Sequence[str]) -> str:
    """As `_some`; empty for a part of the model, of which other values would be compared."""
    return "" if without else b"".join(weight.some for weight in noted.of.values()).hex()


def differences(was: FrozenPart, now: FrozenPart) -> Iterator[str]:
    """What of a frozen part is not as an adapter knew it: "was trained on <was>, and this one is <now>", as both halves of a sentence."""
    if was.fingerprint != now.fingerprint and not _same_in_other_precision(was, now):
        yield f"{was.name} ({was.fingerprint}), but this one is {now.name} ({now.fingerprint}){_precision_advice(was, now)}"
        return  # for another model, no further difference matters
    for name in sorted(was.config.keys() & now.config.keys()):
        if was.config[name] != now.config[name]:
            yield f"{was.name} with {name} {was.config[name]!r} in its config, but here {name} is {now.config[name]!r}"
    if was.tokenizer and now.tokenizer and was.tokenizer != now.tokenizer:
        yield f"{was.name} with another tokenizer, which makes other ids of the same text"
    if len(was.buffers) == len(now.buffers) and not _alike(was.buffers, now.buffers):  # another version of a library may have other ones
        yield f"{was.name} with other buffers (values that are no weights, such as the statistics of batch norms)"
    for name in TOLERANCES:
        tolerance = _tolerance(name, was, now)
        if name in was.sketches and name in now.sketches and (gap := was.sketches[name].difference(now.sketches[name])) > tolerance:
            yield f"{was.name} with {WORDS[name]} (they differ by {100 * gap:.0f} % of the range, {100 * tolerance:.0f} % at most are a processor's)"


def part_to_json(part: FrozenPart) -> dict[str, Any]:
    """A part as plain data, without what is unknown of it."""
    return {name: value for name, value in dataclasses.asdict(part).items() if value or name in ("name", "fingerprint")}


def part_from_json(content: Mapping[str, Any]) -> FrozenPart:
    """The reverse. Raises KeyError, TypeError, ValueError or AttributeError where something does not fit."""
    sketches = {name: Sketch.from_json(sketch) for name, sketch in content.get("sketches", {}).items()}
    return FrozenPart(**{**content, "sketches": sketches})


def _parameters(model: nn.Module, without: Sequence[str]) -> list[tuple[str, Tensor]]:
    unknown, tied = tuple(f"{module}." for module in without), tied_names(model)
    retained = ((name, tensor) for name, tensor in model.named_parameters() if name not in tied and not name.startswith(unknown))
    return sorted(retained, key=lambda pair: pair[0])


def _some(tensors: Sequence[Tensor]) -> str:
    """Hex of evenly spaced values of each tensor, in bfloat16; empty where some lie elsewhere."""
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return ""
    n = max(N_COMPARED // len(tensors), 1)
    return b"".join(_picked(tensor.detach().reshape(-1), n) for tensor in tensors).hex()


def _picked(flat: Tensor, n: int) -> bytes:
    return flat[:: max(flat.numel() // n, 1)][:n].to(torch.bfloat16).view(torch.int16).cpu().numpy().astype("<i2").tobytes()


def _alike(one: str, two: str) -> bool:
    """Whether values that were rounded otherwise are the same: each within one step of bfloat16, or of float16's smallest numbers."""
    if one == two or len(one) != len(two):
        return one == two
    first, second = (torch.frombuffer(bytearray.fromhex(values), dtype=torch.bfloat16).double() for values in (one, two))
    return bool(((first - second).abs() <= first.abs() * 2**-7 + 2**-24).all())


def _same_in_other_precision(was: FrozenPart, now: FrozenPart) -> bool:
    """Of float16, which has another fingerprint than float32 and bfloat16 have."""
    return "float16" in (was.dtype, now.dtype) and bool(was.weights) and _alike(was.weights, now.weights)


def _tolerance(name: str, was: FrozenPart, now: FrozenPart) -> float:
    """How far a sketch may be off; 1 where it says nothing."""
    dtypes = {was.dtype, now.dtype}
    if was.precision != now.precision and name != "pixels":
        return 1.0
    if name != "features" or "bfloat16" not in dtypes:
        return TOLERANCES[name]
    return FEATURES_IN_BFLOAT16 if len(dtypes) == 1 else 1.0


def _precision_advice(was: FrozenPart, now: FrozenPart) -> str:
    """A fingerprint of an earlier version is alone; in float16 the same weights have another."""
    if "float16" not in (was.dtype, now.dtype) or (was.weights and now.weights):
        return ""
    return f", loaded in {now.dtype}, in which precision the same weights have another fingerprint (load it in float32 or bfloat16 to compare)"


def _settings(config: Any) -> dict[str, Any]:
    """Dotted name -> value of what a config says of computing; {} where there is no config."""
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        return {}
    content = json.loads(json.dumps(to_dict(), default=str))

    def flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        for name, inner in value.items():
            if SILENT.search(name):
                continue
            if isinstance(inner, dict):
                yield from flat(f"{prefix}{name}.", inner)
            elif inner is not None:
                yield f"{prefix}{name}", inner

    return dict(flat("", content))


# ----------------------------------------
# The output of a frozen language model for a few fixed tokens: it distinguishes the model from another with the same weights.


N_TOKENS, N_DECODED, N_VALUES = 12, 4, 64


@torch.no_grad()
def sketch_of_states(attachment: Attachment, image_ids: Sequence[int]) -> dict[str, Sketch]:
    """`states`: the last hidden states of the stack, without any adapter (of an encoder-decoder model, what its decoder gives).

    {} for a model whose weights are not there, or that does not run on tokens alone.
    """
    model: Any = attachment.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return {}
    device = next(attachment.stack.parameters()).device
    allowed = [token for token in range(attachment.anatomy.vocabulary) if token not in image_ids][:50_000]
    ids = torch.tensor([[allowed[(7919 * i + 11) % len(allowed)] for i in range(N_TOKENS)]], device=device)
    token_map = TokenMap(torch.full_like(ids, TEXT), torch.full((1,), BASE_ROW, device=device), serving=frozenset())
    has_decoder = is_encoder_decoder(model) and not image_ids
    call, given = (model, {"decoder_input_ids": ids[:, :N_DECODED]}) if has_decoder else (attachment.stack, {})
    try:
        with attachment.bind(token_map), torch.autocast(device.type, enabled=False):
            output = call(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    except Exception:  # of any model that needs more than tokens: it is bound by what else is known of it
        return {}
    found = getattr(output, "logits", None)
    states = getattr(output, "last_hidden_state", None) if found is None else found
    return {} if states is None else {"states": Sketch.of(states, N_VALUES)}
