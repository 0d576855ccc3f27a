"""The house rules that a machine can check: import direction, how long files and functions may be, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adalink", "multimodal", "tasks")
MAY_IMPORT = {"adalink": {"adalink"}, "multimodal": {"adalink", "multimodal"}, "tasks": set(PACKAGES)}
ADALINK_NEEDS = {"torch", "safetensors"}  # and huggingface_hub, late, for hub names
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 500, 40


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top of the file)."""
    tree = ast.parse(path.read_text())
    guarded = {child for node in tree.body if isinstance(node, ast.If) for child in ast.walk(node)}  # if TYPE_CHECKING
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module or ""]
        for name in names:
            yield name, node in tree.body and node not in guarded


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    found = {name.split(".")[0] for name, _ in imports(path)} & set(PACKAGES)
    assert found <= MAY_IMPORT[package]


def test_adalink_needs_torch_and_safetensors_alone() -> None:
    for path in (ROOT / "adalink").rglob("*.py"):
        top = {name.split(".")[0] for name, is_top in imports(path) if is_top}
        assert top <= ADALINK_NEEDS | {"adalink"} | set(sys.stdlib_module_names), f"{path} imports {top}"


def test_importing_adalink_loads_no_other_library_of_the_field() -> None:
    code = "import adalink, sys; print([m for m in ('transformers', 'timm', 'open_clip', 'PIL', 'accelerate', 'webdataset') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_no_import_cycles() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): {name for name, is_top in imports(path) if is_top} for path in FILES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in graph and name not in done:
            for needed in graph[name]:
                visit(needed, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            docstring = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
            assert node.end_lineno - (docstring or 0) <= MOST_FUNCTION_LINES, f"{node.name} is long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_all_is_there_and_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a module begins with a sentence that says what it holds"
    declared = [node for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"]
    for node in declared:
        names = set(ast.literal_eval(node.value))
        defined = {getattr(n, "name", "") for n in tree.body} | {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for top in n.targets for t in ast.walk(top) if isinstance(t, ast.Name)}
        defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        assert names <= defined, f"{names - defined} are in __all__ and not there"


def test_the_public_surface_is_what_it_was_meant_to_be() -> None:
    import adalink

    assert set(adalink.METHODS) == {
        "adalink", "bitfit", "bottleneck", "bridge", "epalm", "gated", "ia3", "lora", "prefix", "prompt", "unipelt",
    }  # fmt: skip
    assert [name for name in adalink.__all__ if not hasattr(adalink, name)] == []
