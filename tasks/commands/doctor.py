"""`adalink doctor`: what is installed, which device, precision and attention kernels are used, and what is missing, with the pip command for it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from adalink.errors import ConfigError
from adalink.siblings import ROOT, SIBLINGS
from tasks.commands import Command

__all__ = ["DOCTOR", "Diagnosis", "Package", "diagnosed", "diagnosis_text"]

_OF_DEVELOPERS = ("test", "lint", "docs")  # extras that no command needs
_MODULES = {"open_clip_torch": "open_clip", "pillow": "PIL", "PyYAML": "yaml", "Jinja2": "jinja2"}  # where a package's module has another name
_NO_JAVA = "not found; METEOR and SPICE need it: apt install default-jre-headless, or any other Java runtime"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that adalink needs, or that one of its extras names.

    version   None where it is not installed
    extra     the extra that it belongs to; empty for what is always needed
    problem   what is wrong with it; empty where nothing is
    pip       the command that installs the right one; empty where it is there
    """

    name: str
    version: str | None
    extra: str = ""
    problem: str = ""
    pip: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `adalink doctor` found.

    memory_gib   of the machine: all, and what is free
    java         the version that it prints; None where there is none
    notes        what a user should know, and need not mend
    broken       a sentence for each thing that must be mended
    """

    adalink: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[str, ...] = ()
    precision: str = ""
    attention: tuple[str, ...] = ()
    memory_gib: tuple[float, float] | None = None
    hub: str = ""
    java: str | None = None
    notes: tuple[str, ...] = ()
    broken: tuple[str, ...] = field(default=())


def diagnosed() -> Diagnosis:
    """Look at this machine. Each package that is needed is imported, which takes seconds."""
    packages = tuple(_packages())
    works = {one.name for one in packages if one.version and not one.problem}
    device = _device() if "torch" in works else {}
    return Diagnosis(
        adalink=_version("adalink") or "not installed",
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        packages=packages,
        memory_gib=_memory(),
        hub=_hub() if "huggingface_hub" in works else "",
        java=_java(),
        notes=(*_shadows(), *(_torchvision_notes() if {"torch", "torchvision"} <= works else ())),
        broken=tuple(f"{one.name} {one.problem}: {one.pip}" for one in packages if one.problem),
        **device,
    )


def diagnosis_text(found: Diagnosis) -> str:
    """The diagnosis for a reader."""
    rows = [("adalink", f"{found.adalink}, Python {found.python}, {found.platform}")]
    for extra in dict.fromkeys(one.extra for one in found.packages):
        rows.append(("", ""))
        rows.append((f"extra {extra}" if extra else "needed", ""))
        for one in (package for package in found.packages if package.extra == extra):
            rows.append((f"  {one.name}", "  ".join(filter(None, [one.version or "not installed", one.problem, one.pip]))))
    rows.append(("", ""))
    rows += [("device" if i == 0 else "", text) for i, text in enumerate(found.devices)]
    rows += [("precision", found.precision)] * bool(found.precision)
    rows += [("attention" if i == 0 else "", text) for i, text in enumerate(found.attention)]
    rows += [("memory", f"{found.memory_gib[0]:.1f} GiB, {found.memory_gib[1]:.1f} free")] if found.memory_gib else []
    rows += [("hub", found.hub)] * bool(found.hub)
    rows.append(("java", found.java or _NO_JAVA))
    rows += [("note", text) for text in found.notes]
    rows += [("BROKEN", text) for text in found.broken]
    return "\n".join(line for name, text in rows for line in _lines(name, text))


def _lines(name: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{name:<20}{first}".rstrip(), *(f"{'':<20}{line}" for line in rest)]


def _packages() -> Iterator[Package]:
    """Everything that the project's own metadata names, but what developers need."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Package(name="packaging", version=None, problem="is not installed", pip="pip install packaging")
        return
    try:
        about = metadata("adalink")
    except PackageNotFoundError:
        yield Package(name="adalink", version=None, problem="is not installed", pip=f"pip install --editable {ROOT}")
        return
    needed = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    for extra in ("", *(name for name in about.get_all("Provides-Extra") or () if name not in _OF_DEVELOPERS)):
        for one in needed:
            if (one.marker is None) if not extra else (one.marker is not None and one.marker.evaluate({"extra": extra})):
                yield _package(one, extra)


def _package(needed: Any, extra: str) -> Package:
    found, pip = _version(needed.name), f"pip install '{needed.name}{needed.specifier}'"
    problem = ""
    if found is not None and not needed.specifier.contains(found, prereleases=True):
        problem = f"is {found}, and adalink needs {needed.specifier}"
    elif not extra:
        problem = "is not installed" if found is None else _import_problem(_MODULES.get(needed.name, needed.name))
    return Package(name=needed.name, version=found, extra=extra, problem=problem, pip=pip if problem or found is None else "")


def _import_problem(module: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # whatever somebody's package raises
        return f"cannot be imported ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """devices, precision and attention of a Diagnosis."""
    import torch

    devices = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {torch.backends.cpu.get_cpu_capability()}"]
    used = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if used is not None and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        place = torch.device(used.type)
        devices = [_gpu(i) for i in range(torch.cuda.device_count())] if used.type == "cuda" else [str(used), *devices]
    else:
        place = torch.device("cpu")
    is_fast = torch.cuda.is_bf16_supported(including_emulation=False) if place.type == "cuda" else _cpu_has_bf16()
    advice = "train.precision: bf16 is faster here" if is_fast else "train.precision: bf16 is not faster here"
    quantised = "base: quantise int8, nf4 or fp8" if importlib.util.find_spec("torchao") else "base: quantise needs torchao"
    precision = f"weights stay as their files hold them; {quantised}; {advice}"
    attention = tuple(f"scaled_dot_product_attention in {str(kind)[6:]}: {_kernels(place, kind)}" for kind in (torch.float32, torch.bfloat16))
    has_flash = place.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention += (f"base: attention auto is sdpa where the model has it; flash_attention_2 {'can be chosen' if has_flash else 'needs CUDA and flash_attn'}",)
    return {"devices": tuple(devices), "precision": precision, "attention": attention}


def _gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    free, whole = torch.cuda.mem_get_info(index)
    return f"cuda:{index}: {about.name}, {whole / 2**30:.1f} GiB, {free / 2**30:.1f} free, compute capability {about.major}.{about.minor}"


def _cpu_has_bf16() -> bool:
    with suppress(OSError):
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
    return False


def _kernels(device: Any, dtype: Any) -> str:
    """The kernels that compute a small masked attention here, each tried: `flash, math`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)
    mask = torch.ones(16, 16, device=device, dtype=torch.bool).tril()
    found = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        with suppress(RuntimeError, AttributeError), warnings.catch_warnings(action="ignore"), sdpa_kernel([getattr(SDPBackend, name)]):
            scaled_dot_product_attention(q, q, q, attn_mask=mask)
            found.append(name.removesuffix("_ATTENTION").lower())
    return ", ".join(found)


def _memory() -> tuple[float, float] | None:
    try:
        import psutil  # type: ignore[import-untyped]  # accelerate brings it
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return memory.total / 2**30, memory.available / 2**30


def _hub() -> str:
    from huggingface_hub import constants

    reach = "not asked, since HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "asked for names that are not on disk"
    return f"{reach}; its models are in {constants.HF_HUB_CACHE}"


def _java() -> str | None:
    if (program := shutil.which("java")) is None:
        return None
    done = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    return (done.stderr or done.stdout).partition("\n")[0] if done.returncode == 0 else None


def _shadows() -> Iterator[str]:
    """Somebody else's `tasks` or `multimodal` before ours, in this folder or on the search path."""
    for name in SIBLINGS:
        spec = PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
        places = [spec.origin] if spec is not None and spec.origin else list(spec.submodule_search_locations or ()) if spec is not None else []
        if places and ROOT not in Path(places[0]).resolve().parents:
            yield f"`import {name}` in a script of this folder finds {places[0]}; the command line does not mind, for a script rename it"


def _torchvision_notes() -> Iterator[str]:
    """Whether torchvision was built for this torch, found out by calling one of its operators."""
    import torch
    import torchvision

    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError):
        yield (
            f"torchvision {torchvision.__version__} was built for another torch than {torch.__version__}, and its own operators are absent; "
            "adalink does without them: to have them, install both from one index, pip install --force-reinstall torch torchvision"
        )


def _run(values: Any, plain: Any) -> None:
    """Print the diagnosis. Raises ConfigError where something must be mended."""
    found = diagnosed()
    print(json.dumps(asdict(found), indent=2) if values.json else diagnosis_text(found))
    if found.broken:
        raise ConfigError(f"{len(found.broken)} of the packages that adalink needs must be mended: {'; '.join(found.broken)}")


DOCTOR = Command(
    lambda parser: parser.add_argument("--json", action="store_true", help="print JSON"), _run, ("adalink doctor", "adalink doctor --json > machine.json")
)
