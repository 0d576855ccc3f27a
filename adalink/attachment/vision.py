"""Attach an adapter to a frozen vision transformer: the same methods, edits and ports as in a language model.

    attachment = attach_vision(encoder, Adapter({"adalink": AdaLink(rank=16, modalities=("image",))}, read_vision(encoder)))
    encoder(pixel_values)               # every call is edited: all tokens are an image's
    attachment.detach()

AdaLink edits the patches where the patch embedding gives them, before class token and positions. Inside the layers every token is
IMAGE, class and register tokens too. Prompts are visual prompt tokens (VPT, arXiv 2203.12119, its shallow form): they follow the
encoder's own tokens through the layers, and what a layer gives comes without them, so whoever reads the encoder's features, of any
layer, reads its own tokens alone. That takes a state during a call; so the layers of an encoder with slots are not checkpointed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, Linear, read_projections
from adalink.attachment.attachment import Run, by_port, freeze, give_back, runs_of
from adalink.edit import EMBEDDING, Adapter, Port
from adalink.errors import AttachError, ConfigError
from adalink.tokens import DOMAIN_NAMES, IMAGE, TokenMap, Tokens, uploaded

__all__ = ["VisionAttachment", "attach_vision", "read_vision", "vision_layers"]


# ----------------------------------------
# Where a vision transformer keeps its patch embedding and its layers: read from its structure, as for language models.


def read_vision(model: nn.Module) -> Anatomy:
    """The anatomy of a vision transformer of transformers, timm or open_clip: `embedding` is the convolution that makes the patches.

    Raises AttachError where the model is none: no convolution into the width of its layers, layers of several widths (Swin), or words.
    """
    _refuse_words(model)
    layers = vision_layers(model)
    linears = tuple(linear for name, child in model.named_modules() if name.startswith(layers + ".") and (linear := _linear(name, child)))
    widths = {linear.name[len(layers) + 1 :].split(".")[0]: linear.n_in for linear in reversed(linears)}  # of each layer's first linear
    if len(set(widths.values())) != 1:
        raise AttachError(
            f"{type(model).__name__} has layers of the widths {sorted(set(widths.values()))}, expected one width throughout: "
            "choose a plain vision transformer (CLIP, SigLIP, DINOv2, ViT)"
        )
    width = next(iter(widths.values()))
    convolutions = [
        name
        for name, child in model.named_modules()
        if isinstance(child, nn.Conv2d) and child.out_channels == width and not name.startswith(layers + ".")
    ]
    if not convolutions:
        raise AttachError(f"{type(model).__name__} has no convolution that makes patches of its layers' width {width}: this structure is not supported")
    names = tuple(f"{layers}.{i}" for i in range(len(list(model.get_submodule(layers).children()))))
    return Anatomy(
        stack="",
        embedding=convolutions[-1],
        layers=names,
        final_norm=None,
        linears=linears,
        width=width,
        vocabulary=0,
        attention="bidirectional",
        projections=read_projections(model, names, {linear.name: (linear.n_in, linear.n_out) for linear in linears}),
    )


def _refuse_words(model: nn.Module) -> None:
    read: Any = getattr(model, "get_input_embeddings", None)
    try:
        words = read() if callable(read) else None
    except NotImplementedError:  # two towers
        words = None
    if isinstance(words, nn.Embedding):
        raise AttachError(f"{type(model).__name__} reads words: attach to it with `get_adalink_model`, or give its vision tower alone")


def vision_layers(model: nn.Module) -> str:
    """The longest list of modules of one kind that hold linears; the outermost of equals. Raises AttachError where there is none."""
    lists = {
        name: children
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and (children := list(module.children()))
        and len({type(child) for child in children}) == 1
        and any(_linear(name, child) for name, child in children[0].named_modules() if name)
    }
    if not lists:
        raise AttachError(f"{type(model).__name__} has no list of transformer layers: expected a vision transformer (CLIP, SigLIP, DINOv2, ViT)")
    return max(lists, key=lambda name: (len(lists[name]), -name.count(".")))


def _linear(name: str, module: nn.Module) -> Linear | None:
    """A linear that runs as a module: the one inside torch's own multi-head attention does not, so a hook on it would never be called."""
    if type(module) is not nn.Linear:
        return None
    return Linear(name, module.in_features, module.out_features, module.bias is not None)


def attach_vision(model: nn.Module, adapter: Adapter) -> VisionAttachment:
    """Attach an adapter, made with `read_vision(model)`, to a frozen vision transformer, and freeze the model.

    Raises AttachError for a compiled model or a port that it lacks, ConfigError for edits of tokens that an image does not have.
    """
    return VisionAttachment(model, adapter)


class VisionAttachment:
    """An adapter attached to a frozen vision transformer. Made by `attach_vision`."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.anatomy = read_vision(model)
        self.model = model
        self.slots = [slot.domain for slot in adapter.slots for _ in range(slot.count)]
        _check(adapter)
        self.at: dict[Port, tuple[Run, ...]] = {port: runs_of(placed) for port, placed in by_port(model, model, {0: adapter}).items()}
        self._tokens: Tokens | None = None
        self._carried: Tensor | None = None  # the slots between two layers [B, S, D]
        self._handles: list[Any] = []
        freeze(model)
        try:
            for i, name in enumerate(self.anatomy.layers):
                layer = model.get_submodule(name)
                self._handles.append(layer.register_forward_pre_hook(partial(self._into_layer, i == 0), with_kwargs=True))
                # Before every other hook: transformers collects what layers give with hooks of its own.
                self._handles.append(layer.register_forward_hook(self._out_of_layer, prepend=True))
            self._handles += [self._hook(port) for port in self.at]
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything back: hooks, requires_grad flags and modes are as they were. A second time changes nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        give_back(self.model)

    def _hook(self, port: Port) -> torch.utils.hooks.RemovableHandle:
        if port == EMBEDDING:
            return self.model.get_submodule(self.anatomy.embedding).register_forward_hook(self._patches)
        module = self.model.get_submodule(port.module)
        if port.side == "output":
            return module.register_forward_hook(partial(self._output, port), prepend=True)
        return module.register_forward_pre_hook(partial(self._input, port))

    def _patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Edit the feature map [B, D, h, w] of the patch embedding as tokens [B, h * w, D]."""
        h = output.flatten(2).transpose(1, 2)
        h = self._edited(EMBEDDING, h, h, _tokens(h, [IMAGE] * h.shape[1]))
        return h.transpose(1, 2).reshape(output.shape)

    def _into_layer(self, is_first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        if is_first:
            self._tokens = _tokens(h, [IMAGE] * h.shape[1] + self.slots)
            self._carried = None
        if not self.slots:
            return args, kwargs
        if self._carried is None:
            _refuse_shaped(layer, args, kwargs)
            empty = h.new_zeros(len(h), len(self.slots), h.shape[2])
            self._carried = self._edited(EMBEDDING, empty, empty, _tokens(h, self.slots))
        h = torch.cat([h, self._carried], 1)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def _out_of_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.slots:
            return None
        h = output[0] if isinstance(output, tuple) else output
        n_own = h.shape[1] - len(self.slots)
        self._carried, own = h[:, n_own:], h[:, :n_own]
        return (own, *output[1:]) if isinstance(output, tuple) else own

    def _output(self, port: Port, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = self._edited(port, h, args[0], self._tokens)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _input(self, port: Port, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._edited(port, args[0], args[0], self._tokens), *args[1:])

    def _edited(self, port: Port, h: Tensor, x: Tensor, tokens: Tokens | None) -> Tensor:
        """h after every edit placed at the port, each on its own tokens only."""
        assert tokens is not None
        for run in self.at.get(port, ()):
            if run.edits_any(tokens):
                h = run(h, tokens, x)
        return h


def _tokens(h: Tensor, domains: list[int]) -> Tokens:
    """Every row has the same tokens, and one adapter serves all."""
    alike = len(set(domains)) == 1
    domain = (torch.full((len(domains),), domains[0], device=h.device) if alike else uploaded(domains, h.device)).expand(len(h), -1)
    row = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    return TokenMap(domain, row, present=frozenset(domains)).window(len(h), 0, len(domains), len(domains))


def _check(adapter: Adapter) -> None:
    possible = {IMAGE, *(slot.domain for slot in adapter.slots)}
    names = {domain: name for name, domain in DOMAIN_NAMES.items()}
    if elsewhere := [slot.place for slot in adapter.slots if slot.place != "start"]:
        raise ConfigError(f"slots are asked for at the place {elsewhere[0]}, and a vision encoder reads no words: leave place at start there")
    for placement in adapter.placements:
        if placement.port.side not in ("embedding", "input", "output"):
            raise ConfigError(f"the edit {placement.role} changes the {placement.port.side} of a language model, which a vision encoder does not have")
        if possible.isdisjoint(placement.domains):
            wanted = ", ".join(names.get(domain, f"domain {domain}") for domain in placement.domains)
            raise ConfigError(f"the edit {placement.role} is for {wanted} tokens, and a vision encoder has image tokens: name the image modality")


def _refuse_shaped(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise AttachError where a layer takes an argument with a value for each token: it would have none for the slots."""
    if any(isinstance(value, Tensor | tuple | list) for value in (*args[1:], *kwargs.values()) if value is not None):
        raise AttachError(
            f"{type(layer).__name__} is given masks or positions for its tokens, and slots have none: "
            "use an edit without slots (AdaLink, LoRA, HiRA, BitFit, IA3)"
        )
