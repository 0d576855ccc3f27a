"""Images and text through frozen models."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from typing import Any

import adalink  # noqa: F401  (says which file is in the way where `tasks` is somebody else's)

__all__ = ["ensure_torchvision"]


# ----------------------------------------
# Makes torchvision importable beside a torch wheel that it was not built for.


_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# A library that is garbage collected takes its operators with it.
_alive: list[Any] = []


def ensure_torchvision() -> None:
    """Lets `import torchvision` succeed; it is called when that is imported first, by timm, open_clip, transformers or anybody.

    `pip install torch` can give a CPU wheel while `pip install torchvision` gives one built for CUDA. Its C extension then does not
    load, and its import fails with "operator torchvision::nms does not exist" because it registers shape functions for two operators
    that the extension would have defined; open_clip fails with it, and so do the image processors of transformers. Their schemas alone
    mend the import. The operators themselves stay absent: calling `torchvision.ops.nms` raises, and nothing here calls it.

    Does nothing where the extension loads, where torchvision is absent, or on a second call. Costs a few milliseconds, because
    torchvision itself is not imported (that takes most of a second).
    """
    import torch

    _before_torchvision.is_done = True
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, _OPERATORS[0]) or _extension_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    _alive.append(library)


def _extension_loads() -> bool:
    """True where torchvision's C extension loads as torchvision itself would load it, and where there is no torchvision to mend."""
    import torch

    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True
    folder = package.submodule_search_locations[0]
    extension = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


class _BeforeTorchvision:
    """A finder that finds nothing: it mends torchvision just before somebody imports it, or looks whether it is there."""

    is_done = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Nothing, for the finders that follow."""
        if name == "torchvision" and not self.is_done:
            ensure_torchvision()


_before_torchvision = _BeforeTorchvision()
sys.meta_path.insert(0, _before_torchvision)
