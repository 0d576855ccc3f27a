"""Every block of code on every page is run: commands and Python, in their order, in a folder of its own, with tiny models in place of named ones.

A block with the comment `<!-- parsed: REASON -->` before it needs what a test has not; its arguments, Python or YAML are parsed.
"""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from blocks import DATA, OUTPUT, PAGES, ROOT, RUN, Block, blocks, commands
from cli_run import known_parser
from setups import PARTS, QUICK, SETUPS, replaced
from shared import PATIENCE

import adalink
from tasks.cli import main
from tasks.commands import Entry, parser

SERVED = "http://127.0.0.1:8000"
WIDEST = 104  # columns that a page of the documentation shows without scrolling
SHELL = ("mkdir", "ls", "cp", "cat")  # what pages run beside adalink


class Runner:
    """Runs the blocks of one page, one after the other, in the working folder."""

    def __init__(self, ending: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, Any] = {}
        self.places = dict(PARTS)
        self._ending, self._monkeypatch = ending, monkeypatch

    def run(self, block: Block) -> None:
        """Run a block, or parse it."""
        assert block.language in (*RUN, *DATA, *OUTPUT, "setup"), f"{block.place}: no test knows blocks of {block.language!r}"
        if block.language == "setup":
            SETUPS[block.text]()
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "python":
            self._python(block)
        elif block.language == "bash":
            for command in commands(block.text):
                self._command(command, block)
        if "file" in block.comments:
            Path(block.comments["file"]).write_text(replaced(block.text, self.places))

    def _python(self, block: Block) -> None:
        tree = ast.parse(block.text, block.place)
        if "parsed" not in block.comments:
            ast.increment_lineno(tree, block.line)
            exec(compile(replaced(block.text, self.places), block.place, "exec"), self.names)

    def _command(self, command: str, block: Block) -> None:
        words = shlex.split(replaced(command, self.places))
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            words = words[1:]
        if words[:2] == ["python", "-m"] and words[2] in QUICK:
            import_module(words[2]).main([*words[3:], *QUICK[words[2]]])
            return
        if words[0] != "adalink":
            assert "parsed" in block.comments or words[0] in SHELL, f"{block.place}: no test runs {words[0]}"
            subprocess.run(["bash", "-nc" if "parsed" in block.comments else "-c", command], check=True)
            return
        arguments = [*words[1:], *(() if {"--help", "--dry-run"} & set(words) else QUICK.get(words[1], ()))]
        if "parsed" in block.comments or arguments[:1] == ["launch"]:
            self._parse(arguments)
        elif arguments[:1] == ["serve"]:
            self.places[SERVED] = self._ending.enter_context(served(arguments, self._monkeypatch))
        else:
            self._main(arguments, f"{block.place}: {command}")

    def _parse(self, arguments: list[str]) -> None:
        if arguments[:1] == ["launch"]:
            at = arguments.index("--")
            launch_command_parser().parse_args([*arguments[1:at], "script.py"])
            arguments = arguments[at + 1 :]
        with self._monkeypatch.context() as patched:
            patched.setattr(Entry, "load", only_parsing)
            self._main(arguments, shlex.join(arguments))

    def _main(self, arguments: list[str], stated: str) -> None:
        with contextlib.suppress(SystemExit), mock.patch.object(parser, "_new_parser", known_parser):  # --help exits
            assert main(arguments) == 0, stated


load = Entry.load


def only_parsing(entry: Entry) -> Any:
    """The command, which then takes its arguments and does nothing."""
    command, nothing = load(entry), lambda values, plain: None
    dry = command.dry and replace(command.dry, run=nothing)
    return replace(command, run=nothing, dry=dry)


@contextlib.contextmanager
def served(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that was started with these arguments, on a free port and in a thread: its signal handler is called to end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    handlers: list[Any] = []
    monkeypatch.setattr("tasks.serve.server.signal", SimpleNamespace(SIGTERM=signal.SIGTERM, signal=lambda number, handler: handlers.append(handler)))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(main, [*arguments, "--port", str(port)])
        give_up = time.monotonic() + PATIENCE
        while not answers(port):
            assert not running.done(), running.result()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        handlers[0](signal.SIGTERM, None)
        assert running.result() == 0


def answers(port: int) -> bool:
    """Whether a server is there."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    with contextlib.ExitStack() as ending:
        runner = Runner(ending, monkeypatch)
        for block in blocks(page):
            runner.run(block)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_line_of_code_is_wider_than_a_page(page: Path) -> None:
    wide = [f"{block.place}: {line}" for block in blocks(page) for line in block.text.splitlines() if block.language != "setup" and len(line) > WIDEST]
    assert not wide, wide


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted((ROOT / "examples" / "docs" / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_reference_names_can_be_imported(page: Path) -> None:
    text = page.read_text()
    (module,) = re.findall(r"currentmodule:: (\S+)", text) or [""]
    names = [f"{module}.{name}".lstrip(".") for name in re.findall(r"auto\w+:: (\S+)", text)] + re.findall(r"{settings} (\S+)", text)
    for name in names:
        where, _, what = name.rpartition(".")
        assert hasattr(import_module(where), what), name


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "docs" / "_ext").glob("*.py")), ids=lambda file: file.stem)
def test_what_the_build_of_the_documentation_imports_is_there(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tasks."):
            assert all(hasattr(import_module(node.module or ""), name.name) for name in node.names), ast.unparse(node)


def test_every_public_name_of_the_core_is_in_the_reference() -> None:
    text = (ROOT / "examples" / "docs" / "reference" / "adalink.md").read_text()
    named = set(re.findall(r"auto\w+:: (\w+)", text))
    assert {name for name in adalink.__all__ if callable(getattr(adalink, name))} <= named
