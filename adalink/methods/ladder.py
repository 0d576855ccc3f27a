"""LST, ladder side-tuning (arXiv 2206.06522): a narrow copy of the frozen model beside it, which reads its layers and through which alone gradients flow.

    s_0 = D_0 h_0                                    h_0: what enters the first layer;  h_i: what layer i gives
    z_i = mu_i s_{i-1} + (1 - mu_i) D_i h_i          mu_i = sigmoid(a_i / temperature), one number for each rung
    s_i = Block_i(z_i)                               the host's own layer, with widths and heads divided by the reduction
    h' = U Norm(s_L)                                 in place of the final norm's output (`replace`), or added to it (`add`)

The frozen layers get h_0 without its gradient, so they store nothing for a backward pass, whatever is trained before them: that learns through s_0.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, FrozenModule, setting
from adalink.attachment.beside import CACHES, further_cache
from adalink.attachment.slots import HiddenFromReader, HideKeys, without_positions
from adalink.edit import Placement, Port, Slots
from adalink.errors import AttachError, ConfigError
from adalink.methods.targets import domains_of
from adalink.tokens import IMAGE, PAD, Tokens

__all__ = ["Ladder"]


# ----------------------------------------
# The host's layers at a part of their width.


# What configs call the widths of a layer, and what they call its share of dropped features.
WIDTHS = (
    "hidden_size", "intermediate_size", "head_dim", "ffn_dim", "word_embed_proj_dim", "n_embd", "n_inner", "d_model", "d_ff", "d_kv", "ffn_hidden_size",
    "dim", "hidden_dim",
)  # fmt: skip


MASKS = ("attention_mask", "mask")  # what layers call theirs
NUMBER = ("layer_idx", "layer_id")  # what layers call their own
HAS_TABLE = "has_relative_attention_bias"  # what T5's layers are built with


def narrowed(config: Any, reduction: int) -> Any:
    """A copy of a stack's config whose widths are divided by the reduction, and whose layers drop nothing."""
    made = copy.deepcopy(config)
    for name, value in vars(config).items():
        if name in WIDTHS and isinstance(value, int) and not isinstance(value, bool):
            setattr(made, name, value // reduction)
        elif ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(made, name, 0.0)
    if sections := _sections(config):
        made.rope_parameters["mrope_section"] = [size // reduction for size in sections]
    return made


def _sections(config: Any) -> list[int]:
    """Pairs of a head's features that are rotated by time, height and width (Qwen2-VL); none elsewhere."""
    return list((getattr(config, "rope_parameters", None) or {}).get("mrope_section") or ())


def narrow_layer(stack: nn.Module, host: nn.Module, config: Any, number: int, reduction: int, *, is_first: bool) -> nn.Module:
    """A layer of the host's class with the narrower config, started as the host starts its own. Raises AttachError where its widths are others.

    is_first  whether it is the one that makes the biases for distances, which the others share (T5)
    """
    kind: Any = type(host)
    settings = {**dict.fromkeys(NUMBER, number), HAS_TABLE: is_first}
    try:
        layer: nn.Module = kind(config, **{name: settings[name] for name in inspect.signature(kind).parameters if name in settings})
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise AttachError(_not_narrow(config, kind, f"its class says {error}")) from error
    tables = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Embedding)}  # of distances, by head
    for name, narrow in layer.named_parameters():
        if narrow.ndim > 1 and name not in tables and [n * reduction for n in narrow.shape] != list((wide := host.get_parameter(name)).shape):
            raise AttachError(_not_narrow(config, kind, f"{name} is {list(narrow.shape)}, of {list(wide.shape)}"))
    starts: Any = copy.copy(stack)
    starts.__dict__["config"] = config
    for module in layer.modules():
        vars(module).update({name: 0 for name in NUMBER if name in vars(module)})  # it has a cache of its own (adalink.attachment.beside)
        if hasattr(starts, "_init_weights"):
            starts._init_weights(module)
    return layer.requires_grad_(True)


def _not_narrow(config: Any, kind: type, what: str) -> str:
    tried = ", ".join(name for name in WIDTHS if isinstance(vars(config).get(name), int))
    return (
        f"a {kind.__name__} of a narrower width cannot be built ({what}; settings that were divided: {tried or 'none'}), and the ladder's layers are such: "
        "choose a model like Llama, Qwen2, OPT or GPT-2, or another method"
    )


def narrow_norm(host: nn.Module, width: int) -> nn.Module:
    """A norm of the host's kind for another width, which scales by its start: 1 (or 0, where a kind adds 1)."""
    if isinstance(host, nn.LayerNorm):
        return nn.LayerNorm(width, eps=host.eps, elementwise_affine=host.elementwise_affine, bias=host.bias is not None)
    kind: Any = type(host)
    eps = next(({"eps": getattr(host, name)} for name in ("eps", "variance_epsilon") if hasattr(host, name)), {})
    made: nn.Module = kind(width, **eps)
    return made.requires_grad_(True)


# ----------------------------------------
# The parts.


_numbers = itertools.count()


class Number:
    """A number that no other ladder has, nor a copy of this one: the mark of its keys and values in a cache."""

    def __init__(self) -> None:
        self.value = next(_numbers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Number:
        return Number()

    def __reduce__(self) -> tuple[type[Number], tuple[()]]:
        return Number, ()


class Start(nn.Module):
    """s_0 of a call, which stands in `Tokens.drawn` under this module, and is replaced by each rung."""

    def __init__(self, width: int, reduction: int, config: Any) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.config, self.number, self.host = config, Number(), FrozenModule()

    def read_frozen(self, module: nn.Module, name: str) -> None:
        """Take the first layer, whose attention may be changed after this (sdpa, eager): the mask that comes with a call is for that one."""
        self.host.module = next((part for part in module.modules() if hasattr(part, "config")), None)

    def forward(self, h: Tensor, tokens: Tokens, call: Mapping[str, Any]) -> None:
        tokens.drawn[self] = self.down(h)
        attention = getattr(getattr(self.host.module, "config", None), "_attn_implementation", None)
        if attention != self.config._attn_implementation:
            self.config._attn_implementation = attention


class Turns(nn.Module):
    """The rotations of narrower heads, made from the positions that the host's own are made from: by kind of layer, where the host has kinds (Gemma 3)."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, h: Any, tokens: Tokens, call: Mapping[str, Any]) -> None:
        tokens.drawn.setdefault(self, {})[call.get("layer_type")] = self.rotary(**call)


class Rung(nn.Module):
    """The mix of the ladder's state with what the layer gave, through a narrow layer that is called as the host's was."""

    def __init__(self, block: nn.Module, width: int, reduction: int, mix: Mix) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.gate = nn.Parameter(torch.full((1,), mix.alpha))
        self.block = block
        self.mix = mix

    def forward(self, h: Tensor, tokens: Tokens, call: Mapping[str, Any]) -> None:
        start, drawn = self.mix.start, tokens.drawn
        share, read = torch.sigmoid(self.gate / self.mix.temperature), self.down(h.detach())
        if self.mix.mask is not None:
            read = read.masked_fill(tokens.among((IMAGE,)), 0)
        z = share * drawn[start].to(h.device) + (1 - share) * read
        result = self.block(**{**call, next(iter(call)): z, **self._own(tokens, call)})
        drawn[start] = result[0] if isinstance(result, tuple) else result
        if self.mix.has_distances:
            drawn[start.down] = result[1]

    def _own(self, tokens: Tokens, call: Mapping[str, Any]) -> dict[str, Any]:
        """What is the ladder's own of the arguments that the host's layer was called with."""
        mix = self.mix
        own: dict[str, Any] = {}
        if mix.turns is not None:
            turned = tokens.drawn[mix.turns]
            own["position_embeddings"] = turned[mix.kind if mix.kind in turned else None]
        if mix.has_distances:
            own |= {"position_bias": self._distances(tokens), "encoder_decoder_position_bias": None}
        if mix.mask is not None:
            own |= {name: _like(tokens.drawn[mix.mask], call[name], self.gate.dtype) for name in MASKS if name in call}
        if mix.encoded is not None:
            own["encoder_hidden_states"], is_real = mix.encoded.of(tokens)
            own["encoder_attention_mask"] = _like(is_real, call["encoder_attention_mask"], self.gate.dtype)
        for name in CACHES:
            if call.get(name) is not None:
                own[name] = further_cache(call[name], (mix.start.number.value, mix.layer), mix.layer, mix.n_layers, tokens.n_before)
        return own

    def _distances(self, tokens: Tokens) -> Tensor | None:
        """float [B, H, T, T]: what an earlier rung made of distances; None where the block makes it. An image that stands beside the text has none."""
        found: Tensor | None = tokens.drawn.get(self.mix.start.down)
        if found is not None or self.mix.mask is None:
            return found
        attention: Any = next(module for module in self.block.modules() if hasattr(module, "relative_attention_bias"))
        is_image, n = tokens.among((IMAGE,)), tokens.domain.shape[1]
        made: Tensor = attention.compute_bias(n, n, device=self.gate.device)
        return made.masked_fill((is_image | is_image.mT)[:, None], 0)


class Seen(nn.Module):
    """The mask of a layer before an image is hidden in it, for the rung beside the layer."""

    def forward(self, mask: Tensor, tokens: Tokens, domains: tuple[int, ...], adapter: int) -> Tensor:
        tokens.drawn[self] = mask
        return mask


def _like(mask: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask as the attention of the host's layer takes its own: bool, True where a token may be read, or numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    if other is None or other.dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Mix:
    """A rung's place and settings, and the parts of its ladder that it reads and does not own.

    kind           of the layer, where the host's are of several
    has_distances  whether the first rung makes the biases for distances, and hands them on (T5)
    encoded        in a decoder, the end of the ladder beside its encoder
    mask           where an image is in the ladder alone, what knows the mask that does not hide it
    """

    layer: int
    n_layers: int
    alpha: float
    temperature: float
    start: Start
    turns: Turns | None
    kind: str | None
    has_distances: bool
    encoded: Encoded | None
    mask: Seen | None


class Encoded(nn.Module):
    """What the ladder beside an encoder ends with, for the ladder beside its decoder: Norm(s_L), where the host's own output stays."""

    def __init__(self, norm: nn.Module, start: Start) -> None:
        super().__init__()
        self.norm, self.start = norm, (start,)

    def forward(self, h: Tensor, tokens: Tokens, call: Mapping[str, Any]) -> None:
        tokens.drawn[self] = (self.norm(tokens.drawn.pop(self.start[0])), (tokens.domain != PAD)[:, None, None])

    def of(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, T, d], and bool [B, 1, 1, T] where it may be read: for each row of a decoder's call, of which beams have one each.

        Raises AttachError where the encoder ran elsewhere.
        """
        found, is_real = tokens.drawn.get(self, (None, None))
        if found is None or len(tokens.row) % len(found):
            raise AttachError(
                "the decoder was given what an encoder made in another call, and the ladder beside the decoder reads the ladder beside the encoder: "
                "run both in one call of the model, inside one `bind`"
            )
        n = len(tokens.row) // len(found)
        return found.repeat_interleave(n, 0), is_real.repeat_interleave(n, 0)


class End(nn.Module):
    """U Norm(s_L), in place of what the host ends with or added to it: then U is 0 at the start."""

    def __init__(self, norm: nn.Module, width: int, reduction: int, output: str, start: Start) -> None:
        super().__init__()
        self.norm, self.up = norm, nn.Linear(width // reduction, width)
        self.output, self.start = output, (start,)
        if output == "add":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        state = tokens.drawn.pop(self.start[0], None)
        if state is None:
            raise AttachError("the ladder's end ran without its rungs: run the whole frozen model in one call")
        made: Tensor = self.up(self.norm(state.to(h.device)))
        return h + made if self.output == "add" else made


@dataclass(frozen=True)
class Side:
    """A ladder beside one stack: its settings, the stack and the names of its parts, and the layers that are read. of: as in Port."""

    method: Ladder
    stack: Any
    layers: tuple[str, ...]
    final_norm: str | None
    rotary: str | None
    rungs: tuple[int, ...]
    of: Literal["stack", "reader"]
    width: int

    def placed(self, role: str, encoded: Encoded | None = None, *, is_read: bool = False) -> list[Placement]:
        """Its placements, under roles that begin so. is_read: whether a decoder's ladder reads it, and no head."""
        r, every = self.method.reduction, domains_of(("all",))
        config = narrowed(self.stack.config, r)
        start = Start(self.width, r, config)
        placed = [Placement(f"{role}start", Port(self.layers[0], "detached", self.of), start, every)]
        turns = None
        if self.rotary is not None:
            turns = Turns(type(self.stack.get_submodule(self.rotary))(config))
            placed.append(Placement(f"{role}turns", Port(self.rotary, "beside", self.of), turns, every))
        for i in self.rungs:
            host = self.stack.get_submodule(self.layers[i])
            block = narrow_layer(self.stack, host, config, i, r, is_first=i == self.rungs[0])
            kind = (getattr(config, "layer_types", None) or {i: None})[i]
            has_distances = HAS_TABLE in inspect.signature(type(host)).parameters
            seen = Seen() if self.method.image == "side_only" and self.of == "stack" else None
            if seen is not None:
                placed.append(Placement(f"{role}seen.{i}", Port(self.layers[i], "mask"), seen, (IMAGE,)))
            mix = Mix(i, len(self.layers), self.method.alpha, self.method.gate_temperature, start, turns, kind, has_distances, encoded, seen)
            placed.append(Placement(f"{role}rungs.{i}", Port(self.layers[i], "beside", self.of), Rung(block, self.width, r, mix), every))
        norm = nn.Identity() if self.final_norm is None else narrow_norm(self.stack.get_submodule(self.final_norm), self.width // r)
        last = self.final_norm or self.layers[-1]
        if is_read:
            return [*placed, Placement(f"{role}end", Port(last, "beside", self.of), Encoded(norm, start), every)]
        end = End(norm, self.width, r, self.method.output, start)
        return [*placed, Placement(f"{role}end", Port(last, "output", self.of), end, every, whole_call=True)]


# ----------------------------------------
# The method.


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A network beside the frozen model, of its own layers at 1 / reduction of their width; the number of heads is the model's."""

    reduction: int = 8  # r of all widths: the model's, the feed-forward network's and the heads'; 4 and 8 are published
    rungs: Literal["all"] | tuple[int, ...] = "all"  # the layers that are read, counted from 0; others are passed over
    decoder_rungs: Literal["all"] | tuple[int, ...] | None = None  # of an encoder-decoder model's decoder; None: as rungs
    output: Literal["replace", "add"] = "replace"  # what the head reads: the ladder's output alone, as published, or added to the model's
    image: Literal["detached", "side_only"] = "detached"  # side_only: the model reads the text alone, and the ladder the image too, as published
    gate_temperature: float = 0.1  # of the sigmoid that mixes; 0.1 was published
    alpha: float = 0.0  # a_i at the start: 0 mixes equal shares

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.reduction < 1:
            raise ConfigError(f"the ladder's reduction is {self.reduction}: give 1 or more (4 and 8 were published)")
        for name in ("rungs", "decoder_rungs"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, value := tuple(value))
            is_named = value == "all" or (value is None and name == "decoder_rungs")
            if not is_named and (not isinstance(value, tuple) or not value or len(set(value)) < len(value)):
                raise ConfigError(f"the ladder's {name} are {value!r}: give all, or one or more layers, each once, for instance [1, 3, 5]")
        if self.output not in ("replace", "add"):
            raise ConfigError(f"the ladder's output is {self.output!r}: give replace or add")
        if self.image not in ("detached", "side_only"):
            raise ConfigError(f"the ladder's image is {self.image!r}: give detached or side_only")
        if not self.gate_temperature > 0:
            raise ConfigError(f"the ladder's gate_temperature is {self.gate_temperature}: give a number above 0 (0.1 was published)")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it stands beside the tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """The start before the first layer, a rung beside each layer that is read, and the end; twice for an encoder and its decoder.

        Raises ConfigError and AttachError.
        """
        model = anatomy.host.module
        if model is None:
            raise AttachError("the ladder is built of a language model's own layers, and there are none here: choose another method")
        stack: Any = model.get_submodule(anatomy.stack)
        self._check_reduction(anatomy, stack.config)
        rotary = anatomy.positions.module if anatomy.positions is not None and anatomy.positions.kind == "rotary" else None
        first = Side(self, stack, anatomy.layers, anatomy.final_norm, rotary, self._rungs(self.rungs, len(anatomy.layers)), "stack", anatomy.layer_width)
        hidden = self._hidden(anatomy)
        if anatomy.reader is None:
            return [*first.placed(""), *hidden]
        reader = model.get_submodule(anatomy.reader)
        path = anatomy.layers[0].rpartition(".")[0]
        layers = tuple(f"{path}.{i}" for i in range(len(list(reader.get_submodule(path).children()))))
        rungs = self._rungs(self.rungs if self.decoder_rungs is None else self.decoder_rungs, len(layers))
        second = Side(self, reader, layers, anatomy.final_norm, rotary, rungs, "reader", anatomy.layer_width)
        encoder = first.placed("encoder.", is_read=True)
        encoded = next(placement.edit for placement in encoder if isinstance(placement.edit, Encoded))
        return [*encoder, *second.placed("decoder.", encoded), *hidden]

    def _hidden(self, anatomy: Anatomy) -> list[Placement]:
        """What keeps an image out of the frozen model, where it is in the ladder alone: nothing reads it, and no position counts it."""
        if self.image == "detached":
            return []
        image = (IMAGE,)
        masks = [Placement(f"hidden.{i}", Port(layer, "mask"), HideKeys(), image) for i, layer in enumerate(anatomy.layers)]
        reader = [Placement("hidden_from_reader", Port("", "reader"), HiddenFromReader(), image)] if anatomy.reader else []
        return [*without_positions(anatomy, image), *masks, *reader]

    def _rungs(self, asked: Literal["all"] | tuple[int, ...], n: int) -> tuple[int, ...]:
        """The layers that are read, in order. Raises ConfigError where one is not there."""
        rungs = tuple(range(n)) if asked == "all" else tuple(sorted(asked))
        if wrong := [rung for rung in rungs if not 0 <= rung < n]:
            raise ConfigError(f"the ladder has a rung at layer {wrong[0]}, and this model has the layers 0 to {n - 1}: leave it out")
        return rungs

    def _check_reduction(self, anatomy: Anatomy, config: Any) -> None:
        """Raise ConfigError where the reduction does not divide a width."""
        inside = [size for linear in anatomy.linears for size in (linear.n_in, linear.n_out)]
        inner = setting(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or max(inside)
        heads = setting(config, "num_attention_heads", "num_heads", "n_head") or 1
        head = setting(config, "head_dim", "d_kv") or anatomy.layer_width // heads
        sections = {f"rotated section {i}": size for i, size in enumerate(_sections(config))}
        sizes = {"width": anatomy.layer_width, "feed-forward width": inner, "head width": head, **sections}
        step = 2 if anatomy.positions is not None and anatomy.positions.kind == "rotary" else 1  # rotations are of pairs
        fits = [one for one in range(1, head + 1) if all(size % one == 0 for size in sizes.values()) and head // one % step == 0]
        if self.reduction not in fits:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            odd = f", and heads of {head // self.reduction} that are rotated in pairs" if all(size % self.reduction == 0 for size in sizes.values()) else ""
            raise ConfigError(
                f"the ladder's reduction is {self.reduction}, which does not divide this model's {found}{odd} evenly: "
                f"give {min(fits, key=lambda one: abs(one - self.reduction))}, or another that does"
            )
