"""A vision-language model composed of a frozen encoder, a frozen language model, and adapters.

    model = VisionLanguageModel.compose("open_clip:ViT-B-32/openai", "facebook/opt-125m", template=Template(prompt="<image><bos>"))
    model.add_adapter("caption", {"bridge": Bridge(kind="mlp"), "adalink": AdaLink(rank=16, modalities=("image", "text"))})
    loss = model(batch)
    model.generate([image], [""])
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink import BASE_NAME, AdaptedModel, Adapter, FrozenPart, Method, TokenMap
from adalink.attachment.attachment import without_dropout
from adalink.attachment.inputs import Route
from adalink.checkpoint.folder import local_folder, upload
from adalink.errors import ConfigError
from adalink.model import ActiveAdapter
from multimodal.batches.collate import Batch
from multimodal.batches.packing import Ways
from multimodal.batches.tokenize import RowEncoder, TextRowEncoder, in_ids
from multimodal.data.images.decode import ImageOrFile
from multimodal.data.inputs import CachedFeatures
from multimodal.data.loader import Batches, Texts, TrainingTask, new_batches
from multimodal.encoders.bound_parts import encoder_part, language_part
from multimodal.encoders.tower import (
    NoTower,
    VisionTower,
    load_tower,
    load_vision_adapter,
    new_vision_adapter,
    refuse_other_features,
    save_vision_adapter,
)  # fmt: skip
from multimodal.existing.budget import ImageTokens
from multimodal.existing.connector import Connectors
from multimodal.existing.connector_choice import ConnectorChoice, refuse_connector
from multimodal.existing.conversation import Prompts, asked_of
from multimodal.existing.inputs import give_inputs
from multimodal.existing.load import load_existing
from multimodal.existing.rows import ConversationRows
from multimodal.existing.tower import ModelTower
from multimodal.existing.trial import tried_ways
from multimodal.existing.words import NO_BUDGET
from multimodal.generation.generate import written_texts
from multimodal.generation.routing import Routing, asked_names, generated, load_router, routes
from multimodal.generation.settings import GenerationChoice, GenerationSettings
from multimodal.language import Language, LanguageUse, load_language
from multimodal.loss.answer_head import (
    AnswerHead,
    HeadLoss,
    LabelWords,
    answer_loss,
    chosen_answers,
    chosen_words,
    load_head,
    new_head,
    pooled_state,
    save_head,
    use_for,
)  # fmt: skip
from multimodal.loss.language_loss import LanguageLoss
from multimodal.loss.trained import TrainedParts, trained_summary
from multimodal.sample import SampleSource
from multimodal.template import Template, TextTemplate, saved_template

__all__ = [
    "TrainedParts", "VisionLanguageModel", "load_composed", "save_composed", "trained_summary",
]  # fmt: skip


# ----------------------------------------
# The folder of a composed model's adapter: the language model's edits, and what was trained with them: an answer head, an adapted encoder.


def save_composed(model: VisionLanguageModel, folder: Path, task: Mapping[str, Any]) -> None:
    """Write the active adapter's folder; `task` is stored in its config, with what is needed to load it: template, layer, answers."""
    template = model.template_of(model.adapted.active or BASE_NAME)
    budget = model.tower.processor.budget.saved() if isinstance(model.tower, ModelTower) else {}
    frames = {"frames": model.tower.frames} if isinstance(model.tower, VisionTower) and model.tower.frames else {}
    known = {**template.saved(), "layer": model.tower.layer, **frames, **budget}
    answers: dict[str, Any] = {} if model.head is None else {"answers": len(model.head.answers)}
    if model.head is not None and model.head.loss != "binary":
        answers["head_loss"] = model.head.loss
    if (labels := model.label_words.get(model.adapted.active or "")) is not None:
        answers |= {"label_words": list(labels.words), "score": labels.by}
    model.adapted.task = {**model.adapted.task, **task, **known, **answers}
    model.adapted.save_pretrained(folder)
    save_vision_adapter(folder, model.tower, model.seeing_part)
    if model.connectors is not None:
        model.connectors.save(folder, model.seeing_part)
    if model.head is not None:
        save_head(folder, model.head)


def load_composed(model: VisionLanguageModel, folder: str | Path, name: str, *, activate: bool = True, allow_other_base: bool = False) -> Adapter:
    """Add an adapter from its folder or hub name, in eval mode; a failure leaves the model as it was.

    Raises ConfigError where it was trained on another layer's features, CheckpointError on other frozen parts or a damaged folder.
    """
    config, parts = AdaptedModel.read_config(folder), model.adapted.parts
    found, given = _form("encoder" in config.base, isinstance(saved_template(config.task), TextTemplate)), model.form
    if found != given:
        raise ConfigError(f"the adapter in {folder} was trained on {found}, and this is {given}: load it on a model of its own kind")
    if isinstance(model.tower, ModelTower):
        model.tower.check_copies(config.modules_to_save, str(folder))
        if (budget := ImageTokens.of(config.task)) != (here := model.tower.processor.budget):
            raise ConfigError(
                f"the adapter in {folder} was trained on images of {budget}, and here an image has {here}: load it on a model with its own image_tokens"
            )
        assert model.connectors is not None
        local = local_folder(folder)
        vision = load_vision_adapter(local, model.tower, model.seeing_part, len(model.adapted.adapters), allow_other_base=allow_other_base)
        own = model.connectors.loaded(local, model.seeing_part, allow_other_base=allow_other_base)
        adapter = model.adapted.load_adapter(local, name, activate=activate, allow_other_base=allow_other_base)
        if own is not None:
            model.connectors.add(name, own)
        if vision is not None:
            model.vision_adapter = model.tower.adapt(vision.eval())
        return adapter
    refuse_other_features(model.tower, config, parts, folder)
    if not config.modules_to_save:  # those of which it has copies are no part of its base: load_adapter compares the rest
        config.check_base(parts, str(folder), allow_other_base=allow_other_base)
    local, encoder = local_folder(folder), parts.get("encoder", parts["language_model"])
    vision = load_vision_adapter(local, model.tower, encoder, len(model.adapted.adapters), allow_other_base=allow_other_base)
    head = load_head(local, model.adapted, config.task, config.methods) if config.task.get("answers") else None
    adapter = model.adapted.load_adapter(local, name, activate=activate, allow_other_base=allow_other_base)
    if head is not None:
        model.heads[name] = head
    if config.task.get("label_words"):
        model.label_words[name] = LabelWords(words=tuple(config.task["label_words"]), by=config.task.get("score", "sum"))
    if vision is not None:
        model.tower.adapt(vision.eval())
    return adapter


def _form(has_encoder: bool, reads_texts: bool) -> str:
    return "a composed model" if has_encoder else "a model without an encoder" if reads_texts else "a model that saw already"


class VisionLanguageModel(nn.Module):
    """Frozen encoder + frozen language model + adapters by name.

    More than five public methods, because the adapter methods are the ones that users of this field look for.
    """

    def __init__(self, tower: VisionTower | ModelTower | None, language: Language, template: Template) -> None:
        """tower: None for a model that reads texts alone, with a `TextTemplate`. Raises ConfigError for a template of the other kind."""
        super().__init__()
        if (tower is None) != isinstance(template, TextTemplate):
            advice = "give a TextTemplate, which has none" if tower is None else "write <image> once"
            raise ConfigError(f"the prompt template is {template.prompt!r}, and {'no' if tower is None else 'an'} encoder fills <image>: {advice}")
        self.tower: VisionTower | ModelTower | NoTower = NoTower() if tower is None else tower
        self.language = language
        self.template = template
        self.ways: Ways | None = None  # of an existing model: how its rows may share an image
        self.connectors: Connectors | None = None  # of an existing model: those that its adapters have of their own
        self.label_words: dict[str, LabelWords] = {}  # by adapter, where it chooses among words by what they would cost to write
        if tower is None:
            self.adapted = AdaptedModel(language.model, parts={"language_model": language_part(language)})
        elif isinstance(tower, ModelTower):
            self.adapted = AdaptedModel(language.model, parts={"language_model": tower.part()})
            give_inputs(self.adapted, tower.form)
            self.ways, tower.blocks = tried_ways(self.adapted, tower)
            self.connectors = tower.serve(self.adapted)
            self.connector_methods = self.connectors.edits
        else:
            parts = {"encoder": encoder_part(tower), "language_model": language_part(language)}
            self.adapted = AdaptedModel(language.model, inputs=tower.inputs, parts=parts)
        self.language_loss = LanguageLoss(self.adapted)
        self.heads = nn.ModuleDict()  # by adapter, where it chooses its answers
        self.routing: Routing | None = None  # what chooses adapters for rows that name "auto"

    @classmethod
    def compose(
        cls, encoder: str | Path | None, language_model: str | Path, *, template: Template, layer: int = -1, use: LanguageUse = "write",
        frames: int | None = None,
    ) -> VisionLanguageModel:
        """The model made of an encoder (None: it reads texts alone) and a language model, each a local folder or a name. layer, frames: see load_tower."""
        tower = None if encoder is None else load_tower(encoder, layer=layer, frames=frames)
        return cls(tower, load_language(language_model, use=use), template)

    @classmethod
    def from_model(
        cls, model: str | Path | nn.Module, processor: Any = None, *, template: Template, image_tokens: ImageTokens = NO_BUDGET
    ) -> VisionLanguageModel:
        """The same of a vision-language model that sees already, from a local folder or a hub id, or from the model itself with its processor.

        Its tower, its connector and its language model are frozen; adapters go into the language model, and where asked into the others.
        image_tokens: bounds of what an image may cost; larger and smaller ones are scaled. Saved with every adapter.
        Raises ConfigError for a model that is none, or cannot be given an image that was encoded before, or whose processor cannot keep the bounds.
        """
        language, real = load_existing(model, processor)
        return cls.from_parts(language, real, template=template, image_tokens=image_tokens)

    @classmethod
    def from_parts(cls, language: Language, real: Any, *, template: Template, image_tokens: ImageTokens = NO_BUDGET) -> VisionLanguageModel:
        """The same of what `multimodal.existing.load.load_existing` gave: the whole model with its tokenizer, and its processor."""
        return cls(ModelTower.of(language, real, image_tokens), language, template)

    def forward(self, batch: Batch) -> Tensor:
        """float []: cross entropy summed over the batch's targets (binary, over answers, with a head), divided by `batch.n_targets`."""
        if self.head is not None:
            return answer_loss(self.head, pooled_state(self.adapted, self.language, batch, self.token_map(batch)), batch)
        self.adapted.check_writes([self.adapted.active])
        loss = self.language_loss(batch, self.token_map(batch)) / batch.n_targets
        is_unread = batch.prepared is not None and not any(sample.counts for sample in batch.prepared.samples)
        if is_unread and isinstance(self.tower, ModelTower) and self.changes_features and torch.is_grad_enabled():
            return loss + self.tower.unread(self.adapted.active)  # DDP waits for every trained weight's gradient
        return loss

    def encode(self, pixels: Tensor) -> Tensor:
        """float [I, 3, H, W] -> [I, N + L, Dv]: the images' patches, then what each block says of the whole (see Features.joined).

        For a cache of features. Raises ConfigError where the encoder is adapted: then they change with every step.
        """
        return self.vision_tower.encode(pixels).joined

    @property
    def form(self) -> str:
        """A composed model, one without an encoder, or one that saw already, in words."""
        return _form(isinstance(self.tower, VisionTower), isinstance(self.tower, NoTower))

    @property
    def seeing_part(self) -> FrozenPart:
        """The frozen part that reads images: the encoder, or the whole model that sees already."""
        return self.adapted.parts.get("encoder", self.adapted.parts["language_model"])

    @property
    def vision_tower(self) -> VisionTower:
        """The encoder of a composed model. Raises ConfigError for a model that saw already: its tower is a part of it."""
        if not isinstance(self.tower, VisionTower):
            raise ConfigError(f"this is for models composed of an encoder and a language model, and '{self.language.name}' is {self.form}")
        return self.tower

    @torch.no_grad()
    def generate(
        self,
        images: ImageOrFile | Sequence[ImageOrFile | Sequence[ImageOrFile]] | None = None,
        prompts: Prompts = "",
        *,
        settings: GenerationSettings | None = None,
        adapter_names: Sequence[str | None] | Literal["auto"] | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
    ) -> list[str]:
        """One text for each image and prompt; a prompt is the question that the template asks (empty in captioning).

        images: PIL images, paths or the bytes of files; one alone is asked every prompt. prompts: one alone is asked about every image.
        A model without an encoder takes no images, and a text or a pair of texts in the place of a question: `prompts=[("a", "b"), ...]`.
        A model that sees already also takes several images in the place of one, and conversations in the place of questions: messages as its
        chat template takes them, whose parts {"type": "image", "image": ...} hold their images, or take those of `images` in order.
        settings: those that the adapter was saved with, where none are given; an adapter made here has the defaults. `max_new_tokens` and
        the other numbers stand in place of theirs.
        adapter_names: one for each row, "__base__" for none; without them the active adapter serves all. Each row is worded by its own
        adapter's template and has its own adapter's slots. "auto", for a row or in place of them all: the router chooses (see `load_router`).
        Raises ConfigError for an unknown name, for lists of unequal length, and where adapters that were saved with different settings serve
        one call without settings, and for a conversation that the model cannot read; DataError for an image that cannot be read.
        """
        asked = asked_of(images, prompts)
        choice = GenerationChoice(max_new_tokens=max_new_tokens, num_beams=num_beams, length_penalty=length_penalty)
        return generated(self, asked, asked_names(self.adapted.active, len(asked), adapter_names), choice, settings)

    @torch.no_grad()
    def generate_batch(self, batch: Batch, settings: GenerationSettings, adapter_names: Sequence[str | None] | None = None) -> list[str]:
        """One text for each row of a left-padded batch, whose rows were made by the row encoders of the adapters that serve them. Nothing is dropped.

        Written, or chosen where the adapters have heads; `settings` are then not used. Raises ConfigError for rows of both kinds.
        """
        names = [self.adapted.active] * len(batch.ids) if adapter_names is None else adapter_names
        with without_dropout(self):
            token_map = self.token_map(batch, adapter_names)
            if any(heads := [self._head(name) for name in names]):
                return chosen_answers(heads, pooled_state(self.adapted, self.language, batch, token_map))
            if any(labels := [self.label_words.get(name or "") for name in names]):
                return chosen_words(self, batch, names, labels)
            self.adapted.check_writes(names)
            return written_texts(self.language, self.adapted.attachment, batch, token_map, settings)

    def row_encoder(self, adapter: str | None = None) -> RowEncoder | ConversationRows:
        """Makes the rows that an adapter reads: its slots, its template, this model's tokenizer. The active one, where none is named."""
        name = adapter or self.adapted.active or BASE_NAME
        head = self._head(name)
        if isinstance(self.tower, ModelTower):
            return self.tower.row_encoder(self.template_of(name), self.adapted.serving(1, [name]).slots[0])
        template, slots, n_answers = self.template_of(name), self.adapted.serving(1, [name]).slots[0], 0 if head is None else len(head.answers)
        if isinstance(template, TextTemplate):
            return TextRowEncoder(template, self.language, slots, n_answers)
        return RowEncoder(template, self.language, slots, n_answers)

    def template_of(self, adapter: str) -> Template:
        """The words that an adapter was saved with, where it was loaded from a folder that holds them; this model's own otherwise."""
        task = self.adapted.tasks.get(adapter, {})
        return saved_template(task) or self.template

    def token_map(self, batch: Batch, adapter_names: Sequence[str | None] | None = None) -> TokenMap:
        """What the batch's tokens are, with the features of each row's image. Raises ConfigError for cached features of a trained encoder."""
        rows = self.adapted.serving(len(batch.ids), adapter_names, batch.tasks)
        if isinstance(self.tower, ModelTower):
            names = {self.adapted.active} if adapter_names is None else {None if name == BASE_NAME else name for name in adapter_names}
            plain = TokenMap(batch.domain, rows.row, serving=rows.serving, entry=batch.token_image, indices=rows.indices, weights=rows.weights)
            return self.tower.token_map(batch, plain, names)
        if isinstance(self.tower, NoTower):
            return TokenMap(batch.domain, rows.row, serving=rows.serving, indices=rows.indices, weights=rows.weights)
        retained = batch.taps if batch.patches is None else batch.patches
        if retained is not None and self.tower.adapter is not None:
            raise ConfigError("the batch holds cached features, and this model's encoder has trained weights: collate it with pixels")
        features = self.tower(_pixels(batch)).joined if retained is None else retained
        n_patches = 0 if batch.taps is not None else self.tower.n_patches
        entries = batch.image if batch.token_image is None else slice(None)  # one for each row, or for each image
        inputs = {"image": features[entries, :n_patches]} if n_patches else {}
        if features.shape[1] > n_patches:
            inputs["image_taps"] = features[entries, n_patches:]
        return TokenMap(batch.domain, rows.row, inputs, serving=rows.serving, entry=batch.token_image, indices=rows.indices, weights=rows.weights)

    def batches(
        self,
        source: SampleSource,
        task: TrainingTask | Texts,
        *,
        epochs: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
        workers: int = 0,
        features: CachedFeatures | None = None,
        bad_samples: int = 10,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """What the active adapter learns from: batches for a training loop of one's own, the same that `train` reads.

        source       samples: a data set of tasks.*, or a list of `Sample`s
        task         such as Captioning(), or a function of a sample and a random generator that gives its `Text`s
        features     cached ones (`multimodal.data.feature_cache.encode.encode_all`); without, images are decoded anew, and encoded in the model's call
        bad_samples  how many may be left out before BudgetError is raised; `Batches.bad` has them
        rank         reads the rank-th of `world` parts of each step

        Raises ConfigError where no adapter is active.
        """
        return new_batches(
            self, source, task, epochs=epochs, batch_size=batch_size, seed=seed, workers=workers, features=features, bad_samples=bad_samples,
            rank=rank, world=world,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.adapted.device

    def add_adapter(
        self, name: str, methods: Mapping[str, Method] | Method, *, connector: ConnectorChoice = "frozen", connector_methods: Mapping[str, Method] | None = None
    ) -> Adapter:
        """Add a new adapter, of one method or of several by name, and make it the active one.

        Of a model that sees already the adapter may have a connector of its own; the frozen one serves the other adapters.
        connector          trained: a copy of all its weights is trained
        connector_methods  on the linears of the connector: LoRA, AdaLoRA, HiRA, IA3, BitFit

        Raises ConfigError where both are given, or the model has no such connector.
        """
        methods = in_ids(methods, self.language.tokenizer)
        if self.connectors is None:
            refuse_connector(connector, connector_methods or ())
            return self.adapted.add_adapter(name, methods)
        return self.connectors.add_adapter(name, methods, connector, connector_methods or {})

    def add_answer_head(self, answers: Sequence[str], loss: HeadLoss = "binary") -> AnswerHead:
        """Let the active adapter choose among these answers, by a new head that is trained with it, instead of writing."""
        if isinstance(self.tower, ModelTower):
            _ = self.vision_tower  # raises: its rows are for writing
        methods = self.adapted.active_adapter().methods
        pieces_of = RowEncoder(self.template_of(self.adapted.active or ""), self.language, ()).answer_pieces
        self.heads[self.adapted.active or ""] = head = new_head(self.adapted, answers, methods, pieces_of, loss)
        return head

    @property
    def head(self) -> AnswerHead | None:
        """The active adapter's head; None where it writes."""
        return self._head(self.adapted.active)

    def add_vision_adapter(self, methods: Mapping[str, Method]) -> Adapter:
        """Put methods into the encoder too, once for all adapters: its features are then trained through, and never cached."""
        adapter = new_vision_adapter(self.tower, methods)
        if isinstance(self.tower, ModelTower):  # which is no module: the model is one, and holds it
            self.vision_adapter = adapter
        return adapter

    def load_adapter(self, folder: str | Path, name: str, *, activate: bool = True, allow_other_base: bool = False) -> Adapter:
        """Add an adapter from its folder or hub name, and make it the active one, unless `activate` is False.

        Refused where it was trained on other frozen parts (a warning with `allow_other_base`) or another layer's features.
        """
        return load_composed(self, folder, name, activate=activate, allow_other_base=allow_other_base)

    def load_router(self, folder: str | Path, *, allow_other_base: bool = False) -> Routing:
        """Add the adapters of a router's folder (`adalink route`), each under its name; rows that name "auto" are routed from then on.

        Raises as `load_adapter`, and CheckpointError where an adapter is not as it was when the router was made.
        """
        self.routing = load_router(self, folder, allow_other_base=allow_other_base)
        return self.routing

    def route(self, images: ImageOrFile | Sequence[ImageOrFile | Sequence[ImageOrFile]], prompts: Prompts = "") -> list[Route]:
        """Which adapter the router gives each row of `generate`, with its weights and how sure it is; `adapter_names` takes them as names."""
        return routes(self, asked_of(images, prompts))

    def delete_adapter(self, name: str) -> None:
        """Take an adapter away; the others stay as they are. Where it was the active one, none is."""
        self.adapted.delete_adapter(name)
        if self.connectors is not None:
            self.connectors.delete(name)
        self.label_words.pop(name, None)
        if name in self.heads:
            del self.heads[name]

    @property
    def changes_features(self) -> bool:
        """Whether what encodes images is trained, with the active adapter or for all: features then change with every step, and are not cached."""
        return self.tower.adapter is not None or (self.connectors is not None and self.connectors.has_own(self.adapted.active))

    @property
    def active_adapter(self) -> ActiveAdapter:
        """The name of the adapter in use, "" where there is none; called, the edits in the language model themselves."""
        return self.adapted.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use: one, or none."""
        return self.adapted.active_adapters

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, in the order in which they came."""
        return self.adapted.adapter_names

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one."""
        self.adapted.set_adapter(name)
        if self.connectors is not None:
            self.connectors.activate(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen language model alone, inside the block."""
        with self.adapted.disable_adapter():
            yield

    def save_pretrained(self, folder: str | Path, *, task: Mapping[str, Any] | None = None) -> None:
        """Write the active adapter's folder; `task` is stored in its config, with the template."""
        save_composed(self, Path(folder), task or {})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, encoder: str | Path | None = None, language_model: str | Path | None = None, allow_other_base: bool = False
    ) -> VisionLanguageModel:
        """The model of a saved adapter, in eval mode. The frozen parts are loaded by the names it was saved with unless others are given.

        Raises ConfigError where the folder says no words around question and answer, and as the parts' loaders do.
        """
        config = AdaptedModel.read_config(folder)
        template = saved_template(config.task)
        if template is None:
            raise ConfigError(f"the adapter in {folder} says no words around question and answer: load it with load_adapter on a model that has them")
        parts = {role: part.name for role, part in config.base.items()}
        if "encoder" not in parts and not isinstance(template, TextTemplate):
            model = cls.from_model(language_model or parts["language_model"], template=template, image_tokens=ImageTokens.of(config.task))
            model.load_adapter(folder, "default", allow_other_base=allow_other_base)
            return model.eval()
        layer, use = config.task["layer"], use_for(config.task)
        frames, encoder = config.task.get("frames"), encoder or parts.get("encoder")
        model = cls.compose(encoder, language_model or parts["language_model"], template=template, layer=layer, use=use, frames=frames)
        model.load_adapter(folder, "default", allow_other_base=allow_other_base)
        return model.eval()

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the active adapter's folder."""
        self.adapted.active_adapter()
        return upload(repository, private, self.save_pretrained)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters the active adapter trains, and their share of all; and what is trained in the encoder and in the head."""
        print(trained_summary(self))

    def _head(self, name: str | None) -> AnswerHead | None:
        return dict(self.heads.items()).get(name or "")  # type: ignore[return-value]  # a ModuleDict holds modules


def _pixels(batch: Batch) -> Tensor:
    if batch.pixels is None:
        raise ConfigError("the batch holds neither pixels nor patches: collate it with one of them")
    return batch.pixels
