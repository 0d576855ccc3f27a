"""Images and text through frozen models."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder

import torch

import adalink  # noqa: F401  (says which file is in the way where `tasks` is somebody else's)

__all__ = ["ensure_torchvision"]


# ----------------------------------------
# Makes torchvision importable beside a torch wheel that it was not built for.


_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# A library that is garbage collected takes its operators with it.
_alive: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Lets `import torchvision` succeed; call it before the first import of torchvision, timm, open_clip or transformers.

    `pip install torch` can give a CPU wheel while `pip install torchvision` gives one built for CUDA. Its C extension then does not
    load, and its import fails with "operator torchvision::nms does not exist" because it registers shape functions for two operators
    that the extension would have defined; open_clip fails with it, and so do the image processors of transformers. Their schemas alone
    mend the import. The operators themselves stay absent: calling `torchvision.ops.nms` raises, and nothing here calls it.

    Does nothing where the extension loads, where torchvision is absent, or on a second call. Costs a few milliseconds, because
    torchvision itself is not imported (that takes most of a second).
    """
    if "torchvision" in sys.modules or _is_defined() or _extension_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    _alive.append(library)


def _is_defined() -> bool:
    return hasattr(torch.ops.torchvision, _OPERATORS[0])


def _extension_loads() -> bool:
    """True where torchvision's C extension loads as torchvision itself would load it, and where there is no torchvision to mend."""
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


ensure_torchvision()  # before anything here imports transformers, timm or open_clip
