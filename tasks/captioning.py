"""Captioning: say what is in the image; scored as COCO captions are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from adalink.errors import ConfigError, DataError
from multimodal.sample import Sample, SampleSource
from multimodal.template import Template, Text
from tasks.data.reader import Official
from tasks.metrics.bootstrap import caption_metrics
from tasks.metrics.captions import score_captions
from tasks.metrics.files import caption_results_name, write_caption_results
from tasks.task import Asked, Score

__all__ = ["Captioning"]

# What a model that sees already is asked, inside its own chat template.
WORDS = Template(prompt="<image>Describe the image in one short sentence.", target="{text}")
_METRICS = ("CIDEr", "Bleu_4", "Bleu_3", "Bleu_2", "Bleu_1", "ROUGE_L")


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Captioning with the COCO scores."""

    name: ClassVar[str] = "captioning"
    headline: ClassVar[str] = "CIDEr"

    template: Template = Template(prompt="<image><bos>", target="{text}<eos>")  # words around the image and the caption
    captions_per_image: int = 0  # how many of an image's captions each step learns, drawn anew each epoch; 0: all of them
    style: Literal["raw", "plain"] = "raw"  # plain: lower case, no space before marks, a final full stop, as many small models were trained

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.captions_per_image < 0:
            raise ConfigError(f"captions_per_image is {self.captions_per_image}: give 0 (all) or more")
        if self.style not in ("raw", "plain"):
            raise ConfigError(f"the captions' style is {self.style!r}: give raw or plain")

    def words_for(self, sees_already: bool, as_written: bool = False) -> Template:
        """The template; for a model that sees already a request in words, where the template is the one by default."""
        return WORDS if sees_already and self.template == Captioning().template else self.template

    @property
    def results_name(self) -> Callable[[str, str], str]:
        """Such as captions_val2014_adalink_results.json."""
        return caption_results_name

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """Each caption, or as many as were asked for."""
        captions = list(sample.captions)
        if self.captions_per_image and len(captions) > self.captions_per_image:
            captions = rng.sample(captions, self.captions_per_image)
        return [Text("", plain(caption) if self.style == "plain" else caption) for caption in captions]

    def asked(self, sample: Sample) -> Sequence[Asked]:
        """One caption for each image."""
        return [Asked(sample.image_id, "")]

    def is_graded(self, sample: Sample) -> bool:
        """Whether it has captions."""
        return bool(sample.captions)

    def score(self, predictions: Mapping[int, str], source: SampleSource) -> Score:
        """CIDEr-D, BLEU and ROUGE-L in percent, against every caption of the source's images that were predicted.

        Raises DataError where nothing was predicted, or an image has no caption to score against.
        """
        references = {sample.image_id: sample.captions for sample in (source[i] for i in range(len(source))) if sample.image_id in predictions}
        if not references:
            raise DataError("nothing was predicted for this data set: every image of it was bad, or it is another one")
        if lonely := [item for item, captions in references.items() if not captions]:
            raise DataError(f"{len(lonely)} of {len(references)} images have no caption to score against, such as image {lonely[0]}: give their captions")
        scores = score_captions(dict(predictions), references)
        metrics = {name: 100 * scores.corpus[name] for name in _METRICS}
        items = {item: 100 * row["CIDEr"] for item, row in scores.per_image.items()}
        return Score(
            metrics=metrics, headline=self.headline, items=items, scorer=scores.scorer, resampled=caption_metrics(scores).chosen(_METRICS, scale=100)
        )  # fmt: skip

    def write_results(self, path: Path, predictions: Mapping[int, str], official: Official | None = None) -> None:
        """COCO's result file."""
        write_caption_results(path, predictions, official)


def plain(caption: str) -> str:
    """Lower case, single spaces, none before marks, one full stop. "A dog runs ." -> "a dog runs."."""
    text = re.sub(r"\s+([.,!?;:'])", r"\1", " ".join(caption.lower().split()))
    return text if text.endswith((".", "!", "?")) else text + "."
