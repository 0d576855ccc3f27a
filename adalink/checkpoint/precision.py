"""The precision and the kernels of frozen weights: what they are cast to, how they are quantised, which attention runs."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from adalink.errors import ConfigError

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AS_SAVED", "UNCHANGED", "WITH_ENCODER", "BaseSettings", "Precision", "cast", "chosen_linears", "packed_bytes", "quantise", "quantised_names", "settle",
]  # fmt: skip

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantiser = Literal["auto", "none", "int8", "nf4", "fp8"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
DeviceMap = Literal["none", "auto", "balanced", "balanced_low_0", "sequential"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How one frozen part is held in memory and computed."""

    dtype: Dtype = "auto"  # of the weights; auto: as the checkpoint has them, or as the adapter was trained
    quantise: Quantiser = "auto"  # linear layers in 8 bits (int8, fp8) or 4 (nf4), needs torchao; auto: none, or as the adapter was trained
    attention: Attention = "auto"  # the kernel; auto: transformers' choice (sdpa where the model has it)

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        for name, kind in (("dtype", Dtype), ("quantise", Quantiser), ("attention", Attention)):
            if getattr(self, name) not in get_args(kind):
                advice = "; int4 has no gradients: nf4 has as many bits" if getattr(self, name) == "int4" else ""
                raise ConfigError(f"base: {name} is {getattr(self, name)!r}: give one of {', '.join(get_args(kind))}{advice}")

    def over(self, known: Precision) -> Precision:
        """These where they are given, else those that are known."""
        given = {name: value for name, value in vars(self).items() if value != "auto"}
        return Precision(**{**vars(known), **given})

    @property
    def quantiser(self) -> str:
        """`int8`, `nf4` or `fp8`; empty where nothing is quantised."""
        return "" if self.quantise in ("auto", "none") else self.quantise

    def __str__(self) -> str:
        """`bfloat16 nf4`: what was chosen; empty where all is as in the checkpoint."""
        return " ".join(filter(None, (self.dtype if self.dtype != "auto" else "", self.quantiser)))

    @staticmethod
    def of(text: str) -> Precision:
        """The reverse of its text."""
        words = text.split()
        dtype = next((word for word in words if word in get_args(Dtype)), "auto")
        quantiser = next((word for word in words if word in get_args(Quantiser)), "auto")
        return Precision(dtype=dtype, quantise=quantiser)  # type: ignore[arg-type]  # words of these lists

    @property
    def loading(self) -> dict[str, str]:
        """What transformers' `from_pretrained` takes of them. Raises ConfigError where the kernel is not there."""
        if self.attention == "flash_attention_2":
            _check_flash()
        return {} if self.attention == "auto" else {"attn_implementation": self.attention}


AS_SAVED = Precision()


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """How the frozen parts are held in memory: the language model, or of a model that sees already all of it, and the encoder."""

    language_model: Precision = field(default_factory=Precision)
    encoder: Precision = field(default_factory=Precision)
    device_map: DeviceMap = "none"  # spread a model that no device holds, in one process: over the GPUs, then memory, then disk; how accelerate fills them
    max_memory: dict[str, str] = field(default_factory=dict)  # of each device at most, such as {0: 20GiB, cpu: 60GiB}; needs device_map
    offload_folder: str = ""  # where weights lie that no memory holds; empty: ./offload

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.device_map not in get_args(DeviceMap):
            raise ConfigError(f"base.device_map is {self.device_map!r}: give one of {', '.join(get_args(DeviceMap))}")
        if self.device_map == "none" and self.max_memory:
            raise ConfigError("base.max_memory bounds what a device holds of a model that is spread, and base.device_map is none: give device_map: auto")
        own = self.language_model
        if self.device_map != "none" and (own.dtype != "auto" or own.quantiser or self.encoder.quantiser):
            raise ConfigError(
                "base.device_map places weights as the checkpoint has them, and base casts or quantises them after that: leave dtype and quantise out, "
                "or give a checkpoint that is stored so"
            )

    def __bool__(self) -> bool:
        return self != BaseSettings()

    def over(self, known: BaseSettings) -> BaseSettings:
        """These where they are given, else those that are known. Where weights lie is of this machine, and never known from an adapter."""
        return replace(self, language_model=self.language_model.over(known.language_model), encoder=self.encoder.over(known.encoder))

    @property
    def placing(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` takes of it to spread the weights."""
        if self.device_map == "none":
            return {}
        memory = {int(name) if name.isdecimal() else name: size for name, size in self.max_memory.items()}
        return {"device_map": self.device_map, "offload_folder": self.offload_folder or "offload", **({"max_memory": memory} if memory else {})}

    @staticmethod
    def of(language_model: str, encoder: str = "") -> BaseSettings:
        """Those that an adapter was trained with, from `FrozenPart.precision` of its parts; of a model that sees already the one of the whole."""
        own, _, inside = language_model.partition(WITH_ENCODER)
        return BaseSettings(language_model=Precision.of(own), encoder=Precision.of(inside or encoder))


_FREQUENCIES = ("inv_freq", "original_inv_freq")
_BLOCK, _SCALES = 64, 256  # of nf4: values that share a scale, and scales that share one; as bitsandbytes has them
_NF4_VALUES = 16  # that a weight can have, which each quantised tensor lists

UNCHANGED = BaseSettings()

WITH_ENCODER = ", encoder "  # in the precision of a model that sees already, before how its encoder is quantised


def settle(model: nn.Module, precision: Precision, name: str, *, linears: Callable[[str], bool] | None = None, known_as: str = "") -> nn.Module:
    """Cast and quantise a frozen model in place; before, note what identifies its weights, so that its fingerprint stays the checkpoint's.

    linears   which linear layers are quantised, by their dotted names; by default all but the output head
    known_as  what `FrozenPart.precision` says of it; by default the precision's text

    Raises ConfigError where it cannot be done.
    """
    from adalink.checkpoint.fingerprint import note_weights  # late: settings need no torch

    if precision.dtype == "auto" and not precision.quantiser:
        return model
    dtype = next(model.parameters()).dtype if precision.dtype == "auto" else _dtype(precision.dtype)
    note_weights(model, dtype=str(dtype).removeprefix("torch."), precision=known_as or str(precision))
    cast(model, dtype)
    if precision.quantiser:
        quantise(model, precision.quantiser, name, linears)
    return model


def cast(model: nn.Module, dtype: Any) -> None:
    """Cast weights and buffers, as transformers loads a model in this dtype: rotary frequencies, and what T5 keeps in float32, stay."""
    import torch

    exempt = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(_FREQUENCIES) and not set(exempt) & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def quantise(model: nn.Module, kind: str, name: str, linears: Callable[[str], bool] | None = None) -> None:
    """Quantise linear layers in place, with torchao. Raises ConfigError where it is not installed, or no layer can be quantised."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"base: quantise {kind} needs torchao: pip install 'adalink[quantise]'")
    chosen = some_linears(model, name, linears)
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # it reports kernels that this machine has no use for
    try:
        quantised = _QUANTISERS[kind]()
        for module in chosen.values():
            quantised(module)
    finally:
        logging.disable(disabled)


def chosen_linears(model: nn.Module, linears: Callable[[str], bool] | None = None) -> dict[str, nn.Linear]:
    """Dotted name -> linear layer, of those that are quantised: all but the output head, or those of them that `linears` picks by name."""
    from torch import nn

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: module for path, module in model.named_modules() if type(module) is nn.Linear and module is not head and (linears is None or linears(path))
    }


def some_linears(model: nn.Module, name: str, linears: Callable[[str], bool] | None = None) -> dict[str, nn.Linear]:
    """As `chosen_linears`. Raises ConfigError where there is none."""
    chosen = chosen_linears(model, linears)
    if not chosen:
        raise ConfigError(f"'{name}' has no linear layer that can be quantised ({type(model).__name__}): leave quantise out")
    return chosen


def packed_bytes(kind: str, weight: Any) -> int:
    """The bytes that a linear layer's weight takes once it is quantised: its values, and their scales.

    weight  [n_out, n_in] in the dtype that it is cast to before; on any device
    """
    n, n_rows, itemsize = weight.numel(), weight.shape[0], weight.element_size()
    if kind != "nf4":  # a scale in float32 for each row; int8 also has a zero point of one byte
        return int(n + n_rows * (5 if kind == "int8" else 4))
    n_blocks, rest = divmod(n, _BLOCK)
    if rest:
        return int(n * itemsize)
    return int(n // 2 + n_blocks + itemsize * (n_blocks // math.gcd(n_blocks, _SCALES) + _NF4_VALUES + 1))


def quantised_names(model: nn.Module) -> list[str]:
    """The dotted names of the quantised weights."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)
    return [name for name, weight in model.named_parameters() if not weight.requires_grad and type(weight.data) not in plain]


def _eight_bits(config: str) -> Callable[[], Callable[[nn.Linear], None]]:
    def ready() -> Callable[[nn.Linear], None]:
        import torchao.quantization as library

        chosen = getattr(library, config)()
        return lambda module: library.quantize_(module, chosen)

    return ready


def _nf4() -> Callable[[nn.Linear], None]:
    from torch import nn
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    def quantised(module: nn.Linear) -> None:
        n_blocks, rest = divmod(module.weight.numel(), _BLOCK)
        if not rest:  # else it stays as it is
            packed = to_nf4(module.weight.detach(), _BLOCK, math.gcd(n_blocks, _SCALES))
            module.weight = nn.Parameter(packed, requires_grad=False)

    return quantised


_QUANTISERS: Mapping[str, Callable[[], Callable[[nn.Linear], None]]] = {
    "int8": _eight_bits("Int8WeightOnlyConfig"),
    "fp8": _eight_bits("Float8WeightOnlyConfig"),
    "nf4": _nf4,
}


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _check_flash() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("base: attention is flash_attention_2, which runs on CUDA alone, and there is none here: give sdpa, or leave it out")
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError("base: attention is flash_attention_2, and flash_attn is not installed: pip install flash-attn, or give sdpa")
