"""A frozen language model with named adapters: the methods that users of this field know.

    model = get_adalink_model(frozen, AdaLink(rank=16, modalities=("text",)))
    model.print_trainable_parameters()
    model.save_pretrained("my-adapter")
    model.load_adapter("another", "other")
    model.generate(ids, attention_mask=mask, adapter_names=["default", "other", "__base__"])

The frozen model may be a text-only one or an existing vision-language model, whose image tokens are found by their id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, InputSpec
from adalink.attachment.attach import attach
from adalink.attachment.attachment import Attachment, without_dropout
from adalink.attachment.existing import check_images_known, check_trains, image_token_ids, writes_without_reading, written_domains
from adalink.attachment.inputs import Call, Route, Rows, given_ids, n_choices
from adalink.attachment.mixture import Mixture
from adalink.attachment.modules_to_save import ServedCopies, copied
from adalink.attachment.recompute import with_exact_cache
from adalink.checkpoint.fingerprint import FrozenPart, part_of, sketch_of_states
from adalink.checkpoint.folder import (
    AdapterConfig,
    class_like,
    configs_to_tensor,
    load_weights,
    local_folder,
    of_base,
    read_config,
    save_adapter,
    state_of_trained,
    upload,
)
from adalink.checkpoint.start import Start, seeded, start_of_new
from adalink.edit import Adapter, Method, execution_device
from adalink.errors import ConfigError, names_of
from adalink.methods.budgets.hyper import task_weights
from adalink.tokens import AUTO, BASE_NAME, BASE_ROW, TokenMap, uploaded

__all__ = ["BASE_NAME", "ActiveAdapter", "AdaptedModel", "get_adalink_model"]

DEFAULT = "default"


def get_adalink_model(model: nn.Module, methods: Mapping[str, Method] | Method, *, modules_to_save: Sequence[str] = ()) -> AdaptedModel:
    """A frozen model with one adapter, called `default`, on it: the one line that most users need. Arguments as in `add_adapter`."""
    adapted = AdaptedModel(model)
    with _unloaded_on_error(adapted):
        adapted.add_adapter(DEFAULT, methods, modules_to_save=modules_to_save)
    return adapted


class AdaptedModel(nn.Module):
    """A frozen model, and adapters on it by name. Called like the model itself; its methods are those that users of this field look for.

    transformers' Trainer takes it as it is. Its state dict is the adapters alone, so a checkpoint of Trainer is an adapter folder too:
    `load_adapter` and `from_pretrained` read it.
    """

    config, dtype, generation_config, main_input_name = of_base("config"), of_base("dtype"), of_base("generation_config"), of_base("main_input_name")
    can_generate, get_input_embeddings, get_output_embeddings = of_base("can_generate"), of_base("get_input_embeddings"), of_base("get_output_embeddings")
    loss_type, accepts_loss_kwargs, hf_device_map = of_base("loss_type"), of_base("accepts_loss_kwargs"), of_base("hf_device_map")
    _keys_to_ignore_on_save: None = None

    def __init__(self, base: nn.Module, *, inputs: Mapping[str, InputSpec] | None = None, parts: Mapping[str, FrozenPart] | None = None) -> None:
        super().__init__()
        self.base = base
        self.anatomy = Anatomy.read(base, inputs)
        self.parts = dict(parts or {"language_model": part_of(base)})
        self.image_ids = image_token_ids(base)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.tasks: dict[str, dict[str, Any]] = {}  # by adapter: saved with it, for whoever loads it
        self._origins: dict[str, tuple[Start | None, Mapping[str, Any]]] = {}  # by adapter: its start, and of which others it was made
        self.indices: dict[str, int] = {}  # by adapter: the row index that means it, never given to another
        self._n_ever = 0
        self._resting: dict[str, list[str]] = {}  # by adapter that is not active: its parameters that are trained when it is
        self.attachment: Attachment = attach(base, anatomy=self.anatomy)
        self._copies = ServedCopies(self.attachment)
        weakref.finalize(self, _leave, self.attachment, self._copies).atexit = False
        if "language_model" in self.parts:
            own = self.parts["language_model"]
            self.parts["language_model"] = dataclasses.replace(own, sketches={**own.sketches, **sketch_of_states(self.attachment, self.image_ids)})
        self._without: dict[tuple[str, ...], FrozenPart] = {}
        state_of_trained(self, {"base": base})
        self.__class__ = class_like(type(self), type(base))  # type: ignore[assignment]  # a subclass of this one

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        token_map: TokenMap | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,  # the frozen model's own arguments
    ) -> Any:
        """The frozen model's output on edited activations; kwargs are the model's own.

        Without a token map every token is text, image where its id says so, or answer where it has a label. An adapter's slots are put
        in before its row's tokens; logits are those of the caller's tokens. `adapter_names`: one for each row, "__base__" for none.
        """
        if token_map is not None:
            _check_no_names(adapter_names)
            with self.attachment.bind(token_map):
                return self.base(input_ids=input_ids, **kwargs)
        call = self._call({"input_ids": input_ids, **kwargs}, adapter_names, "right")
        with self.attachment.bind(call.token_map), call.around(self.base, self.anatomy):
            return call.own_output(self.base(**call.arguments))

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        token_map: TokenMap | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,  # transformers' own arguments
    ) -> Any:
        """int64 [B * returned, T']: transformers' own generation on edited activations without dropout, prompt first; kwargs are its own."""
        served = [name for name, index in self.indices.items() if token_map is None or token_map.serving is None or index in token_map.serving]
        self.check_writes(served if token_map is not None else [self.active] if adapter_names is None else adapter_names)
        if token_map is not None:
            _check_no_names(adapter_names)
            with without_dropout(self), self.attachment.bind(token_map):
                return self.base.generate(input_ids=input_ids, **with_exact_cache(self.attachment, token_map, kwargs))  # type: ignore[operator]
        call = self._call({"input_ids": input_ids, **kwargs}, adapter_names, "left")
        with without_dropout(self), self.attachment.bind(call.token_map):
            return call.own_ids(self.base.generate(**with_exact_cache(self.attachment, call.token_map, call.arguments)))  # type: ignore[operator]

    def train(self, mode: bool = True) -> AdaptedModel:
        """The adapters' mode alone: the frozen part has no dropout, whatever is trained around it."""
        super().train(mode)
        self.base.eval()
        return self

    def add_adapter(self, name: str, methods: Mapping[str, Method] | Method, *, modules_to_save: Sequence[str] = ()) -> Adapter:
        """Add a new adapter, of one method or of several by name, and make it the active one; the others stay as they are.

        modules_to_save: modules above the layers that are trained and saved with the adapter, such as a new classifier's head
        ("classifier", "score"). The model's own stay as they are: each adapter has a copy, which serves its rows.

        Raises ConfigError where the name is taken, a method is for tokens that this model never sees, or a module is not there.
        """
        by_name = methods if isinstance(methods, Mapping) else {type(methods).__name__.lower(): methods}
        with seeded() as seed:
            adapter = self._new(name, by_name, modules_to_save)
        self._add(name, adapter)
        self._origins[name] = start_of_new(seed, adapter), {}
        return adapter

    def load_adapter(self, folder: str | Path, name: str, *, activate: bool = True, allow_other_base: bool = False) -> Adapter:
        """Add an adapter from its folder or hub name in eval mode, and make it the active one, unless `activate` is False.

        A failure leaves everything as it was.

        Raises CheckpointError where it is damaged, or was trained on other frozen parts; with `allow_other_base` those are a warning.
        """
        path = local_folder(folder)
        config = read_config(path)
        config.check_base(self._parts(config.modules_to_save), str(folder), allow_other_base=allow_other_base)
        if config.derived.get("verb") == "port" and config.derived["settings"]["measured"] is None:
            warnings.warn(f"the adapter in {folder} was ported to this model and never measured on it: port it with --data", stacklevel=2)
        adapter = self._new(name, config.methods, config.modules_to_save).eval()
        load_weights(path, adapter)
        before = self.active
        self._add(name, adapter)
        if not activate:
            self._activate(before)
        self.tasks[name], self._origins[name] = dict(config.task), (config.start, config.derived)
        return adapter

    def add_mixture(self, names: Sequence[str]) -> None:
        """Let several adapters serve a row together, under the name `auto`, each by a weight of the row's `Route`; they stay as they are.

        Raises ConfigError for an unknown name, for adapters that cannot be mixed, and where there is a mixture.
        """
        if self._mixture is not None:
            raise ConfigError(f"this model has a mixture of {', '.join(self._mixture.names)} already: delete {AUTO!r} first")
        for name in names:
            self._index(name)
        before = self.active
        self._add(AUTO, Mixture({name: self._adapter(name) for name in names}, self._n_ever))
        self._activate(before)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter away; the others stay as they are. Where it was the active one, none is. Raises ConfigError for one of a mixture."""
        self._index(name)
        if self._mixture is not None and name in self._mixture.names:
            raise ConfigError(f"the adapter {name} is one of a mixture, which would serve without it: delete {AUTO!r} first")
        self._serve({self.indices[other]: self._adapter(other) for other in self.adapters if other != name})
        del self.adapters[name], self.indices[name]
        for known in (self.tasks, self._origins, self._resting):
            known.pop(name, None)
        self.active = None if self.active == name else self.active

    def unload(self) -> nn.Module:
        """Delete every adapter and give the frozen model back, bit for bit as it came. This object serves nothing any more."""
        for name in reversed(list(self.adapters)):  # a mixture before what it is of
            self.delete_adapter(name)
        self.attachment.detach()
        return self.base

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one: it serves every row that names no other, and it alone is trained (requires_grad)."""
        self._index(name)
        self._activate(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen model alone, inside the block: bit for bit."""
        active, self.active = self.active, None
        try:
            yield
        finally:
            self.active = active

    @property
    def active_adapter(self) -> ActiveAdapter:
        """The name of the adapter in use, "" where there is none; called, the adapter itself (a ConfigError where there is none)."""
        return ActiveAdapter(self)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use: one, or none."""
        return [] if self.active is None else [self.active]

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, in the order in which they came; a mixture of them is none."""
        return [name for name in self.adapters if name != AUTO]

    @property
    def task(self) -> dict[str, Any]:
        """What is saved with the active adapter for whoever loads it; empty where none is active."""
        return self.tasks.get(self.active or "", {})

    @task.setter
    def task(self, task: Mapping[str, Any]) -> None:
        self.tasks[self._active()] = dict(task)

    @property
    def start(self) -> Start | None:
        """What the active adapter's weights were before any training; None where no seed gives them."""
        return self._origins.get(self.active or "", (None, {}))[0]

    @start.setter
    def start(self, start: Start | None) -> None:
        self._origins[self._active()] = start, {}

    @property
    def device(self) -> torch.device:
        """Where the frozen model begins."""
        return execution_device(self.base, f"{self.anatomy.stack}.{self.anatomy.embedding}".lstrip("."))

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self.attachment.is_checkpointed

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute each layer's activations in the backward pass: memory for time, with the same gradients.

        Raises ConfigError for what that is not: reentrant checkpointing, only some of the layers, activations that are moved elsewhere.
        """
        other = {name: value for name, value in (gradient_checkpointing_kwargs or {}).items() if (name, value) != ("use_reentrant", False)}
        if other or every_n_layers != 1 or offload:
            found = {**other, **({"every_n_layers": every_n_layers} if every_n_layers != 1 else {}), **({"offload": True} if offload else {})}
            raise ConfigError(
                f"gradient checkpointing was asked for with {', '.join(f'{name}={value}' for name, value in found.items())}, and an adapted model recomputes "
                "every layer, without reentrance: leave that out"
            )
        if not self.is_gradient_checkpointing:
            self.attachment.checkpoint_layers()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """transformers' newer name for `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again, as it is from the start."""
        self.attachment.keep_activations()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters, frozen and trained: of the active adapter and the others."""
        words = {id(parameter) for parameter in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        return sum(p.numel() for p in self.parameters() if id(p) not in words and (p.requires_grad or not only_trainable))

    def get_extra_state(self) -> Tensor:
        """uint8 [N]: in the state dict, what the adapters' tensors are of, as JSON: the config of each adapter's folder."""
        return configs_to_tensor({name: self._config_of(name) for name in self.adapters if name != AUTO}, self.active)

    def set_extra_state(self, state: object) -> None:
        """Nothing: the adapters that a state dict is loaded into are there already."""

    def check_writes(self, names: Sequence[str | None]) -> None:
        """Raise ConfigError where the adapter of a row answers from a list."""
        if choosing := [name for name in names if name and name in self.adapters and name != AUTO and self._adapter(name).chooses]:
            raise ConfigError(
                f"the adapter {choosing[0]} answers from a list and writes nothing: give it the list in a VisionLanguageModel (add_answer_head), whose "
                "generate chooses among it"
            )

    def rows(self, n_rows: int, names: Sequence[str | None] | None = None) -> Tensor:
        """int64 [B]: which adapter serves each row; the active one where no names are given, none for "__base__" and None."""
        return self.serving(n_rows, names).row

    def serving(self, n_rows: int, names: Sequence[str | None] | None = None, tasks: Sequence[str] = ()) -> Rows:
        """What a token map says of a batch's adapters: rows, slots of each row, which occur. Raises ConfigError for names that do not fit.

        tasks: of each row, where it is known and the active adapter serves all (`adalink.methods.budgets.hyper`).
        """
        if names is not None and len(names) != n_rows:
            raise ConfigError(f"{len(names)} adapter names were given for {n_rows} rows: give one for each row")
        chosen = [None if name == BASE_NAME else name for name in ([self.active] * n_rows if names is None else names)]
        indices = tuple(BASE_ROW if name is None else self._index(name) for name in chosen)
        alike = len(set(indices)) == 1
        row = torch.full((n_rows,), indices[0], device=self.device) if alike else uploaded(indices, self.device)
        slots = tuple(() if name is None else self._adapter(name).slots for name in chosen)
        weights = task_weights(self.active_adapter(), tasks, self.device) if tasks and names is None and self.active else self._weights(chosen)
        return Rows(row, indices, frozenset(indices) - {BASE_ROW}, slots, weights)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the active adapter's folder: config, weights, model card."""
        adapter = self.active_adapter()
        save_adapter(Path(folder), adapter, self._config_of(self._active()))

    @staticmethod
    def read_config(folder: str | Path) -> AdapterConfig:
        """What an adapter folder or hub name says of itself, before anything is loaded."""
        return read_config(local_folder(folder))

    @classmethod
    def from_pretrained(cls, base: nn.Module, folder: str | Path, *, allow_other_base: bool = False) -> AdaptedModel:
        """A frozen model with the adapter of a folder or hub name on it, in eval mode. Arguments and errors as in `load_adapter`."""
        model = cls(base)
        with _unloaded_on_error(model):
            model.load_adapter(folder, DEFAULT, allow_other_base=allow_other_base)
        return model.eval()

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the active adapter's folder; the address of the commit comes back."""
        self.active_adapter()
        return upload(repository, private, self.save_pretrained)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters the active adapter trains, and their share of all."""
        print(self.trainable_summary())

    def trainable_summary(self, also_frozen: int = 0) -> str:
        """One line: trained parameters, all parameters, share, and how they divide over the methods. also_frozen: an encoder's parameters."""
        counts = self.active_adapter().n_parameters()
        trained, frozen = sum(counts.values()), also_frozen + sum(parameter.numel() for parameter in self.base.parameters())
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        return f"trained: {trained:,} || all: {trained + frozen:,} || trained share: {100 * trained / (trained + frozen):.4f} % ({parts})"

    def _weights(self, names: Sequence[str | None]) -> Tensor | None:
        """float64 [B, K]: of the rows that a mixture serves, zeros of the others; None where it serves none."""
        if (mixture := self._mixture) is None or not any(name == AUTO and isinstance(name, Route) for name in names):
            return None
        return torch.tensor([mixture.weights_of(name if name == AUTO else None) for name in names], dtype=torch.float64).to(self.device)

    @property
    def _mixture(self) -> Mixture | None:
        found = self.adapters._modules.get(AUTO)
        return found if isinstance(found, Mixture) else None

    def _call(self, arguments: Mapping[str, Any], names: Sequence[str | None] | None, side: Literal["left", "right"]) -> Call:
        check_images_known(self.base, self.anatomy, arguments, self.image_ids)
        if writes_without_reading(self.base):
            domain = written_domains(arguments)
            return Call.of_writer(domain, {name: value for name, value in arguments.items() if name != "input_ids"}, self.serving(len(domain), names))
        n_rows, n = len(given_ids(arguments, self.image_ids)), n_choices(arguments)
        if n > 1 and names is not None:
            names = [name for name in names for _ in range(n)]
        return Call.make(self.base, self.anatomy, arguments, self.serving(n_rows * n, names), self.image_ids, side)

    def _parts(self, copies: Sequence[str]) -> dict[str, FrozenPart]:
        """The frozen parts of an adapter that has trained copies of these modules, which then are no part of them."""
        if not copies:
            return self.parts
        role, names = "language_model", tuple(copies)
        if names not in self._without:
            other = part_of(self.base, without=names)
            self._without[names] = dataclasses.replace(self.parts[role], fingerprint=other.fingerprint, weights=other.weights)
        return {**self.parts, role: self._without[names]}

    def _config_of(self, name: str) -> AdapterConfig:
        copies = tuple(self._adapter(name).copies)
        return AdapterConfig(self._adapter(name).methods, self._parts(copies), self.tasks.get(name, {}), copies, *self._origins.get(name, (None, {})))

    def _new(self, name: str, methods: Mapping[str, Method], modules_to_save: Sequence[str]) -> Adapter:
        """An adapter that is not attached yet, so that nothing has to be undone where it cannot be used."""
        if not name.isidentifier() or name in (BASE_NAME, AUTO) or hasattr(self.adapters, name):  # a ModuleDict has attributes of its own: `keys`
            taken = f"one of {list(self.adapters)}, nor {AUTO}, nor a method of dictionaries"
            raise ConfigError(f"the adapter's name is {name!r}: give an identifier that is not {taken}")
        adapter = Adapter(methods, self.anatomy, copied(self.base, self.anatomy, names_of("modules_to_save", modules_to_save)))
        check_trains(self.base, self.anatomy, adapter, self.image_ids)
        return adapter.beside(self.base, self.anatomy)

    def _add(self, name: str, adapter: Adapter) -> Adapter:
        self._serve({**{self.indices[other]: self._adapter(other) for other in self.adapters}, self._n_ever: adapter})
        self.adapters[name], self.indices[name] = adapter, self._n_ever
        self._n_ever += 1
        self._activate(name)
        return adapter

    def _activate(self, name: str | None) -> None:
        """Others require no gradient, which DDP would wait for and an optimizer would decay; what an adapter had frozen stays frozen in it."""
        for other in self.adapters:
            if other != name and other not in self._resting:
                self._resting[other] = [key for key, parameter in self._adapter(other).named_parameters() if parameter.requires_grad]
                self._adapter(other).requires_grad_(False)
        for key in self._resting.pop(name, ()) if name is not None else ():
            self.get_parameter(f"adapters.{name}.{key}").requires_grad_(True)
        self.active = name

    def _serve(self, adapters: Mapping[int, Adapter]) -> None:
        self.attachment.serve(adapters)  # refuses before anything has changed
        self._copies.serve(adapters)

    def _active(self) -> str:
        if self.active is None:
            raise ConfigError("no adapter is active: call add_adapter or set_adapter first")
        return self.active

    def _adapter(self, name: str) -> Adapter:
        return self.adapters[name]  # type: ignore[return-value]  # a ModuleDict holds modules

    def _index(self, name: str) -> int:
        if name not in self.adapters:
            raise ConfigError(f"there is no adapter {name!r}: this model has {', '.join(self.adapters) or 'none'} (and {BASE_NAME} for none of them)")
        return self.indices[name]


@contextlib.contextmanager
def _unloaded_on_error(model: AdaptedModel) -> Iterator[None]:
    """A frozen model is given back where its first adapter fails; the error itself may keep the adapted one alive."""
    try:
        yield
    except BaseException:
        model.unload()
        raise


def _leave(attachment: Attachment, copies: ServedCopies) -> None:
    """The frozen model of an adapted one that is no more, as it was before."""
    copies.serve({})
    attachment.detach()


class ActiveAdapter(str):
    """The name of a model's active adapter, as peft gives it. Called, it gives the adapter."""

    __slots__ = ("_model",)
    _model: AdaptedModel

    def __new__(cls, model: AdaptedModel) -> Self:
        made = super().__new__(cls, model.active or "")
        made._model = model
        return made

    def __call__(self) -> Adapter:
        return self._model._adapter(self._model._active())


def _check_no_names(adapter_names: Sequence[str | None] | None) -> None:
    if adapter_names is not None:
        raise ConfigError("adapter_names and a token_map were both given, and the map says already which adapter serves each row: give one of them")
