"""A composed model in the lmms_eval suite: `lmms-eval --model adalink --model_args adapter=runs/vqa/adapter --tasks ... --force_simple`.

An entry point of the group `lmms_eval.models` names `manifest`, so the suite finds the model by itself once both are installed
(`pip install 'adalink[lmms_eval]'`). Checked with lmms_eval 0.7.3: found through its registry, made from its argument string, and run on
requests of its own kind. Its tasks download their data from a hub, so no published task was run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from adalink.errors import ConfigError, DataError
from multimodal.generation.settings import GenerationSettings
from multimodal.processes import process_state
from tasks.data.files import text_lines
from tasks.runs.compose import load_adapted

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as missing:
    raise ConfigError(f"the lmms_eval suite is not installed ({missing}): pip install 'adalink[lmms_eval]'") from missing

__all__ = ["LmmsEvalModel", "manifest"]


def manifest() -> Any:
    """What the suite's registry reads."""
    return ModelManifest(model_id="adalink", simple_class_path="tasks.commands.lmms_eval.LmmsEvalModel")


class LmmsEvalModel(lmms):  # type: ignore[misc]  # the suite takes subclasses of its own class alone
    """Generates for the suite's requests. Texts stop where a request's `until` stands; sampling is not offered, and a temperature is ignored."""

    is_simple = True

    def __init__(
        self,
        adapter: str,
        encoder: str | None = None,
        language_model: str | None = None,
        model: str | None = None,
        question: Literal["whole", "first_line"] = "whole",
        batch_size: int | str = 16,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ) -> None:
        """Load the adapter folder with the frozen parts that it names, or others by the same fingerprint.

        question         first_line drops what a task adds below the question ("Answer the question using a single word or phrase."),
                         which an adapter trained on bare questions has never seen
        max_batch_size, device   given by the suite and not used: the device is accelerate's
        """
        super().__init__()
        if question not in ("whole", "first_line"):
            raise ConfigError(f"question is {question!r}: give whole or first_line")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r}: give a number from 1; it is not found automatically")
        self._model, saved = load_adapted(Path(adapter), model=model, encoder=encoder, language_model=language_model)
        self._asks = "{question}" in saved["prompt"]
        self._question = question
        self._batch_size = int(batch_size)
        state = process_state()
        self._rank, self._world_size = state.process_index, state.num_processes

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One text for each request, in their order. Raises DataError where a request has not exactly one image."""
        texts: dict[int, str] = {}
        by_settings: dict[GenerationSettings, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(_settings(request.args[1]), []).append(number)
        for settings, numbers in by_settings.items():
            for start in range(0, len(numbers), self._batch_size):
                part = numbers[start : start + self._batch_size]
                images = [self._image(requests[number]) for number in part]
                asked = [self._prompt(requests[number].args[0]) for number in part]
                found = self._model.generate(images, asked, settings=settings)
                for number, text in zip(part, found, strict=True):
                    texts[number] = _until(text, requests[number].args[1])
        return [texts[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: an adapter answers one question about one image. Raises ConfigError."""
        raise ConfigError("adalink models answer one question about one image: choose tasks of one round")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered. Raises ConfigError."""
        raise ConfigError("adalink models generate, and give no likelihoods to the suite: choose tasks whose output type is generate_until")

    def _image(self, request: Any) -> Image:
        _, _, to_visual, doc_id, task, split = request.args
        visuals = [visual for visual in to_visual(self.task_dict[task][split][doc_id]) if visual is not None]
        if len(visuals) != 1 or not isinstance(visuals[0], Image):
            raise DataError(f"document {doc_id} of {task} has {len(visuals)} visuals; expected one image: adalink models see one at a time")
        return visuals[0].convert("RGB")

    def _prompt(self, context: str) -> str:
        if not self._asks:
            return ""
        text = context.replace("<image>", " ").strip()
        return text_lines(text)[0] if self._question == "first_line" and text else text


def _settings(given: dict[str, Any]) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=int(given.get("max_new_tokens") or 32), num_beams=int(given.get("num_beams") or 1))


def _until(text: str, given: dict[str, Any]) -> str:
    stops = given.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
