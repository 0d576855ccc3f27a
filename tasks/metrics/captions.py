"""Caption scores equal to those of the official COCO caption evaluation, without Java."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import numpy as np

from adalink.errors import ConfigError, DataError
from tasks.metrics.bleu import BleuSums, bleu, bleu_sums
from tasks.metrics.cider import cider
from tasks.metrics.ngrams import MAX_N, Corpus, Floats, count_ngrams, cut_at_spaces
from tasks.metrics.ptb.tokenizer import tokenize_captions
from tasks.metrics.rouge import rouge_l
from tasks.metrics.vqa import refuse

__all__ = ["CAPTION_SCORER", "CaptionScores", "JavaScores", "meteor", "same_images", "score_captions", "spice", "tokenized"]


# Named beside every metric: what it equals, and the version it was checked against.
CAPTION_SCORER = "COCO caption evaluation (equal to pycocoevalcap 1.2)"


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """The metrics of a corpus and of each image; CIDEr is CIDEr-D, all are fractions of 1 (CIDEr of 10) as the official code gives them.

    corpus     {"Bleu_1", .. "Bleu_4", "ROUGE_L", "CIDEr"}
    per_image  {image id: the same six}; Bleu_n of an image is that of a corpus of one, so their mean is not the corpus metric
    bleu       what corpus BLEU is made of, one row per image in the order of per_image
    """

    corpus: dict[str, float]
    per_image: dict[int, dict[str, float]]
    bleu: BleuSums
    scorer: str = CAPTION_SCORER


def score_captions(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> CaptionScores:
    """Scores of one generated caption per image against the references of the same images.

    The references' order of images is that of the annotation file, as the official evaluation has it: its tokenizer reads all captions as
    one text, so a few metrics depend on it.

    Raises DataError where the two do not hold the same images, or an image has no reference.
    """
    images = same_images(hypotheses, references)
    corpus = tokenized(hypotheses, references)
    return _score(images, corpus, cut_at_spaces(corpus))


def tokenized(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> Corpus:
    """The words of both sides, image by image in the order of the references; each side is one file to the official tokenizer."""
    words = iter(tokenize_captions(chain.from_iterable(references.values())))
    return Corpus(
        hypotheses=tokenize_captions(hypotheses[image] for image in references),
        references=[list(islice(words, len(texts))) for texts in references.values()],
    )


def _score(images: Sequence[int], tokens: Corpus, corpus: Corpus) -> CaptionScores:
    counts = count_ngrams(corpus)
    sums = bleu_sums(corpus, counts)
    columns: dict[str, Floats] = {}
    rows = bleu(sums.correct, sums.guess, sums.length, sums.reference_length)
    for n in range(MAX_N):
        columns[f"Bleu_{n + 1}"] = rows[:, n]
    columns["ROUGE_L"] = rouge_l(tokens)
    columns["CIDEr"] = cider(corpus, counts)
    whole = bleu(sums.correct.sum(0), sums.guess.sum(0), sums.length.sum(), sums.reference_length.sum()).tolist()
    metrics = {f"Bleu_{n + 1}": whole[n] for n in range(MAX_N)}
    metrics |= {name: float(np.mean(columns[name])) for name in ("ROUGE_L", "CIDEr")}
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    per_image = {image: dict(zip(columns, row, strict=True)) for image, row in zip(images, values, strict=True)}
    return CaptionScores(corpus=metrics, per_image=per_image, bleu=sums)


def same_images(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> list[int]:
    """The images of both, in the order of the references.

    Raises DataError where they differ, where there are none, and where an image has no reference.
    """
    if not references:
        raise DataError("there are no references to score against; expected at least one image")
    missing = [image for image in references if image not in hypotheses]
    unknown = [image for image in hypotheses if image not in references]
    bare = [image for image in references if not references[image]]
    refuse(missing, "images have no generated caption", "expected one for every image with references")
    refuse(unknown, "images have no references", "expected captions of the images with references alone")
    refuse(bare, "images have an empty list of references", "expected at least one for each")
    return list(references)


# ----------------------------------------
# METEOR and SPICE through the official Java programs, where they are installed.


@dataclass(frozen=True, kw_only=True)
class JavaScores:
    """One metric's metric of the corpus and of each image, as fractions of 1."""

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
        with redirect_stdout(sys.stderr):  # it prints its progress, which must not stand among metrics
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
