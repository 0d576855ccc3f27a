"""The methods, by the name that configs and checkpoints use. Adding one is a file here and a name in METHODS."""

from collections import UserDict
from importlib import import_module
from typing import Any

__all__ = ["METHODS"]


class _Methods(UserDict[str, Any]):
    """Name -> class, which is imported when it is first asked for: a list of the names needs no torch. Written as FILE.CLASS."""

    def __getitem__(self, name: str) -> Any:
        if isinstance(place := super().__getitem__(name), str):
            file, _, kind = place.rpartition(".")
            self.data[name] = getattr(import_module(f"{__name__}.{file}"), kind)
        return super().__getitem__(name)


METHODS = _Methods({
    "adalink": "adalink.AdaLink",
    "adalora": "budgets.adalora.AdaLoRA",
    "bitfit": "bitfit.BitFit",
    "bottleneck": "bottleneck.Bottleneck",
    "bridge": "bridge.Bridge",
    "dept": "prompts.dept.DePT",
    "epalm": "epalm.EPALM",
    "gated": "unipelt.Gated",
    "hira": "hira.HiRA",
    "hyper": "budgets.hyper.Hyper",
    "ia3": "ia3.IA3",
    "ist": "budgets.ist.IST",
    "ladder": "ladder.Ladder",
    "lora": "lora.LoRA",
    "prefix": "prefix.Prefix",
    "prompt": "prompts.prompt.Prompt",
    "selected": "budgets.selected.Selected",
    "sparse": "budgets.sparse.Sparse",
    "sparse_delta": "budgets.sparse.SparseDelta",
    "unipelt": "unipelt.UniPELT",
    "warp": "prompts.warp.WARP",
})  # fmt: skip


def __getattr__(name: str) -> Any:
    """The classes themselves, as in `from adalink.methods import LoRA`."""
    for kind in () if name.startswith("__") else METHODS.values():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
