"""One small run for all tests of a module, and documents in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import Done, Write, train


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a captioning run with the module's OPTIONS, and what the command did."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train("captioning", out, small=request.module.OPTIONS)


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Done]) -> Path:
    """The folder, where the run has ended well."""
    out, done = trained
    assert done.code == 0, done
    return out


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a document as JSON into a file of this name."""

    def to(name: str, document: object) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return to
