from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from shared import fixtures

from adalink.errors import ConfigError, DataError
from tasks.metrics.captions import meteor, spice

needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None, reason="pycocoevalcap or Java is not installed"
)


@needs_java
@pytest.mark.parametrize("path", sorted(fixtures("captions").glob("edge_*.json")), ids=lambda path: path.stem)
def test_meteor_of_every_edge_corpus_equals_the_recorded_one(path: Path) -> None:
    for made in json.loads(path.read_text())["sets"]:
        official = made["official"]
        if "corpus_METEOR" not in official:
            continue
        scores = meteor(dict(enumerate(made["hyps"])), dict(enumerate(made["refs"])))
        assert scores.corpus == pytest.approx(official["corpus_METEOR"], abs=1e-9)
        assert list(scores.per_image.values()) == pytest.approx(official["per_image_METEOR"], abs=1e-9)
        assert scores.scorer.startswith("METEOR 1.5 (pycocoevalcap 1.")


@needs_java
def test_images_without_a_caption_are_named() -> None:
    with pytest.raises(DataError, match="1 images have no generated caption"):
        meteor({}, {1: ["a dog"]})


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has not imported pycocoevalcap yet; what a test loads is forgotten again."""
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


@pytest.mark.parametrize("metric", [meteor, spice])
def test_a_missing_package_is_named_with_the_command_that_installs_it(metric: object, unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ConfigError, match=r"(METEOR|SPICE) needs pycocoevalcap, which is not installed .*pip install 'adalink\[coco\]'"):
        metric({1: "a dog"}, {1: ["a dog"]})  # type: ignore[operator]


def test_missing_java_is_named(unloaded: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.meteor", "pycocoevalcap.meteor.meteor"):
        unloaded.setitem(sys.modules, name, ModuleType(name))
    unloaded.setenv("PATH", "")
    with pytest.raises(ConfigError, match="METEOR runs in Java, and there is no `java` on the PATH; install a Java runtime"):
        meteor({1: "a dog"}, {1: ["a dog"]})
