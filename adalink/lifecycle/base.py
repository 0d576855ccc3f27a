"""Frozen language models that were changed, each with a fingerprint of its own: linears of low rank, shares of feed-forward units, steered gates.

    slim    W [n_out, n_in] = second [n_out, k] first [k, n_in], k = n_out n_in // (ratio (n_out + n_in))    PELA (arXiv 2310.10700)
    slice   the first share of each layer's feed-forward units                                               MatFormer (arXiv 2310.07707)
    steer   gate' = gate + alpha 1_rows (v . x): a LoRA of rank 1, which comes off again                     Model Surgery (arXiv 2407.08770)
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink.anatomy import Anatomy, Linear, in_rows, is_conv1d, text_config
from adalink.checkpoint.fingerprint import fingerprint
from adalink.checkpoint.precision import quantised_names
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from adalink.lifecycle.route import trained_gate
from adalink.methods.lora import LoRA
from adalink.methods.targets import every_token, find_targets

__all__ = [
    "SLIM_FILE", "FactoredLinear", "SlimFolder", "Steered", "Units", "closest_rows", "distil", "feature_loss", "fitted_probe", "norm_loss", "put_linears",
    "rank_of", "read_slim", "set_units", "slice_units", "slim_linears", "slim_names", "steered", "units_of", "weights_of", "write_slim",
]  # fmt: skip

FEWEST_OUTPUTS = 10  # PELA leaves smaller linears as they are
SLACK = 1e-3  # how far the product may be off anywhere before its loss counts it
FEATURES = 0.1  # PELA's weight of the feature loss
SEEN = 0.6  # a probe that is right less often on texts that it was not fitted to says nothing


# ----------------------------------------
# Linears of low rank.


class FactoredLinear(nn.Linear):
    """A linear whose weight is a product: y = second (first x) + bias; first [k, n_in], second [n_out, k]."""

    first: nn.Parameter
    second: nn.Parameter

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = first.shape[1], second.shape[0]
        self.first, self.second = nn.Parameter(first, requires_grad=False), nn.Parameter(second, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first), self.second, self.bias)

    def extra_repr(self) -> str:
        """With the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.first)}"


def rank_of(n_out: int, n_in: int, ratio: float) -> int:
    """k, with which the two factors have a ratio-th of the weights of [n_out, n_in]. A ratio of 1 is not the identity: k is below both."""
    return int((n_out * n_in) // (ratio * (n_out + n_in)))


def slim_names(model: nn.Module, ratio: float) -> list[str]:
    """Dotted names of the linears inside the layers that a ratio makes smaller. Raises ConfigError for a base that cannot be split, and for the ratio."""
    if not ratio >= 1:
        raise ConfigError(f"the ratio is {ratio}: give 1 or more, such as the published 3, which leaves a third of a linear's weights")
    if quantised := quantised_names(model):
        raise ConfigError(f"the weight {quantised[0]} is quantised, and a singular value decomposition needs its numbers: load the base in full precision")
    if any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ConfigError("this base is slim already: give the base that it was made of, and a larger ratio")
    anatomy = Anatomy.read(model)
    linears = [linear for linear in anatomy.linears if linear.n_out >= FEWEST_OUTPUTS]
    if small := [linear for linear in linears if rank_of(linear.n_out, linear.n_in, ratio) < 1]:
        one = small[0]
        raise ConfigError(f"a ratio of {ratio:g} leaves {one.name} ({one.n_out} x {one.n_in}) a rank of 0: give a smaller ratio")
    return [f"{anatomy.stack}.{linear.name}".lstrip(".") for linear in linears]


@torch.no_grad()
def slim_linears(model: nn.Module, ratio: float) -> dict[str, FactoredLinear]:
    """Split the linears of a frozen model by their singular values, in place: first = sqrt(S) V, second = U sqrt(S). By dotted name.

    The mean squared error of a product is that of the singular values that it drops. Raises as `slim_names`.
    """
    made = {}
    for name in slim_names(model, ratio):
        module = model.get_submodule(name)
        weight = _matrix(module)
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        k, root = rank_of(weight.shape[0], weight.shape[1], ratio), s.sqrt()
        first, second = root[:k, None] * v[:k], u[:, :k] * root[:k]
        factors = first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()
        made[name] = FactoredLinear(*factors, _detached(getattr(module, "bias", None)))
    put_linears(model, made)
    return made


def put_linears(model: nn.Module, linears: Mapping[str, FactoredLinear]) -> None:
    """Put linears in the places of a model's own."""
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear.train(model.training))


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def norm_loss(linears: Mapping[str, FactoredLinear], weights: Mapping[str, Tensor]) -> Tensor:
    """float []: the mean over linears of (max |U V - W| - 0.001)^2, which PELA adds to what is learned. weights [n_out, n_in] by name."""
    return torch.stack([((one.second @ one.first - weights[name]).abs().max() - SLACK).square() for name, one in linears.items()]).mean()


def feature_loss(found: Sequence[Tensor], wanted: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """float []: the mean over block outputs [B, T, D] of their mean squared difference, over the tokens of the mask, int64 [B, T]."""
    keep = torch.ones_like(found[0][..., 0]) if mask is None else mask.to(found[0].dtype)
    share = keep[..., None] / (keep.sum() * found[0].shape[-1])
    return torch.stack([((one - other).square() * share).sum() for one, other in zip(found, wanted, strict=True)]).mean()


def weights_of(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """W [n_out, n_in] of linears, by dotted name."""
    return {name: _matrix(model.get_submodule(name)) for name in names}


def distil(base: Any, slim: Any, batches: Iterable[tuple[Tensor, Tensor]], steps: int, rate: float) -> list[float]:
    """Train the factors of a slim model on texts, so that it gives what its base gives; the loss of each step.

    The loss is the next token's cross entropy plus 0.1 times the mean feature loss of all blocks but the last, plus the norm loss (PELA). AdamW, with
    a linear warm-up over a tenth of the steps and a cosine. base   the frozen model that was split; batches   ids and mask, int64 [B, T] each, repeated
    """
    factors = {name: module for name, module in slim.named_modules() if isinstance(module, FactoredLinear)}
    weights = {name: weight.detach() for name, weight in weights_of(base, list(factors)).items()}
    learned = [parameter for one in factors.values() for parameter in (one.first, one.second)]
    optimizer = torch.optim.AdamW([parameter.requires_grad_() for parameter in learned], lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))
    )
    losses = []
    for (ids, mask), _ in zip(itertools.cycle(batches), range(steps), strict=False):
        with torch.no_grad():
            wanted = base(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:-1]
        found = slim(input_ids=ids, attention_mask=mask, output_hidden_states=True, labels=torch.where(mask == 1, ids, -100))
        features = feature_loss(found.hidden_states[1:-1], wanted, mask) if wanted else found.loss * 0
        loss = found.loss + FEATURES * features + norm_loss(factors, weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for parameter in learned:
        parameter.requires_grad_(False).grad = None
    return losses


def _matrix(module: nn.Module) -> Tensor:
    """W [n_out, n_in]."""
    return in_rows(module.get_parameter("weight").detach(), module)


# ----------------------------------------
# The folder of a slim base: its factors, and where the base is that the rest comes from.


SLIM_FILE, FACTORS_FILE, FORMAT = "slim.json", "slim.safetensors", 1


@dataclass(frozen=True)
class SlimFolder:
    """What a folder says: the name and the fingerprint of the base, the ratio, and its linears by dotted name (their biases are the base's)."""

    base: str
    fingerprint: str
    ratio: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def put_into(self, model: nn.Module) -> None:
        """Make the base slim. Raises CheckpointError where it is another one."""
        found = fingerprint(model)
        if found != self.fingerprint:
            raise CheckpointError(f"this slim base was made of {self.base} ({self.fingerprint}), and {self.base} is now ({found}): make it again")
        biases = {name: getattr(model.get_submodule(name), "bias", None) for name in self.factors}
        put_linears(model, {name: FactoredLinear(first, second, _detached(biases[name])) for name, (first, second) in self.factors.items()})


def write_slim(folder: Path, base: str, model_fingerprint: str, ratio: float, linears: Mapping[str, FactoredLinear], report: Mapping[str, Any]) -> None:
    """Write the folder's two files; the one that names it a slim base comes last."""
    tensors = {f"{name}.{part}": getattr(one, part).detach().contiguous() for name, one in linears.items() for part in ("first", "second")}
    write_whole(folder / FACTORS_FILE, save(tensors))
    content = {"format": FORMAT, "base": {"name": base, "fingerprint": model_fingerprint}, "ratio": ratio, "report": dict(report)}
    write_whole(folder / SLIM_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_slim(folder: Path) -> SlimFolder:
    """The folder of a slim base. Raises CheckpointError where it is damaged."""
    try:
        content, tensors = json.loads((folder / SLIM_FILE).read_text()), load_file(folder / FACTORS_FILE)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder / SLIM_FILE} has format {content['format']}, and this version of adalink reads {FORMAT}: update adalink")
        names = sorted(name.removesuffix(".first") for name in tensors if name.endswith(".first"))
        factors = {name: (tensors[f"{name}.first"], tensors[f"{name}.second"]) for name in names}
        return SlimFolder(content["base"]["name"], content["base"]["fingerprint"], content["ratio"], factors)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a slim base that can be read ({error}): was it cut off?") from None


# ----------------------------------------
# Shares of the feed-forward units.


WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")  # what configs call the number of units


@dataclass(frozen=True)
class Units:
    """A layer's feed-forward network: the linears that give its units, the one that reads them, by dotted name; how many there are."""

    opening: tuple[str, ...]
    closing: str
    n: int


def units_of(model: nn.Module) -> tuple[Units, ...]:
    """Those of each layer. Raises ConfigError where a layer has none that is understood."""
    anatomy = Anatomy.read(model)
    found = []
    for layer in anatomy.layers:
        inside = [linear for linear in anatomy.linears if linear.name.startswith(f"{layer}.")]
        closing = inside[-1]
        opening = [one for one in inside[:-1] if one.n_out == closing.n_in and one.n_in == closing.n_out and _beside(one, closing)]
        if not opening or closing.n_out != anatomy.layer_width:
            raise ConfigError(f"{layer} of {type(model).__name__} has no feed-forward network that is understood: give a model such as Llama, OPT or GPT-2")
        names = [f"{anatomy.stack}.{one.name}".lstrip(".") for one in (*opening, closing)]
        found.append(Units(tuple(names[:-1]), names[-1], closing.n_in))
    return tuple(found)


def _beside(one: Linear, other: Linear) -> bool:
    return one.name.rpartition(".")[0] == other.name.rpartition(".")[0]


@torch.no_grad()
def slice_units(model: nn.Module, shares: Sequence[float]) -> tuple[int, ...]:
    """Leave each layer the first share of its feed-forward units, in place; how many each has left. One share is for all layers.

    Raises ConfigError for shares that are none, or not as many as layers.
    """
    units = units_of(model)
    given = tuple(shares) * len(units) if len(shares) == 1 else tuple(shares)
    if len(given) != len(units):
        raise ConfigError(f"{len(given)} shares were given, and the model has {len(units)} layers: give one for all, or one for each")
    if bad := [share for share in given if not 0 < share <= 1]:
        raise ConfigError(f"a share is {bad[0]}: give more than 0 and at most 1")
    if quantised := quantised_names(model):
        raise ConfigError(f"the weight {quantised[0]} is quantised, and rows are cut from full ones: load the base in full precision")
    left = tuple(max(1, int(share * one.n)) for share, one in zip(given, units, strict=True))
    for n, one in zip(left, units, strict=True):
        for name in one.opening:
            _cut(model.get_submodule(name), n, side="out")
        _cut(model.get_submodule(one.closing), n, side="in")
    return left


def _cut(module: nn.Module, n: int, *, side: str) -> None:
    transposed = is_conv1d(module)
    weight, is_out = module.get_parameter("weight"), side == "out"
    cut = weight[:n] if is_out != transposed else weight[:, :n]
    module.register_parameter("weight", nn.Parameter(cut.detach().clone(), requires_grad=False))
    if is_out and getattr(module, "bias", None) is not None:
        module.register_parameter("bias", nn.Parameter(module.get_parameter("bias")[:n].detach().clone(), requires_grad=False))
    setattr(module, ("nf" if is_out else "nx") if transposed else ("out_features" if is_out else "in_features"), n)


def set_units(model: Any, left: Sequence[int]) -> None:
    """Say in a sliced model's config how many units its layers have. Raises ConfigError where its family has one number for all, and they differ."""
    config = text_config(model.config)
    name = next((one for one in WIDTHS if hasattr(config, one)), None)
    if name is None:
        raise ConfigError(f"the config of {type(model).__name__} does not say how many feed-forward units there are, so no folder can hold a slice of it")
    if isinstance(getattr(config, name), list | tuple):
        setattr(config, name, list(left))
    elif len(set(left)) > 1:
        raise ConfigError(
            f"{name} of {config.model_type} is one number for all layers, and these slices have {', '.join(map(str, left))} units: give one share for all"
        )
    else:
        setattr(config, name, left[0])


# ----------------------------------------
# A direction of the hidden states, and the gates that move along it.


def fitted_probe(negative: Tensor, positive: Tensor, seed: int = 0) -> tuple[Tensor, float]:
    """v [D] of a linear probe on states [N, D] of two kinds of texts, and the share of the fifth of them that was held out which it tells apart.

    v is the row of the positive kind. Raises ConfigError for fewer than ten of a kind, and where it is right in less than 60 %.
    """
    fewest = min(len(negative), len(positive))
    if fewest < 10:
        raise ConfigError(f"a probe has {len(negative)} and {len(positive)} texts: give ten or more of each kind")
    rows = torch.cat([negative, positive]).double()
    label = torch.tensor([0] * len(negative) + [1] * len(positive))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held, learned = order[: len(rows) // 5], order[len(rows) // 5 :]
    gate = trained_gate(rows[learned], label[learned], 2, 1, seed)
    right = float((gate(rows[held]).argmax(1) == label[held]).double().mean())
    if right < SEEN:
        raise ConfigError(f"the probe tells {100 * right:.0f} % of the held-out texts apart, and 60 % is the least: give texts that differ, or more of them")
    assert gate.fc2 is not None
    return gate.fc2.weight[1].detach(), right


def gates_of(model: nn.Module) -> tuple[str, ...]:
    """The linear of each layer whose rows are gates, by its name in the stack: the one called so, else the first of the feed-forward network."""
    stack = Anatomy.read(model).stack
    names = [next((name for name in one.opening if "gate" in name.rpartition(".")[2]), one.opening[0]) for one in units_of(model)]
    return tuple(name.removeprefix(f"{stack}.") for name in names)


def closest_rows(model: nn.Module, v: Tensor, n: int, layers: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(layer, row) of the n gates g of the largest -cos(g, v), over these layers together (all, where none are named).

    Raises ConfigError for a direction of another width, and for more rows than there are.
    """
    anatomy, gates = Anatomy.read(model), gates_of(model)
    if unknown := [layer for layer in layers if not 0 <= layer < len(gates)]:
        raise ConfigError(f"layer {unknown[0]} is outside the model, which has {len(gates)}: give numbers of 0 to {len(gates) - 1}")
    chosen = list(layers) or list(range(len(gates)))
    weights = [_matrix(model.get_submodule(f"{anatomy.stack}.{gates[layer]}".lstrip("."))) for layer in chosen]
    if v.shape != weights[0].shape[1:]:
        raise ConfigError(f"the probe has {len(v)} numbers, and the gates of this model read {weights[0].shape[1]}: fit it on this model")
    scores = torch.stack([-nn.functional.cosine_similarity(weight.double(), v.double()[None]) for weight in weights])
    if not 1 <= n <= scores.numel():
        raise ConfigError(f"{n} rows were asked for, and these layers have {scores.numel():,}: give 1 or more, and at most as many")
    order = scores.flatten().argsort(descending=True, stable=True)[:n]
    return [(chosen[int(i) // scores.shape[1]], int(i) % scores.shape[1]) for i in order]


@dataclass(frozen=True)
class Steered:
    """A LoRA of rank 1 and its tensors, by the names that an adapter gives them."""

    method: LoRA
    tensors: Mapping[str, Tensor]


def steered(
    model: nn.Module, v: Tensor, alpha: float, rows: Sequence[tuple[int, int]], groups: Mapping[str, tuple[str, ...]] | None = None
) -> Steered:
    """gate' = gate + alpha 1_rows (v . x) as a LoRA called `lora`: A is v, B is alpha at the rows. groups: one group, of the tokens that it is for."""
    anatomy, gates = Anatomy.read(model), gates_of(model)
    left_out = tuple(layer for layer in range(len(gates)) if layer not in {layer for layer, _ in rows})
    (last,) = {name.rpartition(".")[2] for name in gates}
    method = LoRA(groups=groups or every_token(), rank=1, alpha=1.0, targets=(_suffix(gates, last),), exclude_layers=left_out)
    (group,) = method.groups
    tensors: dict[str, Tensor] = {}
    for target in find_targets(anatomy, method.targets, (), left_out):
        layer = gates.index(target.linear.name)
        up = torch.zeros(target.width, 1, dtype=v.dtype)
        up[[row for at, row in rows if at == layer]] = alpha
        tensors |= {f"lora.{group}.{target.role}.down.weight": v[None].clone(), f"lora.{group}.{target.role}.up.weight": up}
    return Steered(method, tensors)


def _suffix(gates: Sequence[str], last: str) -> str:
    """What all gates' paths end with, from the layer's number on: `mlp.gate_proj`."""
    parts = [name.split(".") for name in gates]
    n = 1
    while n < len(parts[0]) and len({tuple(one[-n - 1 :]) for one in parts}) == 1:
        n += 1
    return ".".join(parts[0][-n:]) if n > 1 else last
