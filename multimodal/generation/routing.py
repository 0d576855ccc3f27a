"""Rows that the model finds an adapter for itself: one vector of frozen features for each row, and a router that reads it.

    f = unit([unit(mean over patches of LN(patch)); unit(mean of the question's word embeddings); 1 where there is no question])

Nothing of it is edited, so that it is known before an adapter is. Without the question an image says little: captioning and questions see the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalink.attachment.inputs import Route
from adalink.errors import ConfigError, DataError
from adalink.lifecycle.route import Router, read_router
from adalink.tokens import AUTO, BASE_NAME
from multimodal.batches.collate import collate, stacked
from multimodal.batches.prepared import ImageBatch
from multimodal.batches.tokenize import TextTokens
from multimodal.existing.conversation import Prompt, text_of
from multimodal.existing.tower import read_images
from multimodal.generation.settings import GenerationChoice, GenerationSettings, saved_generation

__all__ = ["RowFeatures", "Routing", "asked_names", "check_members", "encoded", "generated", "load_router", "routes", "settings_of_rows"]


class RowFeatures:
    """Makes the vectors of rows; each comes of its own row alone, to the last bit.

    tower     n_patches first of an image's features are patches (`multimodal.encoders.tower`); of a model that sees already all vectors are
    """

    def __init__(self, language: Any, tower: Any) -> None:
        self._tokens, self._words = TextTokens(language.tokenizer), language.model.get_input_embeddings()
        self._n_patches = getattr(tower, "n_patches", None)

    @torch.no_grad()
    def of(self, images: Any, about: Sequence[int], questions: Sequence[str]) -> Tensor:
        """float64 [B, F], unit rows. images: a Tensor or an ImageBatch, encoded; about: which each row is about; questions: without a template's words."""
        is_one = isinstance(images, Tensor)  # else each image has vectors of its own number
        given: Any = images[:, : self._n_patches].cpu() if is_one else [sample.vectors.cpu() for sample in images.samples]
        seen = [self._image(vectors.double()) for vectors in given]
        ids = [self._tokens.ids((question.strip(),), "") if question.strip() else [] for question in questions]
        words = self._words(torch.tensor([token for row in ids for token in row], dtype=torch.int64, device=self._words.weight.device)).cpu().double()
        return torch.stack([self._row(seen[i], own) for i, own in zip(about, words.split([len(row) for row in ids]), strict=True)])

    def _image(self, vectors: Tensor) -> Tensor:
        """float64 [Dv] of [N, Dv]; zeros of no image."""
        return _unit(nn.functional.layer_norm(vectors, vectors.shape[1:]).sum(0))

    def _row(self, seen: Tensor, words: Tensor) -> Tensor:
        return _unit(torch.cat([seen, _unit(words.sum(0)), torch.tensor([float(not len(words))], dtype=torch.float64)]))


def _unit(vector: Tensor) -> Tensor:
    return nn.functional.normalize(vector, dim=0)


class Routing:
    """A model's router, and what it reads of rows."""

    def __init__(self, router: Router, features: RowFeatures) -> None:
        self.router = router
        self.features = features

    def routes(self, images: Tensor | ImageBatch, about: Sequence[int], prompts: Sequence[Prompt]) -> list[Route]:
        """Which adapter serves each row, each by itself; images: encoded."""
        rows = self.features.of(images, about, [prompt if isinstance(prompt, str) else text_of(prompt[-1]) for prompt in prompts])
        return [self.router.route(row) for row in rows]

    def checked(self, route: Route, where: str) -> Route:
        """The route. Raises DataError for that of a row like no example, where the router refuses such; where: what the sentence calls the row."""
        if not route.weights and self.router.settings.unknown == "refuse":
            raise DataError(
                f"{where} is like none of the examples of {', '.join(self.router.names)} (the nearest has a cosine of {route.cosine:.3f}): "
                f"name an adapter for it, or {BASE_NAME}"
            )
        return route


def load_router(model: Any, folder: str | Path, *, allow_other_base: bool = False) -> Routing:
    """Load the adapters of a router's folder into a model, under their names; a failure leaves the model as it was.

    Raises ConfigError where one chooses among answers or has a template of its own that mixing cannot word, CheckpointError as `read_router`.
    """
    saved, before = read_router(Path(folder)), model.adapted.active
    features = RowFeatures(model.language, model.tower)
    loaded: list[str] = []
    try:
        for name, path in saved.folders.items():
            model.load_adapter(path, name, activate=False, allow_other_base=allow_other_base)
            loaded.append(name)
        check_members(model, saved.router.names)
        if saved.router.settings.top != 1:
            _mix(model, saved.router.names)
    except BaseException:
        for name in loaded:
            model.delete_adapter(name)
        raise
    assert model.adapted.active == before
    return Routing(saved.router, features)


def check_members(model: Any, names: Sequence[str]) -> None:
    """Raise ConfigError where these adapters of a model cannot serve routed rows: one chooses among answers, or the encoder is trained."""
    if choosing := [name for name in names if name in model.heads]:
        raise ConfigError(f"the adapter {choosing[0]} chooses among answers, and a routed row is written: route among others")
    if model.tower.adapter is not None:
        raise ConfigError("the encoder has trained weights, and a router reads features of a frozen one: route among adapters of the language model alone")


def _mix(model: Any, names: Sequence[str]) -> None:
    """Let the adapters serve rows together. Raises ConfigError where these have other words, or a connector of their own, and as `add_mixture`."""
    worded = {name: (model.template_of(name), saved_generation(model.adapted.tasks.get(name, {}))) for name in names}
    if other := [name for name in names if worded[name] != worded[names[0]]]:
        raise ConfigError(
            f"the adapters {names[0]} and {other[0]} were trained with other templates or generation settings, and a mixed row has one: let one adapter "
            "serve each row (--top 1)"
        )
    if own := [name for name in names if model.connectors is not None and model.connectors.has_own(name)]:
        raise ConfigError(f"the adapter {own[0]} has a connector of its own, so it cannot be mixed with others: let one adapter serve each row (--top 1)")
    model.adapted.add_mixture(names)
    model.adapted.tasks[AUTO] = {**model.adapted.tasks.get(names[0], {}), "task": ""}


# ----------------------------------------
# Texts of images and prompts, whoever chooses the adapters.


def asked_names(active: str | None, n_rows: int, adapter_names: Sequence[str | None] | None) -> list[str | None]:
    """The name for each row, `auto` where the router is to choose: the active adapter's where none are given, one for all where it is `auto`."""
    if adapter_names is None or adapter_names == AUTO:
        return [active if adapter_names is None else AUTO] * n_rows
    return list(adapter_names)


def generated(
    model: Any, asked: Sequence[tuple[Any, Prompt]], names: list[str | None], choice: GenerationChoice, settings: GenerationSettings | None
) -> list[str]:
    """One text for each row: its images, its prompt, and the name of its adapter, or `auto`. Raises as `VisionLanguageModel.generate`."""
    to_route = [i for i, name in enumerate(names) if name == AUTO and not isinstance(name, Route)]
    model.adapted.serving(len(asked), [None if i in to_route else name for i, name in enumerate(names)])  # refuses unknown names before anything runs
    routing = _routing(model) if to_route else None
    if not asked:
        return []
    read, about = read_images(model.tower, [beside for beside, _ in asked])
    images: Any = stacked(read)
    if routing is not None:
        images = encoded(model, images)
        for i, route in zip(to_route, routing.routes(images, [about[i] for i in to_route], [asked[i][1] for i in to_route]), strict=True):
            names[i] = routing.checked(route, f"row {i}")
    encoders = {name: model.row_encoder(BASE_NAME if name is None else name) for name in set(names)}
    rows = [encoders[name].prompt(prompt, read[i]) for name, (_, prompt), i in zip(names, asked, about, strict=True)]
    texts = [""] * len(rows)
    for own, part in ({settings: list(range(len(rows)))} if settings else settings_of_rows(model.adapted.tasks, names)).items():
        batch = collate(
            [rows[i] for i in part], [about[i] for i in part], images, kind="patches" if to_route else "pixels", side="left",
            pad_id=model.language.tokenizer.pad_token_id,
        )  # fmt: skip
        for i, text in zip(part, model.generate_batch(batch.to(model.device), choice.over(own), [names[i] for i in part]), strict=True):
            texts[i] = text
    return texts


def routes(model: Any, asked: Sequence[tuple[Any, Prompt]]) -> list[Route]:
    """The route of each row; of one like no example that of the frozen model. Raises ConfigError without a router."""
    routing = _routing(model)
    if not asked:
        return []
    read, about = read_images(model.tower, [beside for beside, _ in asked])
    return routing.routes(encoded(model, stacked(read)), about, [prompt for _, prompt in asked])


def _routing(model: Any) -> Routing:
    if model.routing is None:
        raise ConfigError(f"a row names {AUTO!r}, and this model has no router that would choose: load one with load_router")
    found: Routing = model.routing
    return found


def encoded(model: Any, images: Any) -> Any:
    """The images with what the frozen encoder gives: float [I, N + L, Dv] of pixels; of a model that sees already, beside what its tower reads."""
    if not isinstance(images, ImageBatch):
        return model.encode(images)
    vectors = model.tower.encode(images.to(model.device))
    return ImageBatch(samples=tuple(replace(image, vectors=one.vectors) for image, one in zip(images.samples, vectors, strict=True)))


def settings_of_rows(tasks: Mapping[str, Mapping[str, Any]], names: Sequence[str | None]) -> dict[GenerationSettings, list[int]]:
    """The rows by the settings that their adapters were saved with. Raises ConfigError where those of rows that name theirs differ."""
    own = {i: saved_generation(tasks.get(name or "", {})) for i, name in enumerate(names) if name != BASE_NAME}
    found = {setting: names[i] for i, setting in own.items() if not isinstance(names[i], Route)}
    if len(found) > 1:
        raise ConfigError(f"the adapters {' and '.join(map(str, found.values()))} were saved with different generation settings: give `settings` for this call")
    groups: dict[GenerationSettings, list[int]] = {}
    for i in range(len(names)):
        groups.setdefault(own.get(i, next(iter(found), GenerationSettings())), []).append(i)
    return groups
