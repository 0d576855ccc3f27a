"""Every public name says what it gives, and every one that raises says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("adalink", "multimodal", "tasks") for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
# nn.Module's own; and what a class does for a Protocol is said once, there.
SAID_ELSEWHERE = {"forward"} | {
    item.name
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases)
    for item in node.body
    if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)
}
SAYS_SO = ("raise", "refuse", "error")


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes that the module's __all__ names."""
    names = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for name in ast.literal_eval(node.value)
    }
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
            yield node


def functions(node: ast.FunctionDef | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """A function itself, or the public methods of a class but setters, which are said at their property."""
    if isinstance(node, ast.FunctionDef):
        yield node
        return
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and not any(getattr(d, "attr", "") == "setter" for d in item.decorator_list):
            yield item


def undocumented(tree: ast.Module) -> list[str]:
    """Public names without a docstring."""
    return [
        *(node.name for node in public(tree) if not ast.get_docstring(node)),
        *(
            f"{node.name}.{f.name}"
            for node in public(tree)
            if isinstance(node, ast.ClassDef)
            for f in functions(node)
            if not ast.get_docstring(f) and f.name not in SAID_ELSEWHERE
        ),
    ]


def silent_raisers(tree: ast.Module) -> list[str]:
    """Public functions that raise one of our errors in their own lines, and whose docstring does not tell."""
    found = []
    for node in public(tree):
        for function in functions(node):
            raised = {getattr(getattr(one.exc, "func", None), "id", "") for one in ast.walk(function) if isinstance(one, ast.Raise)}
            stated = (ast.get_docstring(function) or "").lower()
            if any(name.endswith("Error") and name != "AssertionError" for name in raised) and function.name not in SAID_ELSEWHERE:
                found += [] if any(word in stated for word in SAYS_SO) else [f"{node.name}.{function.name}"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    assert undocumented(TREES[path]) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_that_raises_says_so(path: Path) -> None:
    assert silent_raisers(TREES[path]) == []


def test_the_checks_can_fail() -> None:
    tree = ast.parse('__all__ = ["f", "C"]\ndef f():\n    raise ConfigError("x")\nclass C:\n    """What it is."""\n    def g(self):\n        pass\n')
    assert undocumented(tree) == ["f", "C.g"]
    assert silent_raisers(tree) == ["f.f"]
    assert undocumented(ast.parse('def hidden():\n    pass\n__all__ = []\n')) == []
