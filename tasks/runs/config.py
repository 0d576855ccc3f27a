"""What a run is made of: the same dataclasses are the YAML file, the command line and the Python API."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adalink.checkpoint.precision import BaseSettings
from adalink.errors import ConfigError
from adalink.methods import METHODS
from adalink.moved import old_paths
from multimodal.data.inputs import StoredDtype
from multimodal.existing.budget import ImageTokens
from multimodal.existing.connector_choice import ConnectorChoice, refuse_both, refuse_connector
from multimodal.generation.settings import GenerationSettings
from multimodal.template import TextTemplate, saved_template
from multimodal.training.settings import Stage, TrainSettings
from tasks.captioning import Captioning
from tasks.data.sources import DataConfig
from tasks.runs.text_task import TextSettings, TextTask
from tasks.task import Task
from tasks.vqa import Vqa

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from adalink import FrozenPart, Method

__all__ = ["Data", "Methods", "Parts", "RunConfig", "SelfTraining", "check_groups", "chosen_methods", "class_paths", "setting_names"]

# One optional setting for each method there is, so that types and errors come from the method's own dataclass. Types are texts, which are read when
# arguments are parsed: a method needs torch, and help does not.
Methods: Any = dataclasses.make_dataclass(
    "Methods",
    [(name, f"METHODS[{name!r}] | None", None) for name in METHODS],
    kw_only=True,
    frozen=True,
    namespace={"__doc__": "One or more methods, by name.", "__module__": __name__},
)


def chosen_methods(methods: Any, *, needs_one: bool = True) -> dict[str, Method]:
    """The methods that a config gives. Raises ConfigError where there is none, and one is needed: nothing else is trained."""
    if not _given(methods) and needs_one:
        raise ConfigError(f"the config names no method: under `methods:`, give one or more of {', '.join(METHODS)}")
    return _given(methods)


def class_paths() -> list[str]:
    """Every name under which a setting may ask for a class (`methods.gated.inner.class_path`): the methods, and what lists and tables of settings hold."""
    methods = [
        f"{module}.{kind.__qualname__}"
        for kind in METHODS.values()
        for module in (kind.__module__, *old_paths(kind.__module__), "adalink.methods", "adalink")  # configs of earlier runs have old paths
    ]
    return [*methods, *(f"{kind.__module__}.{kind.__qualname__}" for kind in (DataConfig, Stage))]


def _given(methods: Any) -> dict[str, Method]:
    return {f.name: value for f in dataclasses.fields(methods) if (value := getattr(methods, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images and texts are."""

    val: DataConfig  # what is evaluated
    train: DataConfig | None = None  # the training data; only `train` needs it
    search: DataConfig | None = None  # what `adalink search` scores its trials on; none: a share of the training data. Nothing else reads it

    def __post_init__(self) -> None:
        """Let a set of texts say its split by its part, and `val.after_shots` be rows of the training data."""
        train, val = self.train, self.val
        if train is not None and train.split is None and (train.glue or train.disk) and not (train.glue and train.glue.is_file()):
            train = dataclasses.replace(train, split="train")
        if train is not None and val.is_after_shots:
            val = dataclasses.replace(train, after_shots=val.after_shots)
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "val", val)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The frozen parts of a model by name: one model that sees already, or an encoder and a language model."""

    model: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    image_tokens: ImageTokens = field(default_factory=ImageTokens)
    base: BaseSettings = field(default_factory=BaseSettings)
    frames: int = 0

    def check(self) -> None:
        """Raise ConfigError unless exactly one of the two forms is given, and whole."""
        composed = {"encoder": self.encoder, "language_model": self.language_model}
        given = [name for name, value in composed.items() if value]
        if self.model and given:
            raise ConfigError(
                f"model and {' and '.join(given)} were given: a run is of a model that sees already (`model`), or of a composed one (`encoder` and "
                "`language_model`); leave one form out"
            )
        if self.frames < 0 or (self.model and self.frames):
            found = "was given with model" if self.model else f"is {self.frames}"
            raise ConfigError(f"frames {found}: give how many frames an encoder of video gets of each clip, or 0 for as many as its config says")
        if not self.model and self.image_tokens:
            raise ConfigError("image_tokens was given without model: an encoder of its own makes as many vectors of every image; leave it out")
        if not self.model and len(given) < 2:
            missing = [name for name in composed if name not in given]
            raise ConfigError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given: name both frozen parts, such as --encoder scenes:encoder and "
                "--language_model scenes:language, or give `model`, a vision-language model that sees already"
            )

    @staticmethod
    def of(parts: Mapping[str, FrozenPart], task: Mapping[str, Any]) -> Parts:
        """The parts by their roles in an adapter's folder, which says of its task what an image may cost; a model that saw already is one part."""
        language = parts["language_model"]
        if isinstance(saved_template(task), TextTemplate):
            return Parts(language_model=language.name, base=BaseSettings.of(language.precision))
        if "encoder" not in parts:
            return Parts(model=language.name, image_tokens=ImageTokens.of(task), base=BaseSettings.of(language.precision))
        encoder = parts["encoder"]
        base = BaseSettings.of(language.precision, encoder.precision)
        return Parts(encoder=encoder.name, language_model=language.name, base=base, frames=task.get("frames", 0))

    def over(self, known: Parts) -> Parts:
        """These in the place of known ones, where some are given. Raises ConfigError for parts of the other form."""
        if known.model and (self.encoder or self.language_model):
            raise ConfigError("the adapter was trained on a model that saw already: give --model where it lies elsewhere, not --encoder or --language_model")
        if not known.model and self.model:
            raise ConfigError("the adapter was trained on a composed model: give --encoder and --language_model where they lie elsewhere, not --model")
        names = ("model", "encoder", "language_model", "image_tokens", "frames")
        return Parts(**{name: getattr(self, name) or getattr(known, name) for name in names}, base=self.base.over(known.base))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: frozen parts, methods, data, training, evaluation."""

    task: Literal["captioning", "vqa", "text"]  # what is asked; text: a class or a score of texts, without an encoder
    model: str | None = None  # a vision-language model that sees already: local folder or hub name; in place of encoder and language_model
    encoder: str | None = None  # local folder, timm:NAME, open_clip:NAME/WEIGHTS, a transformers hub name, or scenes:encoder
    language_model: str | None = None  # local folder, a transformers hub name, or scenes:language
    image_tokens: ImageTokens = field(default_factory=ImageTokens)  # of `model`: how many tokens an image may cost; others are scaled until it fits
    base: BaseSettings = field(default_factory=BaseSettings)  # precision, quantisation and attention of the frozen parts
    data: Data
    methods: Methods
    start: Path | None = None  # a saved adapter with these methods, whose weights the training begins with; none: new weights
    vision_methods: Methods = field(default_factory=Methods)  # methods inside the encoder, trained with the others; its features are then never cached
    connector: ConnectorChoice = "frozen"  # of `model`; trained: all weights of what runs between its tower and its words, as a copy in the adapter
    connector_methods: Methods = field(default_factory=Methods)  # of `model`: methods on its connector's linears: lora, adalora, hira, ia3, bitfit
    frames: int = 0  # of each clip, where the encoder takes video; 0: as many as its config says
    layer: int = -1  # which encoder block the features come from: -1 the last, with its norm; -2 the one before, as Context-PEFT has it
    captioning: Captioning = field(default_factory=Captioning)  # settings of the task, where it is captioning
    vqa: Vqa = field(default_factory=Vqa)  # settings of the task, where it is vqa
    text: TextSettings = field(default_factory=TextSettings)  # settings of the task, where it is text
    train: TrainSettings = field(default_factory=TrainSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    features: Path | None = None  # cached features, in FOLDER/train and FOLDER/val, which `adalink features` or train.features: fill writes; none: encode
    features_dtype: StoredDtype = "float16"  # float16 moves gradients by up to 3e-4 of their size, bfloat16 by up to 2e-3, float32 not at all
    representation: int = 0  # samples of data.val on which the report compares hidden states before and after the training; 0: none
    out: Path | None = None  # the run folder

    def __post_init__(self) -> None:
        """Check what a config file can get wrong between its groups."""
        if self.representation < 0:
            raise ConfigError(f"representation is {self.representation}: give a number of samples, such as 64, or 0 for none")
        self.check_form()
        self.check_features()

    def check_form(self) -> None:
        """Raise ConfigError unless the frozen parts are given in exactly one form, with settings that go with it."""
        if self.task == "text":
            self.check_texts()
        else:
            self.parts.check()
        if self.model and (self.layer != -1 or self.n_answers):
            raise ConfigError(
                f"{'layer' if self.layer != -1 else 'vqa.answers'} was given with model: a model that sees already has its own features and writes its "
                "answers; leave it out"
            )
        choosing = next((name for name, one in _given(self.methods).items() if getattr(one, "chooses", False)), None)
        if choosing and (self.model or not self.n_answers):
            how = "leave it out with model, whose answers are written" if self.model else "give task: vqa, and vqa.answers of 2 or more"
            raise ConfigError(f"the method {choosing} answers from a list: {how}")
        if not self.model:
            refuse_connector(self.connector, self.methods_on_connector)
        refuse_both(self.connector, self.methods_on_connector)
        if self.train.teachers.folders is not None and (self.start is not None or self.train.frozen):
            given = "start" if self.start is not None else "train.frozen"
            raise ConfigError(f"{given} and train.teachers were given, and a training with teachers begins with the new one's weights: leave {given} out")

    def check_texts(self) -> None:
        """Raise ConfigError where a task of texts is given what only images need."""
        given = [name for name in ("model", "encoder", "features") if getattr(self, name)]
        given += ["vision_methods"] * bool(self.encoder_methods) + ["layer"] * (self.layer != -1) + ["image_tokens"] * bool(self.image_tokens)
        given += ["train.features"] * (self.train.features != "encode")
        if given:
            raise ConfigError(f"the task text reads no image, and {given[0]} was given: leave it out, or give another task")
        if not self.language_model:
            raise ConfigError("language_model is not given: name the frozen model that reads the texts, such as --language_model google-bert/bert-base-uncased")

    @property
    def reads_only(self) -> bool:
        """Whether the language model is read by a head, and writes nothing."""
        return bool(self.n_answers) or (self.task == "text" and self.text.how == "head")

    def check_features(self) -> None:
        """Raise ConfigError where cached features are asked for in two ways, or of an encoder or a connector that changes."""
        trained = ""
        if self.encoder_methods:
            trained = f"features of an encoder that vision_methods trains ({', '.join(self.encoder_methods)})"
        elif self.connector == "trained" or self.methods_on_connector:
            by = f" (connector_methods: {', '.join(self.methods_on_connector)})" if self.methods_on_connector else ""
            trained = f"features of a trained connector{by}"
        if self.train.draw_frames and self.features is not None:
            raise ConfigError(f"train.draw_frames gives each epoch other frames, and features is {self.features}: leave one out")
        if trained and (self.train.features != "encode" or self.features is not None):
            retained = f"train.features is {self.train.features}" if self.features is None else f"features is {self.features}"
            raise ConfigError(f"{retained}, and {trained} change with every step: give train.features: encode, and no folder")
        if self.train.features == "fill" and self.features is None:
            raise ConfigError("train.features is fill, and no folder is given to fill: give `features`, such as --features runs/features")

    @property
    def parts(self) -> Parts:
        """The frozen parts."""
        return Parts(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Parts)})

    @property
    def encoder_methods(self) -> dict[str, Method]:
        """The methods inside the encoder; most runs have none."""
        return _given(self.vision_methods)

    @property
    def methods_on_connector(self) -> dict[str, Method]:
        """The methods on the connector's linears."""
        return _given(self.connector_methods)

    @property
    def n_answers(self) -> int:
        """How many answers a head chooses among; 0 where texts are written."""
        return self.vqa.answers if self.task == "vqa" else 0

    def chosen_task(self) -> Task:
        """The task with its settings."""
        tasks: Mapping[str, Task] = {"captioning": self.captioning, "vqa": self.vqa, "text": TextTask(settings=self.text)}
        return tasks[self.task]


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """How an adapter trains the next one on images without labels (LiST)."""

    sessions: int = 3  # trainings after the first one, which learns from the labelled images alone
    share: float = 0.5  # of the images in a training stream, those with texts of the teacher; 0: none
    weights: Literal["confidence", "meta", "none"] = "confidence"  # confident texts alike; meta: by what each is worth to held-out labels; none: every text
    keep: float = 0.5  # the most confident share of the teacher's texts that is learned from at most
    precision: float = 0.9  # of answers, learn from those as confident as held-out ones of which this share is right
    held_out: float = 0.2  # share of the labelled images that no session learns from: they weigh texts and choose the session
    patience: int = 2  # stop after so many sessions that are no better on the held-out images

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.sessions < 1 or self.patience < 1:
            raise ConfigError(f"selftrain.sessions is {self.sessions} and selftrain.patience {self.patience}: give 1 or more")
        if not 0 <= self.share < 1 or not 0 <= self.keep <= 1 or not 0 < self.precision <= 1 or not 0 < self.held_out < 1:
            raise ConfigError(
                f"selftrain.share is {self.share}, keep {self.keep}, precision {self.precision} and held_out {self.held_out}: "
                "give shares from 0 to 1, and leave some labelled images to learn from"
            )


def setting_names() -> list[str]:
    """Every setting of a run by its whole name: `task`, `train.batch_size`, `methods.adalink.rank`."""
    return list(_names(RunConfig, ""))


def number_settings() -> list[str]:
    """Every setting of a run that is one number, by its whole name: `train.learning_rate`, `methods.adalink.rank`."""
    return [name for name, hint in _typed(RunConfig, "") if hint in (int, float)]


def check_groups(values: Any) -> None:
    """Raise ConfigError where a group of settings is given as something else: `train: null`, `methods: [bridge]`.

    values: what the parser made of the arguments, before the dataclasses are.
    """
    for name, kind in _fields(RunConfig):
        if dataclasses.is_dataclass(kind) and not hasattr(values[name], "as_dict"):
            raise ConfigError(f"{name} is {values[name]!r}: expected settings by name under it, or leave it out")


def _names(kind: Any, path: str) -> Iterator[str]:
    return (name for name, _ in _typed(kind, path))


def _typed(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, inner in _fields(kind):
        if dataclasses.is_dataclass(inner):
            yield from _typed(inner, f"{path}{name}.")
        else:
            yield path + name, inner


def _fields(kind: Any) -> Iterator[tuple[str, Any]]:
    """Field name -> its type, without the None of an optional one."""
    hints = typing.get_type_hints(kind)
    for name in kind.__dataclass_fields__:
        hint = hints[name]
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        yield name, inner[0] if len(inner) == 1 and type(None) in typing.get_args(hint) else hint
