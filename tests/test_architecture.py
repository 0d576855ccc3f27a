"""The house rules that a machine can check: import direction, the size of folders, files and functions, names, and what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adalink", "multimodal", "tasks")
MAY_IMPORT = {"adalink": {"adalink"}, "multimodal": {"adalink", "multimodal"}, "tasks": set(PACKAGES)}
ADALINK_NEEDS = {"torch", "safetensors"}  # and huggingface_hub, late, for hub names
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 500, 40
MOST_ENTRIES = 16  # of a folder
MOST_FILES = 250
# Words of our own for which the field has others: no name of a module, class, function, argument or value holds one.
NICKNAMES = frozenset(
    """beginning beginnings bears blueprint draft figure figures flips footprint kept learner learnt offenders outside parcel picture pictures said sameness say
    shown still tell told verdict""".split()
)
OF_FORMATS = {"said_before", "said_after"}  # fields of JSON that others read
# The same in sentences: comments, docstrings, messages and help. A string of one of these words alone is a key of a format.
NICKNAMES_OF_PROSE = re.compile(r"\b(kept|said|told|shown|bears?|pictures?|figures?|parcels?|offenders?|sameness|verdicts?)\b", re.IGNORECASE)
OWN_SENTENCES = {"adalink/moved.py", "tasks/scenes/texts.py"}  # earlier names; what the embedded language model was trained on
KEYS = {"pictures in a step"}  # of checkpoints


@cache
def tree_of(path: Path) -> tuple[ast.Module, list[ast.AST]]:
    """A file as Python reads it, and every node of it: made once for all tests."""
    tree = ast.parse(path.read_text())
    return tree, list(ast.walk(tree))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top of the file)."""
    tree, nodes = tree_of(path)
    guarded = {child for node in tree.body if isinstance(node, ast.If) for child in ast.walk(node)}  # if TYPE_CHECKING
    at_top = set(tree.body) - guarded
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module or ""]
        for name in names:
            yield name, node in at_top


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


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def needs(path: Path) -> set[str]:
    """The modules of the three packages that a file imports anywhere: at its top, in a function, or for type checks alone."""
    found = set()
    for node in tree_of(path)[1]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names}
    return found & MODULES.keys()


def folder_of(name: str) -> str:
    """The folder of a module; a module at the root of a package, which stands beside the folders there, is one by itself."""
    parts = MODULES[name].relative_to(ROOT).parts
    return name if len(parts) == 2 else "/".join(parts[:-1])


def first_cycle(graph: dict[str, set[str]]) -> str:
    """`a -> b -> a`, or nothing."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            return " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return ""
        found = next((cycle for needed in sorted(graph.get(name, ())) if (cycle := visit(needed, (*trail, name)))), "")
        done.add(name)
        return found

    return next((cycle for name in sorted(graph) if (cycle := visit(name, ()))), "")


def test_no_import_cycles_of_modules_or_folders() -> None:
    """Imports in functions and under TYPE_CHECKING count: what a reader must follow is the same."""
    modules = {name: needs(path) for name, path in MODULES.items()}
    folders: dict[str, set[str]] = defaultdict(set)
    for name, needed in modules.items():
        folders[folder_of(name)] |= {folder_of(other) for other in needed} - {folder_of(name)}
    assert first_cycle(modules) == ""
    assert first_cycle(folders) == ""


def test_a_cycle_is_found() -> None:
    assert first_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == "b -> c -> b"


def test_a_folder_shows_one_idea() -> None:
    folders = [path for top in (*PACKAGES, "tests") for path in [ROOT / top, *(ROOT / top).rglob("*")] if path.is_dir() and "__pycache__" not in path.parts]
    counts = {str(path.relative_to(ROOT)): sum(one.name != "__pycache__" for one in path.iterdir()) for path in folders}
    assert {name: count for name, count in counts.items() if count > MOST_ENTRIES} == {}
    assert len(FILES) <= MOST_FILES


def names_of(path: Path) -> Iterator[str]:
    for node in tree_of(path)[1]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_the_fields(path: Path) -> None:
    names = {*names_of(path), path.stem}
    assert sorted(name for name in names - OF_FORMATS if NICKNAMES & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}) == []


@pytest.mark.parametrize("path", [path for path in FILES if str(path.relative_to(ROOT)) not in OWN_SENTENCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_in_the_fields_words(path: Path) -> None:
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with path.open("rb") as file:
        texts = [(token.start[0], token.string) for token in tokenize.tokenize(file.readline) if token.type in kinds]
    sentences = [(line, text) for line, text in texts if " " in text and text.strip("'\"") not in KEYS]
    assert [f"{path.relative_to(ROOT)}:{line}: {text}" for line, text in sentences if NICKNAMES_OF_PROSE.search(text)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    assert path.read_text().count("\n") <= MOST_LINES
    for node in tree_of(path)[1]:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            docstring = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
            assert node.end_lineno - (docstring or 0) <= MOST_FUNCTION_LINES, f"{node.name} is long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_all_is_there_and_every_module_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)[0]
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
        "adalink", "adalora", "bitfit", "bottleneck", "bridge", "dept", "epalm", "gated", "hira", "hyper", "ia3", "ist", "ladder", "lora", "prefix", "prompt",
        "selected", "sparse", "sparse_delta", "unipelt", "warp",
    }  # fmt: skip
    assert [name for name in adalink.__all__ if not hasattr(adalink, name)] == []
