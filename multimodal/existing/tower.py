"""The tower and the connector of an existing vision-language model: images in, the vectors that stand among its words out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from adalink import AdaptedModel, Adapter, Anatomy, FrozenPart, Slots, TokenMap
from adalink.attachment.existing import image_token_ids
from adalink.attachment.vision import attach_vision, read_vision
from adalink.checkpoint.fingerprint import Sketch, part_of
from adalink.edit import execution_device
from adalink.errors import ConfigError, DataError
from multimodal.batches.collate import Batch
from multimodal.batches.prefix_sharing import REFUSALS
from multimodal.batches.prepared import ImageBatch, Prepared, joined, joined_inputs
from multimodal.data.images.decode import ImageOrFile
from multimodal.data.inputs import prepared
from multimodal.encoders.bound_parts import N_VALUES, processor_digest, test_image, tokenizer_digest
from multimodal.encoders.tower import NoTower, VisionTower
from multimodal.existing.budget import ImageTokens
from multimodal.existing.connector import Connectors, tower_of
from multimodal.existing.inputs import HostForm, HostInputs, VectorForm
from multimodal.existing.rows import Blocks, ConversationRows, positions_of
from multimodal.existing.words import KINDS, NO_BUDGET, Processor, first_line
from multimodal.language import Language
from multimodal.template import Template

__all__ = ["ModelTower", "Preparing", "read_images", "refuse_over"]


class Preparing:
    """An image to what the model's tower reads; holds no weights, so worker processes can have it."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Prepared:
        """Raises DataError for an image that the processor cannot take."""
        return self.processor.prepare([image])


class ModelTower:
    """What a composed model's `VisionTower` is, for a model that sees already; its weights are the model's own, and frozen.

    preprocess  PIL image -> Prepared
    name        what the model was loaded from
    """

    layer = -1
    adapter: Adapter | None = None
    connectors: Connectors | None = None  # of the model's adapters, where it has any

    def __init__(self, language: Language, real_processor: Any, image_ids: Sequence[int], budget: ImageTokens = NO_BUDGET) -> None:
        self.language, self.name = language, language.name
        self._owner = features_owner(language.model, language.name)
        takes = tuple(inspect.signature(self._owner.get_image_features).parameters)
        self.processor = Processor(real_processor, image_ids, takes, budget)
        refuse_over(self.processor, self.name)
        self.preprocess = Preparing(self.processor)
        self.positions = positions_of(language.model)
        self.encoder = nn.Module()  # no weights beside those of the language model, which holds the tower
        try:
            self.example = self.preprocess(test_image())
            self.small = self.preprocess(test_image().resize((64, 40)))  # of few tokens, where their number follows the image's size
        except (*REFUSALS, DataError) as error:
            raise ConfigError(
                f"the processor of '{self.name}', a {type(real_processor).__name__}, does not prepare an image ({first_line(error)}): see that its files "
                "are the model's own, or adapt the model with adalink.get_adalink_model and a loop of your own"
            ) from error
        self._check_reads_images_alone()
        self.form = self._read_form()
        self.blocks: Blocks = ""  # found out by `multimodal.existing.trial`

    @classmethod
    def of(cls, language: Language, real_processor: Any, budget: ImageTokens = NO_BUDGET) -> ModelTower:
        """The tower of what `multimodal.existing.load.load_existing` gave. Raises ConfigError for a budget that its processor cannot keep."""
        return cls(language, real_processor, image_token_ids(language.model), budget)

    def vision_anatomy(self) -> Anatomy:
        """Where methods can be placed in the tower. Raises AttachError where it is no plain vision transformer (Qwen2-VL's joins all images)."""
        return read_vision(self._vision)

    def adapt(self, adapter: Adapter) -> Adapter:
        """Attach an adapter to the tower, for good: from now on its vectors are trained through, and nothing may cache them.

        adapter: made with `vision_anatomy()`. Raises ConfigError where the tower has one already.
        """
        if self.adapter is not None:
            raise ConfigError(f"the tower of '{self.name}' has an adapter already: put all its methods into one")
        attach_vision(self._vision, adapter)
        self.adapter = adapter.to(self._device)
        return adapter

    @property
    def _vision(self) -> nn.Module:
        if (found := tower_of(self.language.model)) is None:
            raise ConfigError(f"no tower was found in '{self.name}', which vision_methods would act on: leave them out")
        return found

    def serve(self, adapted: AdaptedModel) -> Connectors:
        """From now on its adapters may have connectors of their own."""
        base = self.language.model
        self.connectors = Connectors(adapted, tower_of(base), lambda: self.form.vectors.vectors(self._run(self.small.inputs[0])), self.name)
        return self.connectors

    def encode(self, images: ImageBatch) -> list[Prepared]:
        """The images of each sample with their vectors, each image run once, without gradient.

        Raises ConfigError where the tower is adapted, since its vectors then change, and where it gives another number than a row has tokens.
        """
        if self.adapter is not None:
            raise ConfigError(
                f"the tower of '{self.name}' has trained weights, so its vectors change with every step and cannot be cached: encode images as they come "
                "(train.features: encode)"
            )
        return self._encoded(images)

    def _encoded(self, images: ImageBatch, connector: str | None = None) -> list[Prepared]:
        """connector: the adapter whose connector encodes them; None: the frozen one."""
        learns = (self.adapter is not None or connector is not None) and torch.is_grad_enabled()
        every = [one for sample in images.samples for one in sample.inputs]
        counts = [count for sample in images.samples for count in sample.counts]
        found: dict[int, Tensor] = {}
        for indices, inputs in joined_inputs(every):
            with torch.set_grad_enabled(learns), contextlib.nullcontext() if self.connectors is None else self.connectors.used(connector):
                vectors = self.form.vectors.vectors(self._run(inputs))
            wanted = [counts[i] for i in indices]
            if len(vectors) != sum(wanted):
                raise ConfigError(
                    f"'{self.name}' gives {len(vectors)} vectors for images whose rows have {sum(wanted)} image tokens: is the processor its own?"
                )
            found |= dict(zip(indices, vectors.split(wanted), strict=True))
        number = iter(range(len(every)))
        empty = torch.zeros(0, self.width, dtype=self._dtype, device=self._device)
        return [sample.encoded(torch.cat([empty, *(found[next(number)] for _ in sample.inputs)])) for sample in images.samples]

    def token_map(self, batch: Batch, token_map: TokenMap, adapters: Collection[str | None] = (None,)) -> TokenMap:
        """The map of a batch with what the model is given beside its ids.

        adapters: those that serve its rows; an image is encoded by the frozen connector, and by each of theirs.
        Raises ConfigError for cached features where the tower is adapted, or an adapter has a connector of its own.
        """
        assert batch.prepared is not None
        own = sorted(name for name in adapters if name is not None and self.connectors is not None and self.connectors.has_own(name))
        each = [*([None] if len(own) < len(adapters) else []), *own]
        found = [vector for name in each for vector in self._vectors_by(name, batch.prepared)]
        vectors, shift = torch.cat(found) if found else None, None
        if self.positions is not None and batch.rope is not None:
            shift = batch.rope.amax((0, 2)) + 1 - batch.attention_mask.sum(1)
        vector = batch.vector if len(each) < 2 else self._among(each, batch, token_map)
        return replace(token_map, host=HostInputs(vectors=vectors, vector=vector, rope=batch.rope, shift=shift, kind=batch.kind))

    def unread(self, adapter: str | None) -> Tensor:
        """float []: zero, which has the gradient of what is trained to encode images: of a batch of texts alone."""
        own = adapter if self.connectors is not None and self.connectors.has_own(adapter) else None
        (vectors,) = self._vectors_by(own, ImageBatch(samples=(self.small,)))
        return 0.0 * vectors.sum()

    def _vectors_by(self, connector: str | None, images: ImageBatch) -> list[Tensor]:
        """The vectors of each sample: those that are given, or by this adapter's connector."""
        changes = self.adapter is not None or connector is not None
        with_images = [sample for sample in images.samples if sample.counts]
        if changes and any(not sample.inputs for sample in with_images):
            changed = "this model's tower has trained weights" if connector is None else f"the adapter {connector} has a connector of its own"
            raise ConfigError(f"the batch holds cached features, and {changed}: collate it with the images")
        if changes or any(sample.vectors is None for sample in with_images):
            images = ImageBatch(samples=tuple(self._encoded(images, connector)))
        return [sample.vectors.to(self._dtype) for sample in images.samples if sample.vectors is not None]

    def _among(self, connectors: Sequence[str | None], batch: Batch, token_map: TokenMap) -> Tensor:
        """int64 [B, T]: the vector of each token among those of all these connectors, one after the other: that of its row's adapter."""
        assert self.connectors is not None
        assert batch.prepared is not None
        assert batch.vector is not None
        n, first = sum(sample.n_vectors for sample in batch.prepared.samples), torch.zeros_like(token_map.row)
        for number, name in enumerate(connectors):
            if name is not None:
                first = torch.where(token_map.row == self.connectors.index(name), number * n, first)
        return torch.where(batch.vector < 0, batch.vector, batch.vector + first[:, None])

    def row_encoder(self, template: Template, slots: Sequence[Slots], processor: Processor | None = None) -> ConversationRows:
        """Makes the rows of an adapter with these slots, by a copy of the processor where one is given. Raises ConfigError where it has a bridge."""
        return ConversationRows(template, self.language, processor or self.processor, self.positions, slots, self.blocks)

    def check_copies(self, modules: Sequence[str], folder: str) -> None:
        """Raise ConfigError where an adapter has trained copies of modules, by their dotted names, that run when an image is encoded."""
        found: list[str] = []
        there = {path: module for path, module in self.language.model.named_modules() if path in modules}
        handles = [module.register_forward_pre_hook(lambda *_, path=path: found.append(path)) for path, module in there.items()]
        try:
            if there:
                self._encoded(ImageBatch(samples=(self.example,)).to(self._device))
        finally:
            for handle in handles:
                handle.remove()
        others = sorted({path for path in found if self.connectors is None or not self.connectors.holds(path)})
        if others:
            raise ConfigError(
                f"the adapter in {folder} has a trained copy of {', '.join(others)}, which is no part of the connector, and the tower encodes images with its "
                "frozen modules for all adapters: load the adapter with AdaptedModel.from_pretrained"
            )

    def part(self) -> FrozenPart:
        """The whole model as a frozen part, with sketches of a test image as it is prepared and of its vectors."""
        part = part_of(self.language.model, name=self.name)
        processor = processor_digest(self.processor.real)
        return replace(part, tokenizer=tokenizer_digest(self.language.tokenizer), processor=processor, sketches=self.sketches())

    def sketches(self) -> dict[str, Sketch]:
        """`pixels`: a test image as it is prepared; `features`: its vectors."""
        vectors = self.encode(ImageBatch(samples=(self.example,)).to(self._device))[0].vectors
        assert vectors is not None
        pixels = next(value for value in self.example.inputs[0].values() if value.is_floating_point())
        return {"pixels": Sketch.of(pixels, N_VALUES), "features": Sketch.of(vectors, N_VALUES)}

    @property
    def width(self) -> int:
        """W of an image's vectors, deep features included."""
        return self.form.vectors.whole_width

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        placed = {name: value.to(self._device, self._dtype if value.is_floating_point() else None) for name, value in inputs.items()}
        return self._owner.get_image_features(**placed, return_dict=True)

    def _check_reads_images_alone(self) -> None:
        """Raise ConfigError where an image's vectors depend on more than the image (InstructBLIP's on the question)."""
        takes = inspect.signature(self._owner.get_image_features).parameters.values()
        needed = [one.name for one in takes if one.default is inspect.Parameter.empty and one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if missing := [name for name in needed if name not in self.example.inputs[0]]:
            raise ConfigError(
                f"the image's vectors of '{self.name}', a {type(self.language.model).__name__}, depend on its {missing[0]} too, so the texts about an image "
                "cannot share them: adapt it with adalink.get_adalink_model and a loop of your own"
            )

    def _read_form(self) -> HostForm:
        with torch.no_grad():
            vectors = VectorForm.of(self._run(self.small.inputs[0]))
        takes = inspect.signature(type(self.language.model).forward).parameters
        row = self.processor.real(text=[self.processor.marks(1) + "a"], images=[test_image()])
        given = {name for name in KINDS if name in row and name in takes}
        needs_images = "pixel_values" in takes and takes["pixel_values"].default is inspect.Parameter.empty
        kind, written = next(iter(sorted(given, reverse=True)), ""), int(self.processor.marks_answers)
        return HostForm(vectors=vectors, kind=kind, written_kind=written, needs_images=needs_images)

    @property
    def _device(self) -> torch.device:
        return execution_device(self.language.model, "")

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.language.model.parameters()).dtype


def refuse_over(processor: Processor, name: str) -> None:
    """Raise ConfigError where no scale of a test image keeps the budget: the processor makes as many tokens of any image."""
    count = processor.scaled(test_image())[1] if processor.budget else 0
    if processor.budget and not processor.budget.keeps(count):
        raise ConfigError(
            f"image_tokens allows {processor.budget}, and the processor of '{name}' makes {count} of a test image at the nearest scale: give bounds that "
            f"hold {count}, or none"
        )


def features_owner(model: nn.Module, name: str) -> Any:
    """The module whose `get_image_features` the model's call uses. Raises ConfigError where the model takes no images that were encoded before."""
    takes = "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters or any(
        "mm_encoder_outputs" in inspect.signature(type(module).forward).parameters for module in model.modules()
    )
    # The model itself, or what stands under its head: the one that names the most of what it takes.
    owner = max((module for module in model.modules() if hasattr(module, "get_image_features")), key=_n_named, default=None)
    if not takes or owner is None:
        raise ConfigError(
            f"'{name}' is a {type(model).__name__}, which cannot be given an image that was encoded before: adapt it with adalink.get_adalink_model and a "
            "loop of your own, or choose a model such as LLaVA, Qwen2-VL, PaliGemma, Gemma 3 or SmolVLM"
        )
    return owner


def _n_named(module: Any) -> int:
    takes = inspect.signature(module.get_image_features).parameters.values()
    return sum(one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for one in takes)


def read_images(tower: VisionTower | ModelTower | NoTower, asked: Sequence[Sequence[ImageOrFile]]) -> tuple[list[Any], list[int]]:
    """What a model is given of the images of each different row, each image decoded and prepared once, and which of these a row is about.

    Raises ConfigError where a composed model is given no image for a row, or several; DataError for one that cannot be read.
    """
    different = {id(image): image for row in asked for image in row}
    read: dict[int, Any] = {key: prepared(image, tower.preprocess) for key, image in different.items()}
    place: dict[tuple[int, ...], int] = {}
    about = [place.setdefault(tuple(map(id, row)), len(place)) for row in asked]
    if isinstance(tower, ModelTower):
        return [joined([read[key] for key in keys]) for keys in place], about
    if isinstance(tower, NoTower):  # which refused any image
        return [torch.zeros(0, 0) for _ in place], about
    if wrong := [len(keys) for keys in place if len(keys) != 1]:
        raise ConfigError(f"{wrong[0]} images were given for one prompt, and a model composed with '{tower.name}' reads one: give one image for each")
    return [read[keys[0]] for keys in place], about
