"""METEOR and SPICE through the official Java programs, where they are installed."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from adalink.errors import ConfigError, DataError
from tasks.metrics.captions import same_images, tokenized

__all__ = ["JavaScores", "meteor", "spice"]


@dataclass(frozen=True, kw_only=True)
class JavaScores:
    """One metric's figure of the corpus and of each image, as fractions of 1."""

    corpus: float
    per_image: dict[int, float]
    scorer: str


def meteor(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> JavaScores:
    """METEOR 1.5 of one caption per image.

    Raises ConfigError where pycocoevalcap or Java is missing, DataError where the two do not hold the same images.
    """
    images = same_images(hypotheses, references)
    program = _official("meteor.meteor", "METEOR").Meteor()
    try:
        corpus, each = program.compute_score(*_tokenized(images, hypotheses, references))
    except (OSError, ValueError) as error:
        raise DataError(f"METEOR's Java program stopped ({error}); try `java -version`, and give it the 2 GB of memory it asks for") from error
    return JavaScores(corpus=float(corpus), per_image=dict(zip(images, map(float, each), strict=True)), scorer=_scorer("METEOR 1.5"))


def spice(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> JavaScores:
    """SPICE 1.0 of one caption per image; the first use downloads 400 MB of Stanford's models, and Java takes 8 GB of memory.

    Raises ConfigError where pycocoevalcap, Java or the models are missing, DataError where the two do not hold the same images.
    """
    images = sorted(same_images(hypotheses, references))
    module = _official("spice.spice", "SPICE")
    try:
        with redirect_stdout(sys.stderr):  # it prints its progress, which must not stand among figures
            corpus, each = module.Spice().compute_score(*_tokenized(images, hypotheses, references))
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"SPICE did not run ({error}): it needs Stanford's models, which it downloads from nlp.stanford.edu at first use, and a Java "
            "that its program accepts (version 8 is the surest); leave SPICE out, or run it once with a network"
        ) from error
    per_image = {image: float(row["All"]["f"]) for image, row in zip(images, each, strict=True)}
    return JavaScores(corpus=float(corpus), per_image=per_image, scorer=_scorer("SPICE 1.0"))


def _official(module: str, metric: str) -> Any:
    """The module of pycocoevalcap that starts the Java program."""
    try:
        found = importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise ConfigError(f"{metric} needs pycocoevalcap, which is not installed ({error}); run: pip install 'adalink[coco]'") from error
    if shutil.which("java") is None:
        raise ConfigError(f"{metric} runs in Java, and there is no `java` on the PATH; install a Java runtime, such as openjdk-17-jre-headless")
    return found


def _tokenized(images: Sequence[int], hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> tuple[Any, Any]:
    """References and hypotheses as the official code hands them over: tokenised, by image."""
    corpus = tokenized(hypotheses, references)
    words = {image: [" ".join(text) for text in texts] for image, texts in zip(references, corpus.references, strict=True)}
    given = {image: [" ".join(text)] for image, text in zip(references, corpus.hypotheses, strict=True)}
    return {image: words[image] for image in images}, {image: given[image] for image in images}


def _scorer(name: str) -> str:
    return f"{name} (pycocoevalcap {version('pycocoevalcap')})"
