"""Texts about images as an existing model's own processor and chat template word them."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adalink.errors import ConfigError, DataError
from multimodal.batches.prepared import Prepared
from multimodal.existing.budget import ImageTokens
from multimodal.existing.conversation import Turn

__all__ = ["GRIDS", "NO_BUDGET", "Processor", "first_line"]

BLANK = Image.new("RGB", (8, 8))
NO_BUDGET = ImageTokens()
N_PROMPTS = 256  # whose ids are cached
N_SCALED, N_ESTIMATED, MOST_PIXELS = 8, 16, 2**22  # how often an image is scaled at most, and how far up
KINDS = ("token_type_ids", "mm_token_type_ids")
GRIDS = ("image_grid_thw", "target_sizes")  # how many patches an image has in each dimension: Qwen2-VL's name, and MiniCPM-V's


class _Given:
    """Stands in for an image processor: the images were prepared before."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: what it would give is there."""
        return {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real, name)


class Processor:
    """A processor of transformers in two halves: images alone, each once, and texts about images that were prepared before.

    real      the processor
    image_ids the ids of image tokens
    inputs    names of what the model's tower reads
    budget    how many tokens an image may cost
    Pickles without weights, so worker processes hold one.
    """

    def __init__(self, real: Any, image_ids: Sequence[int], inputs: Sequence[str], budget: ImageTokens = NO_BUDGET) -> None:
        self.real, self.image_ids, self.inputs, self.budget = real, frozenset(image_ids), tuple(inputs), budget
        self.tokenizer = real.tokenizer
        self._blanks: dict[int, Mapping[str, Any]] = {}
        self._prompts: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}  # the ids of the last prompts: captions of an image have one

    def copied(self) -> Processor:
        """The same with a tokenizer of its own, for other threads than those that use this one; only one of them may use that at a time."""
        return Processor(copy.deepcopy(self.real), tuple(self.image_ids), self.inputs, self.budget)

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template; a model without one reads a text as it is."""
        return bool(getattr(self.real, "chat_template", None) or getattr(self.tokenizer, "chat_template", None))

    @property
    def image_mark(self) -> str:
        """What stands for an image in a text."""
        return str(getattr(self.real, "image_token", None) or "<image>")

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the token types mark answers (PaliGemma), and not images."""
        return "suffix" in inspect.signature(type(self.real).__call__).parameters

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        """How the tokenizer's own tokens are spelled; a text of people that holds one would be taken as that."""
        return tuple(str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special and len(str(token.content)) > 1)

    def settings(self) -> dict[str, str]:
        """What decides what an image becomes, as JSON by name: the processor's own settings, and its image processor's."""
        own = {name: value for name, value in self.real.to_dict().items() if not isinstance(value, dict) and name != "chat_template"}
        found = {**own, **{f"image_processor.{name}": value for name, value in self.real.image_processor.to_dict().items()}}
        known = {name: value for name, value in found.items() if value is not None and not name.endswith(("_type", "_class"))}
        return {name: json.dumps(value, sort_keys=True, default=str) for name, value in sorted({**known, **self.budget.saved()}.items())}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """How all tokens are spelled that are taken out of a text before it is split, special or not."""
        return tuple(str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if not str(token.content).isspace())

    def marks(self, n: int) -> str:
        """What stands for so many images in a text; nothing where the processor puts their tokens there itself."""
        return "" if self._puts_images_first else self.image_mark * n

    @property
    def _puts_images_first(self) -> bool:
        """Whether the processor puts an image's tokens before the text's itself (BLIP-2)."""
        return _has_own_call(self.real) and bool(getattr(self.real, "num_query_tokens", None))

    def prepare(self, images: Sequence[Image.Image]) -> Prepared:
        """The images of a sample, scaled to the budget. Raises DataError for one that the processor cannot take, or that no scale brings there."""
        found = [self.scaled(image.convert("RGB")) for image in images]
        for image, (_, count, _) in zip(images, found, strict=True):
            if self.budget.max is not None and count > self.budget.max:
                raise DataError(f"an image of {image.width} x {image.height} has {count} tokens at any scale, and image_tokens allows {self.budget.max}")
        return Prepared(
            wording=tuple(wording for wording, _, _ in found),
            counts=tuple(count for _, count, _ in found),
            inputs=tuple(inputs for _, _, inputs in found),
            grids=tuple(inputs[name] for _, _, inputs in found for name in GRIDS if name in inputs),
        )

    @cached_property
    def prepares_apart(self) -> bool:
        """Whether an image among several of a conversation is what it is alone (LLaVA-OneVision gives it fewer tokens)."""
        if _has_own_call(self.real):
            return True
        try:
            several = self.real._process_images([[BLANK, BLANK]], **self._settings())[1]
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):  # it takes images one after the other
            return True
        return bool(several[0] == self._run(BLANK)[1])

    def _settings(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.real._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, return_tensors="pt")["images_kwargs"]
        return found

    def scaled(self, image: Image.Image) -> tuple[str, int, dict[str, Tensor]]:
        """An RGB image's wording, count and inputs at its own scale, or at one that keeps the budget; at the nearest found, where none does.

        The next scale follows from the tokens that there are and may be. It lies further off where the last one changed nothing (a processor has
        bounds of its own), and halfway where one was too small and one too large.
        """
        scale, jump = self._estimated_scale(image), 1
        found = self._prepared(_resized(image, scale))
        low, high = self.budget.aim(found[1])
        tried, small, large = [found], 0.0, 0.0
        while not low <= found[1] <= high and len(tried) <= N_SCALED:
            small, large = (scale, large) if found[1] < low else (small, scale)
            scale = (small * large) ** 0.5 if small and large else scale * ((low if found[1] < low else high) / max(found[1], 1)) ** (jump / 2)
            scale = min(scale, max((MOST_PIXELS / (image.width * image.height)) ** 0.5, 1.0))
            found = self._prepared(_resized(image, scale))
            jump = 2 * jump if found[1] == tried[-1][1] else 1
            tried.append(found)
        return min(tried, key=lambda one: self.budget.distance(one[1], low, high))

    def _estimated_scale(self, image: Image.Image) -> float:
        """Where an image has far more tokens than it may by its processor's own estimate, the scale at which it has no more; else 1.

        So a very large image is never prepared as it is.
        """
        most, scale, estimate = self.budget.max, 1.0, getattr(self.real, "_get_num_multimodal_tokens", None)
        if most is None or estimate is None:
            return 1.0
        for attempt in range(N_ESTIMATED):
            try:
                count = int(estimate(image_sizes=[_scaled_size(image, scale)[::-1]])["num_image_tokens"][0])
            except (AttributeError, KeyError, TypeError, ValueError):  # this processor makes none
                return 1.0
            if count <= (most if attempt else 2 * most):
                return scale
            scale *= (most / count) ** 0.5
        return 1.0

    def _prepared(self, image: Image.Image) -> tuple[str, int, dict[str, Tensor]]:
        try:
            features, wording = self._run(image)
        except (ValueError, ZeroDivisionError, RuntimeError) as error:
            raise DataError(f"the model's processor cannot take an image of {image.width} x {image.height}: {first_line(error)}") from None
        inputs = {name: torch.as_tensor(features[name]) for name in self.inputs if name in features}
        count = sum(id in self.image_ids for id in self.tokenizer(wording, add_special_tokens=False)["input_ids"])
        return wording, count, inputs

    def _run(self, image: Image.Image) -> tuple[Mapping[str, Any], str]:
        settings = self._settings()
        if self._puts_images_first:
            features = self.real.image_processor(image, **settings)
            return features, self.image_mark * int(self.real.num_query_tokens)
        if _has_own_call(self.real):
            found = self.real(text=[self.image_mark], images=[image], return_tensors="pt")
            return found, self.image_mark * sum(id in self.image_ids for id in _row(found["input_ids"]))
        features, wording = self.real._process_images([image], **settings)
        return features, str(wording[0])

    def ids(self, text: str | Sequence[Turn], images: Prepared, *, ends: bool = False) -> tuple[list[int], list[int]]:
        """The ids of a text, or of the turns of a conversation, about images; and the processor's token types, 0 where it gives none.

        ends: the conversation ends with the assistant's own turn; else one begins for the assistant
        Raises ConfigError for turns that the chat template does not take.
        """
        if ends:
            return self._ids(text, images, ends=True)
        chat = getattr(self.real, "chat_template", None), getattr(self.tokenizer, "chat_template", None)
        key = (text if isinstance(text, str) else json.dumps(text, default=repr), isinstance(text, str), images.wording, *map(str, chat))
        if key not in self._prompts:
            if len(self._prompts) == N_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = self._ids(text, images, ends=False)
        ids, kinds = self._prompts[key]
        return list(ids), list(kinds)

    def _ids(self, text: str | Sequence[Turn], images: Prepared, *, ends: bool) -> tuple[list[int], list[int]]:
        words, n = self._of_texts(images), len(images.wording)
        try:
            if isinstance(text, str):
                found = words(images=[BLANK] * n or None, text=[text])
            else:
                found = words.apply_chat_template(
                    [_with_blanks(turn) for turn in text], tokenize=True, return_dict=True, add_generation_prompt=not ends,
                    sanitize_control_tokens=self._spells(text), processor_kwargs={"padding": False},
                )  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            why = first_line(error)
            if isinstance(text, str):
                raise DataError(f"the model's processor does not take the text {text[:60]!r} with {n} images: {why}") from None
            if self._spells(text):
                raise DataError(f"a text spells a token of the model's own, and its processor cannot read it as letters: {why}") from None
            raise ConfigError(f"the model's chat template does not take this conversation: {why}") from None
        ids = _row(found["input_ids"])
        kinds = next((_row(found[name]) for name in KINDS if name in found), [0] * len(ids))
        return ids, kinds

    def _of_texts(self, images: Prepared) -> Any:
        """The processor for texts about images that were prepared."""
        words, n = copy.copy(self.real), len(images.wording)
        words.image_processor = _Given(self.real.image_processor)
        words._process_images = lambda images_, **kwargs: (dict(self._blank_features(n)), list(images.wording))
        return words

    def _blank_features(self, n: int) -> Mapping[str, Any]:
        """What the image processor gives for n small images, without what the tower reads: some processors look at the rest (InternVL's `num_patches`)."""
        if n not in self._blanks:
            found = self.real.image_processor([BLANK] * n, **self._settings())
            self._blanks[n] = {name: value[:0] if name in self.inputs else value for name, value in found.items()}
        return self._blanks[n]

    def _spells(self, turns: Sequence[Turn]) -> bool:
        """Whether what people wrote may hold the spelling of a token that is no letters."""
        texts = (turn["content"] if isinstance(turn["content"], str) else "\0".join(part.get("text", "") for part in turn["content"]) for turn in turns)
        return any(spelling in text for text in texts for spelling in self.added)


def first_line(error: Exception) -> str:
    """What an error says, in short; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _scaled_size(image: Image.Image, scale: float) -> tuple[int, int]:
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _resized(image: Image.Image, scale: float) -> Image.Image:
    return image if scale == 1.0 else image.resize(_scaled_size(image, scale), Image.Resampling.BICUBIC)


def _has_own_call(processor: Any) -> bool:
    """Whether a processor joins images and texts in its own way (BLIP-2, Idefics2)."""
    return "_process_images" not in inspect.getsource(type(processor).__call__) and "super().__call__" not in inspect.getsource(type(processor).__call__)


def _with_blanks(turn: Turn) -> dict[str, Any]:
    content = turn["content"]
    if isinstance(content, str):
        return dict(turn)
    return {**turn, "content": [{**part, "image": BLANK} if part["type"] == "image" else dict(part) for part in content]}


def _row(values: Any) -> list[int]:
    whole = values.tolist() if isinstance(values, Tensor) else values
    return [int(value) for value in (whole[0] if whole and isinstance(whole[0], (list, tuple)) else whole)]
