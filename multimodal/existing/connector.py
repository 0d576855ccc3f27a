"""The connector of a model that sees already: what runs between its tower's layers and its words, and the adapters that have one of their own.

An adapter has a connector of its own by trained copies of the connector's modules (`modules_to_save`), or by methods on its linears. The frozen
connector stays as it is. The tower is run for each connector that a batch needs, and a row reads the vectors of its own adapter's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adalink import AdaptedModel, Adapter, Anatomy, FrozenPart, Method, TokenMap
from adalink.anatomy import Linear
from adalink.attachment.vision import vision_layers
from adalink.checkpoint.folder import AdapterConfig, load_weights, read_config, save_adapter
from adalink.edit import Port, execution_device, read_frozen
from adalink.errors import AttachError, ConfigError
from adalink.tokens import IMAGE
from multimodal.existing.connector_choice import ConnectorChoice, refuse_both

__all__ = [
    "Connectors", "connector_linears", "connector_modules", "has_connector_methods", "no_connector", "no_linear",
    "placed_methods", "tower_of",
]  # fmt: skip

FOLDER = "connector"  # of the methods on the connector, in the adapter's folder, in the same format
LAYER = "connector"  # all linears of the connector count as one layer's


# ----------------------------------------
# Which modules are the connector, read from the model's structure: no weights are needed.


def tower_of(model: Any, modality: str = "image") -> nn.Module | None:
    """What encodes images (or sounds) inside the model, as it names it itself; None where it names nothing."""
    found = model.get_encoder(modality=modality) if hasattr(model, "get_encoder") else None
    return found if isinstance(found, nn.Module) and found is not model else None


def connector_modules(model: Any, tower: nn.Module) -> tuple[str, ...]:
    """The dotted names of the largest modules beside tower and language model, and of those in the tower that follow its layers and hold a linear.

    LLaVA has its projector beside the tower, Qwen2-VL its merger inside.
    """
    known = [tower, tower_of(model, "audio"), model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    others = {id(parameter) for module in known if module is not None for parameter in module.parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        own = {id(parameter) for parameter in module.parameters()}
        if own and others.isdisjoint(own) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            found.append(name)
            others |= own
    path = next(name for name, module in model.named_modules() if module is tower)
    return (*found, *(f"{path}.{name}".lstrip(".") for name in _after_layers(tower)))


def _after_layers(tower: nn.Module) -> tuple[str, ...]:
    try:
        layers = vision_layers(tower)
    except AttachError:
        return ()
    names = [name for name, _ in tower.named_modules()]
    later = names[names.index(layers) + 1 :]
    found: list[str] = []
    for name in later:
        module = tower.get_submodule(name)
        inside = name.startswith(tuple(f"{one}." for one in (layers, *found)))
        if not inside and not isinstance(module, nn.ModuleList | nn.ModuleDict) and any(isinstance(part, nn.Linear) for part in module.modules()):
            found.append(name)
    return tuple(found)


def connector_linears(model: nn.Module, modules: Sequence[str]) -> dict[str, str]:
    """The linears of the connector's modules: their names as methods find them -> their dotted names in the model."""
    around = modules[0].rpartition(".")[0]
    while any(not name.startswith(f"{around}.") for name in modules) and around:
        around = around.rpartition(".")[0]
    return {
        f"{LAYER}.{name.removeprefix(around).lstrip('.')}": name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(tuple(f"{one}." for one in modules))
    }


def connector_anatomy(model: nn.Module, linears: Mapping[str, str]) -> Anatomy:
    """Where methods can be placed in the connector, whose linears, one or more, count as those of one layer. linears: see `connector_linears`."""
    found = {name: model.get_submodule(path) for name, path in linears.items()}
    read = tuple(Linear(name, one.in_features, one.out_features, one.bias is not None) for name, one in found.items() if isinstance(one, nn.Linear))
    return Anatomy(
        stack="", embedding="", layers=(LAYER,), final_norm=None, linears=read, width=read[0].n_in, vocabulary=0, attention="bidirectional",
    )  # fmt: skip


def no_connector(model: nn.Module, name: str) -> ConfigError:
    """Of a model whose images reach the words without one."""
    return ConfigError(f"no connector was found in '{name}', a {type(model).__name__}: leave connector and connector_methods out")


def no_linear(model: nn.Module, modules: Sequence[str], name: str) -> ConfigError:
    """Of a connector without a linear."""
    kinds = " and ".join(sorted({type(model.get_submodule(module)).__name__ for module in modules}))
    return ConfigError(f"the connector of '{name}', a {kinds}, has no linear for connector_methods to act on: give connector: trained")


def placed_methods(model: nn.Module, linears: Mapping[str, str], methods: Mapping[str, Method]) -> Adapter:
    """New methods on these linears, beside them. Raises ConfigError or AttachError for methods that act on anything else."""
    anatomy = connector_anatomy(model, linears)
    if reserving := [name for name, method in methods.items() if method.slots(anatomy)]:
        raise ConfigError(f"{reserving[0]} adds tokens to a row, and a connector reads none: choose lora, hira, ia3 or bitfit for connector_methods")
    edits = Adapter(methods, anatomy)
    if not edits.placements:
        raise ConfigError(f"{', '.join(methods)} places nothing on a connector's linears: choose lora, hira, ia3 or bitfit for connector_methods")
    for placement in edits.placements:
        if placement.port.side not in ("input", "output") or placement.port.module not in linears:
            raise ConfigError(f"{placement.role} acts on more than the connector's linears: choose lora, hira, ia3 or bitfit for connector_methods")
        if IMAGE not in placement.domains:
            raise ConfigError(f"{placement.role} is for tokens of text, and a connector has image tokens alone: name the image modality")
        read_frozen(placement, model.get_submodule(linears[placement.port.module]))
        for module in (placement.edit, *placement.shared.values()):
            module.to(execution_device(model, linears[placement.port.module]))
    return edits


# ----------------------------------------
# The connectors of a model's adapters.


class Connectors:
    """Which adapters have a connector of their own, and the calls in which it stands in the place of the frozen one.

    edits   by adapter: the methods on its connector's linears, where it has some
    """

    def __init__(self, adapted: AdaptedModel, tower: nn.Module | None, encode: Callable[[], Tensor], name: str) -> None:
        """encode: the vectors of a small image. name: of the model, for errors."""
        self.edits = nn.ModuleDict()
        self._adapted, self._tower, self._encode, self._name = adapted, tower, encode, name
        self._handles: dict[str, list[torch.utils.hooks.RemovableHandle]] = {}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The dotted names of the connector's modules that an image's vectors depend on. Raises ConfigError where there are none."""
        base = self._adapted.base
        named = () if self._tower is None else connector_modules(base, self._tower)
        if found := _reaching(base, named, self._encode):
            return found
        raise no_connector(base, self._name)

    @cached_property
    def linears(self) -> dict[str, str]:
        """Of these modules the linears, as `connector_linears` has them. Raises ConfigError where there is none (Gemma 3's connector is a matrix)."""
        base = self._adapted.base
        named = connector_linears(base, self.modules)
        reached = _reaching(base, tuple(named.values()), self._encode)
        if found := {name: path for name, path in named.items() if path in reached}:
            return found
        raise no_linear(base, self.modules, self._name)

    def new(self, methods: Mapping[str, Method]) -> Adapter:
        """New methods on the connector's linears, for an adapter. Raises ConfigError or AttachError for those that act on anything else."""
        return placed_methods(self._adapted.base, self.linears, methods)

    def add_adapter(
        self, name: str, methods: Mapping[str, Method] | Method, connector: ConnectorChoice, connector_methods: Mapping[str, Method]
    ) -> Adapter:
        """Add a new adapter to the model, with a connector of its own where that is asked for. Raises as `VisionLanguageModel.add_adapter`."""
        if connector not in get_args(ConnectorChoice):
            raise ConfigError(f"connector is {connector!r}: give frozen or trained")
        refuse_both(connector, connector_methods)
        edits = self.new(connector_methods) if connector_methods else None
        adapter = self._adapted.add_adapter(name, methods, modules_to_save=self.modules if connector == "trained" else ())
        if edits is not None:
            self.add(name, edits)
        return adapter

    def add(self, adapter: str, edits: Adapter) -> None:
        """Let an adapter that the model has use these methods on its connector."""
        self.edits[adapter] = edits
        self._handles[adapter] = []
        for port in {placement.port for placement in edits.placements}:
            linear, edited = self._adapted.base.get_submodule(self.linears[port.module]), partial(self._edited, adapter, port)
            hook = linear.register_forward_pre_hook if port.side == "input" else linear.register_forward_hook
            self._handles[adapter].append(hook(edited))
        self.activate(self._adapted.active)

    def delete(self, adapter: str) -> None:
        """Forget what an adapter has of its own; nothing where it has the frozen connector."""
        for handle in self._handles.pop(adapter, []):
            handle.remove()
        if adapter in self.edits:
            del self.edits[adapter]

    def activate(self, adapter: str | None) -> None:
        """The methods of this adapter alone are trained."""
        for name, edits in self.edits.items():
            edits.requires_grad_(name == adapter)

    def of(self, adapter: str | None) -> Adapter | None:
        """The methods on an adapter's connector; None where it has none."""
        return dict(self.edits.items()).get(adapter or "")  # type: ignore[return-value]  # a ModuleDict holds modules

    def has_own(self, adapter: str | None) -> bool:
        """Whether an adapter has a connector of its own."""
        adapters = dict(self._adapted.adapters.items())
        if adapter not in adapters:
            return False
        copies: Any = adapters[adapter].copies
        return adapter in self.edits or any(self.holds(path) for path in copies)

    def index(self, adapter: str) -> int:
        """The row index that means the adapter in token maps."""
        return self._adapted.indices[adapter]

    def holds(self, module: str) -> bool:
        """Whether a module of the model is one of the connector's, or a part of one."""
        return f"{module}.".startswith(tuple(f"{one}." for one in self.modules))

    def save(self, folder: Path, base: FrozenPart) -> None:
        """Write the methods on the active adapter's connector below its folder, where there are some; copies of modules are in the adapter's own file."""
        if (edits := self.of(self._adapted.active)) is not None:
            save_adapter(folder / FOLDER, edits, AdapterConfig(edits.methods, {"language_model": base}))

    def loaded(self, folder: Path, base: FrozenPart, *, allow_other_base: bool = False) -> Adapter | None:
        """The methods on the connector of an adapter's folder with their weights, not in use yet; None where it holds none.

        Raises CheckpointError for a damaged folder, or another base.
        """
        if not has_connector_methods(folder):
            return None
        config = read_config(folder / FOLDER)
        config.check_base({"language_model": base}, str(folder / FOLDER), allow_other_base=allow_other_base)
        edits = self.new(config.methods).eval()
        load_weights(folder / FOLDER, edits)
        return edits

    @contextlib.contextmanager
    def used(self, adapter: str | None) -> Iterator[None]:
        """Inside the block an image is encoded by the connector of this adapter; None: by the frozen one."""
        if adapter is None:
            yield
            return
        index, device = self.index(adapter), self._adapted.device
        domain, row = torch.full((1, 1), IMAGE, device=device), torch.full((1,), index, device=device)
        with self._adapted.attachment.bind(TokenMap(domain, row, present=frozenset({IMAGE}), serving=frozenset({index}))):
            yield

    def _edited(self, adapter: str, port: Port, linear: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> Any:
        """What the adapter's methods make of a linear's output, or of its input."""
        token_map = self._adapted.attachment.map
        if token_map is None or (token_map.serving is not None and self.index(adapter) not in token_map.serving):
            return None
        if len(token_map.row) > 1:
            raise ConfigError(
                f"the adapter {adapter} has methods on its connector, and a call with the images of several rows cannot distinguish whose they are: call the "
                "VisionLanguageModel, which encodes images first"
            )
        h, x = (args[0] if output is None else output), args[0]
        edited = self._edits_at(adapter, port, h.reshape(1, -1, h.shape[-1]), x.reshape(1, -1, x.shape[-1])).reshape(h.shape)
        return (edited, *args[1:]) if output is None else edited

    def _edits_at(self, adapter: str, port: Port, h: Tensor, x: Tensor) -> Tensor:
        domain = torch.full(h.shape[:2], IMAGE, device=h.device)
        tokens = TokenMap(domain, torch.zeros(1, dtype=torch.int64, device=h.device), present=frozenset({IMAGE})).window(1, 0, h.shape[1], h.shape[1])
        edits: Any = self.edits[adapter]
        for placement in edits.placements:
            if placement.port == port:
                dtype = next((parameter.dtype for parameter in placement.edit.parameters()), h.dtype)
                h = placement.edit(h.to(dtype), tokens, x.to(dtype)).to(h.dtype)
        return h


def _reaching(model: nn.Module, modules: tuple[str, ...], encode: Callable[[], Tensor]) -> tuple[str, ...]:
    """Of these modules those whose output the vectors depend on: a zero is added to each output, and its gradient asked for."""
    with torch.enable_grad():
        zeros = {name: torch.zeros((), requires_grad=True) for name in modules}
        handles = [model.get_submodule(name).register_forward_hook(partial(_plus, zero)) for name, zero in zeros.items()]
        try:
            total = encode().float().sum()
        finally:
            for handle in handles:
                handle.remove()
        if not total.requires_grad:
            return ()
        found = torch.autograd.grad(total, list(zeros.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(zeros, found, strict=True) if gradient is not None)


def _plus(zero: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tree_map(lambda value: value + zero.to(value.device) if isinstance(value, Tensor) and value.is_floating_point() else value, output)


def has_connector_methods(folder: Path) -> bool:
    """Whether an adapter's folder holds methods on its connector."""
    return (folder / FOLDER).is_dir()
