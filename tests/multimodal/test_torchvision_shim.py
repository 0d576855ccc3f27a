from __future__ import annotations

import _ctypes
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from shared import PATIENCE

DEFINED = "hasattr(torch.ops.torchvision, 'nms')"


def run(code: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    setup = "" if first_on_path is None else f"import sys; sys.path.insert(0, {str(first_on_path)!r}); "
    return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=PATIENCE, check=False)


def fake_torchvision(folder: Path, extension: bytes | None) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    if extension is not None:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(extension)
    return folder


def test_all_libraries_of_encoders_import_after_it() -> None:
    code = "from multimodal.torchvision_shim import ensure_torchvision as f; f(); f(); import torchvision, timm, open_clip; "
    done = run(code + "from transformers import AutoImageProcessor; from torchvision.transforms.v2 import Resize; print('fine')")
    assert done.stdout == "fine\n", done.stderr


def test_where_torchvision_fails_to_import_it_is_the_missing_operator() -> None:
    """The control: without the schemas the import fails, so the test above proves something on this machine."""
    done = run("import torchvision")
    if done.returncode == 0:
        pytest.skip("torchvision imports as it is here")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_nothing_is_defined_where_the_extension_loads(tmp_path: Path) -> None:
    folder = fake_torchvision(tmp_path, Path(_ctypes.__file__).read_bytes())  # any shared library that loads
    done = run(f"import multimodal, torch; print({DEFINED})", folder)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("extension", [b"not a library", None], ids=["damaged", "absent"])
def test_the_operators_are_defined_where_the_extension_does_not_load(tmp_path: Path, extension: bytes | None) -> None:
    done = run(f"import multimodal, torch; print({DEFINED})", fake_torchvision(tmp_path, extension))
    assert done.stdout == "True\n", done.stderr


def test_nothing_is_defined_where_torchvision_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").touch()
    done = run(f"import multimodal, torch; print({DEFINED})", tmp_path)
    assert done.stdout == "False\n", done.stderr


def test_nothing_happens_where_torchvision_is_already_imported(tmp_path: Path) -> None:
    done = run(f"import torchvision, multimodal, torch; print({DEFINED})", fake_torchvision(tmp_path, None))
    assert done.stdout == "False\n", done.stderr


def test_importing_multimodal_imports_no_library_of_encoders() -> None:
    done = run("import multimodal, sys; print([name for name in ('torchvision', 'timm', 'open_clip', 'transformers') if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr
