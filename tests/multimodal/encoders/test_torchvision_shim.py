from __future__ import annotations

import _ctypes
import json
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from shared import PATIENCE

from multimodal import ensure_torchvision

DEFINED = "print(hasattr(torch.ops.torchvision, 'nms'))"
LIBRARIES = ("torchvision", "timm", "open_clip", "transformers")
# Name -> what torchvision is there, and what is run. Each in a process of its own, forked from one that has imported torch alone.
CASES = {
    "loads": ("extension", f"import multimodal, torchvision, torch; {DEFINED}"),
    "damaged": ("damaged", f"import multimodal, torchvision, torch; {DEFINED}"),
    "absent": ("absent", f"import multimodal, torchvision, torch; {DEFINED}"),
    "no package": ("file", f"import multimodal, torchvision, torch; {DEFINED}"),
    "imported before": ("absent", f"import torchvision, multimodal, torch; multimodal.ensure_torchvision(); {DEFINED}"),
    "without it": ("real", "import torchvision"),
    "imports": ("real", f"import multimodal; print([name for name in {LIBRARIES} if name in sys.modules])"),
}
FORK_EACH = """
import json, os, sys, traceback
import torch
said = {}
for name, (folder, code) in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            sys.path.insert(0, folder)
            exec(code)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    said[name] = os.fdopen(read).read()
    os.wait()
print(json.dumps(said))
"""


def torchvision_of(kind: str, folder: Path) -> Path:
    """A folder with a torchvision of this kind; of the real one, an empty folder."""
    folder.mkdir()
    if kind == "file":
        (folder / "torchvision.py").touch()
    elif kind != "real":
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").touch()
        extension = {"extension": Path(_ctypes.__file__).read_bytes(), "damaged": b"not a library"}  # the first: any shared library that loads
        if kind in extension:
            (folder / "torchvision" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(extension[kind])
    return folder


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case printed."""
    folder = tmp_path_factory.mktemp("torchvision")
    cases = {name: (str(torchvision_of(kind, folder / name)), code) for name, (kind, code) in CASES.items()}
    done = subprocess.run([sys.executable, "-c", FORK_EACH, json.dumps(cases)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    stated: dict[str, str] = json.loads(done.stdout)
    return stated


def test_all_libraries_of_encoders_import_after_it() -> None:
    """In this process, where tests/conftest.py imports multimodal before any of them."""
    ensure_torchvision()
    ensure_torchvision()
    import open_clip
    import timm
    import torchvision
    from torchvision.transforms.v2 import Resize
    from transformers import AutoImageProcessor

    assert all((open_clip.__version__, timm.__version__, torchvision.__version__, Resize, AutoImageProcessor))


def test_where_torchvision_fails_to_import_it_is_the_missing_operator(printed: dict[str, str]) -> None:
    """The control: without the schemas the import fails, so the test above proves something on this machine."""
    if not printed["without it"]:
        pytest.skip("torchvision imports as it is here")
    assert "operator torchvision::nms does not exist" in printed["without it"]


@pytest.mark.parametrize("case", ["damaged", "absent"])
def test_the_operators_are_defined_where_the_extension_does_not_load(case: str, printed: dict[str, str]) -> None:
    assert printed[case] == "True\n"


@pytest.mark.parametrize("case", ["loads", "no package", "imported before"])
def test_nothing_is_defined_where_there_is_nothing_to_mend(case: str, printed: dict[str, str]) -> None:
    assert printed[case] == "False\n"


def test_importing_multimodal_imports_no_library_of_encoders(printed: dict[str, str]) -> None:
    assert printed["imports"] == "[]\n"
