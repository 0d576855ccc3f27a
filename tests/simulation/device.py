"""A GPU that is not there: the real code runs on tensors that report the device `gpu`, and what a real one would refuse or wait for is recorded.

torch's python backend for PrivateUse1 gives a device with a guard, which autograd, `Module.to`, checkpointing and `torch.accelerator` take for an
accelerator. Each tensor there has three faces: a wrapper on `gpu:0` that the program sees; a CPU tensor with the values, so that control flow goes
on as it would on a real machine; and, where an operation meets tensors of two devices, a FakeTensor, by which torch itself decides whether they fit.

    with simulated_gpu() as gpu:
        model.to(gpu.device)
        model(batch.to(gpu.device)).backward()
    gpu.record.of("mismatch", "sync")

    mismatch   an operation on tensors of two devices: torch's own error. The run goes on, so one run finds all
    sync       the host waits for the device: .item(), .tolist(), bool(), nonzero, indexing by a mask, unique, .cpu()
    upload     a copy from the host that waits for all the device has still to do: torch.tensor(list, device=...), .to(device), an index on the CPU
    float64    a result in float64, which no part of the product computes in on a device
    promoted   an operation that joins two dtypes and gives the wider one: a constant of another dtype than the stream's

Not simulated: which kernel runs, autocast's casts, streams, pinned memory, NCCL. Registering the device cannot be undone: run it in a process of its own.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Finding", "Kind", "OnGpu", "Record", "SimulatedGpu", "simulated_gpu"]

Kind = Literal["mismatch", "sync", "upload", "float64", "promoted"]
GPU = "gpu"
ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / package}/" for package in ("adalink", "multimodal", "tasks"))
HERE = str(Path(__file__).parent)
aten: Any = torch.ops.aten

VALUES = (aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default)  # results that no fake tensor has
WAITS = {
    *VALUES, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


# ----------------------------------------
# What was seen.


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that happened at one line.

    where  `multimodal/generation/decoding.py prefill`: the innermost function of the three packages; "" where none of them ran
    below  the innermost function of a library under it, `transformers/masking_utils.py _ignore_mask`; "" where the line itself did it
    """

    kind: Kind
    what: str
    where: str
    below: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}, in {self.where or 'no code of ours'}{f' under {self.below}' if self.below else ''}: {self.line}"


@dataclass
class Record:
    """How often each finding was made."""

    found: Counter[Finding] = field(default_factory=Counter)

    def note(self, kind: Kind, what: str) -> None:
        self.found[Finding(kind, what, *_place())] += 1

    def of(self, *kinds: Kind) -> list[Finding]:
        return sorted(finding for finding in self.found if finding.kind in kinds)


def _place() -> tuple[str, str, str]:
    """The innermost frame of the packages, the library's below it, and the line."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and not f.filename.startswith(f"{HERE}/device.py")]
    ours = next((i for i in range(len(frames) - 1, -1, -1) if frames[i].filename.startswith(OURS)), None)
    last = frames[-1]
    if ours is None:
        return "", _short(last), last.line or ""
    frame = frames[ours]
    return _short(frame), "" if last is frame else _short(last), f"{frame.line} (line {frame.lineno})"


def _short(frame: traceback.FrameSummary) -> str:
    name = frame.filename.rpartition("site-packages/")[2]
    line = f" line {frame.lineno}" if frame.name == "<lambda>" else ""
    return f"{name.removeprefix(f'{ROOT}/')} {frame.name}{line}"


# ----------------------------------------
# The device.


class _Stream:
    """A queue of the device, or an event in one: there is no other to wait for."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.stream_id = 0

    def wait_stream(self, other: Any = None) -> None:
        """Nothing runs beside the host."""

    wait_event = record = wait = synchronize = wait_stream

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()


class _Backend:
    """What torch asks of a device's module; its random state is the CPU's."""

    Stream = Event = _Stream

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        """There is one."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's is set already."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @contextlib.contextmanager
    def device(self, index: Any) -> Iterator[None]:
        yield

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs beside the host."""


def _registered() -> torch.device:
    """Register the device, once for the process."""
    if torch._C._get_privateuse1_backend_name() != GPU:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(GPU, backend_module=_Backend())
    return torch.device(GPU, 0)


class OnGpu(Tensor):
    """A tensor on the simulated device. host: its values, on the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(  # type: ignore[no-any-return]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, layout=host.layout,
            device=torch.device(GPU, 0), requires_grad=False,
        )  # fmt: skip

    def __init__(self, host: Tensor) -> None:
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert SimulatedGpu.current is not None, f"{func} ran outside of simulated_gpu()"
        return SimulatedGpu.current.run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"


class SimulatedGpu(TorchDispatchMode):
    """Inside the block `gpu` is a device; `record` holds what was seen."""

    current: SimulatedGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.device = _registered()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.record = Record()
        self.sees_dtypes = self.sees_waits = True

    def __enter__(self) -> SimulatedGpu:
        self._previous, SimulatedGpu.current = SimulatedGpu.current, self
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=gpu) then moves by an operation that is seen
        self._calls = _HostCalls(self)
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lift)
        SimulatedGpu.current = self._previous

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = _names_gpu(kwargs) or any(isinstance(one, OnGpu) for one in tree_leaves((args, kwargs)))
        return self.run(func, args, kwargs) if on_gpu else func(*args, **kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation on the device."""
        self._note_waits(func, args, kwargs)
        result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        self._note_dtypes(func, given, result)
        written = _written(func, args, kwargs)
        is_mixed = any(one.ndim and not isinstance(one, OnGpu) for one in given) and any(isinstance(one, OnGpu) for one in given)
        stays = kwargs.get("device") is None or _names_gpu(kwargs)
        if is_mixed and func not in VALUES:
            stays = self._fits(func, args, kwargs, stays)
        if written is not None:
            return written
        return tree_map(lambda one: OnGpu(one) if isinstance(one, Tensor) else one, result) if stays else result

    def note_wait(self, kind: Literal["sync", "upload"], what: str) -> None:
        """The host waits for the device."""
        if self.sees_waits:
            self.record.note(kind, what)

    def _note_waits(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name = func.__name__.removesuffix(".default")
        if func in WAITS:
            self.note_wait("sync", name)
        elif func in COPIES:
            source, target = (args[0], kwargs.get("device")) if func is aten._to_copy.default else (args[1], args[0].device)
            comes, goes = isinstance(source, OnGpu), target is not None and torch.device(target).type == GPU
            waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
            if waits and target is not None and comes != goes and source.numel():  # of nothing nothing is copied
                self.note_wait("upload" if goes else "sync", _shape(source) if goes else f".cpu() of {_shape(source)}")
        elif func in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.note_wait("sync", f"{name} by a mask")
                elif isinstance(index, Tensor) and not isinstance(index, OnGpu):
                    self.note_wait("upload", f"{name} by a CPU index {_shape(index)}")

    def _note_dtypes(self, func: Any, tensors: list[Tensor], result: Any) -> None:
        if not self.sees_dtypes:
            return
        given = {one.dtype for one in tensors if one.is_floating_point() and one.ndim}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_floating_point()]
        if any(one.dtype == torch.float64 for one in made):
            self.record.note("float64", func.__name__)
        is_for_many = func.__name__.startswith(("_foreach", "_fused"))  # an optimizer's: weights and its own states side by side
        if len(given) > 1 and made and not is_for_many and func not in COPIES and made[0].dtype.itemsize > min(one.itemsize for one in given):
            self.record.note("promoted", f"{func.__name__} of {' and '.join(sorted(str(one)[6:] for one in given))}")

    def _fits(self, func: Any, args: Any, kwargs: dict[str, Any], stays: bool) -> bool:
        """Whether what comes of tensors of two devices is on this one, by torch's own rules; notes where they refuse."""
        try:
            with self.fakes:
                result = func(*tree_map(self._fake, args), **tree_map(self._fake, kwargs))
            return any(isinstance(one, Tensor) and one.device.type == GPU for one in tree_leaves(result))
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        except RuntimeError as error:
            if "device" not in str(error):
                raise
            self.record.note("mismatch", f"{func.__name__}: {str(error).splitlines()[0][:160]}")
        return stays

    def _fake(self, value: Any) -> Any:
        if isinstance(value, OnGpu):
            return self._like(value.host, GPU)
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self._like(value, "cpu") if value.ndim else self.fakes.from_tensor(value.detach())  # a number on the CPU may join anything
        return value

    def _like(self, value: Tensor, device: str) -> Tensor:
        with self.fakes:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)


class _HostCalls(TorchFunctionMode):
    """What never reaches the operations of a device."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and isinstance(args[0], OnGpu):  # torch refuses it for subclasses
            self.gpu.note_wait("sync", f"tolist of {_shape(args[0])}")
            return args[0].host.tolist()
        if func is Tensor.numpy and isinstance(args[0], OnGpu):
            raise TypeError("can't convert a tensor on the GPU to numpy: use Tensor.cpu() first")
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _attention(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One kernel on a GPU; what torch makes it of here, in dtypes of its own, is no part of the program."""
        call = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        mask, dtype = call.get("attn_mask"), call["query"].dtype
        if isinstance(mask, Tensor) and mask.dtype not in (torch.bool, dtype):
            self.gpu.record.note("promoted", f"attention of {str(dtype)[6:]} under a mask of {str(mask.dtype)[6:]}")
        before, self.gpu.sees_dtypes = self.gpu.sees_dtypes, False
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.sees_dtypes = before


def _host(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == GPU else value


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype)[6:]} {list(value.shape)}"


def _names_gpu(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == GPU


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument that an operation in place writes and gives back."""
    returns = func._schema.returns
    if not returns or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[i] if i < len(args) else kwargs[argument.name]
    return None


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Inside the block `gpu` is a device."""
    _registered()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to(gpu)` then keeps each parameter, and tied ones tied, as CUDA's does
    try:
        # One thread: autograd counts the threads of devices once, and that may have been before this one was registered.
        with torch.autograd.set_multithreading_enabled(False), SimulatedGpu() as gpu:
            yield gpu
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
