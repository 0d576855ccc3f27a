"""A frozen language model with named adapters: the methods that users of this field know.

    model = get_adalink_model(frozen, {"adalink": AdaLink(rank=16, modalities=("text",))})
    model.print_trainable_parameters()
    model.save_pretrained("my-adapter")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy, InputSpec
from adalink.attach import Attachment, attach
from adalink.checkpoint import AdapterConfig, FrozenPart, fingerprint, load_weights, read_config, save_adapter
from adalink.edit import Adapter, Method
from adalink.errors import ConfigError
from adalink.tokens import BASE_ROW, PAD, TEXT, TokenMap

__all__ = ["AdaptedModel", "get_adalink_model"]

DEFAULT = "default"


def get_adalink_model(model: nn.Module, methods: Mapping[str, Method] | Method) -> AdaptedModel:
    """A frozen model with one adapter, called `default`, on it: the one line that most users need."""
    adapted = AdaptedModel(model)
    adapted.add_adapter(DEFAULT, methods if isinstance(methods, Mapping) else {type(methods).__name__.lower(): methods})
    return adapted


class AdaptedModel(nn.Module):
    """A frozen model, and adapters on it by name. Called like the model itself.

    These are more than five public methods, because they are the ones that users of this field look for.
    """

    def __init__(self, base: nn.Module, *, inputs: Mapping[str, InputSpec] | None = None, parts: Mapping[str, FrozenPart] | None = None) -> None:
        super().__init__()
        self.base = base
        self.anatomy = Anatomy.read(base, inputs)
        self.parts = dict(parts or {"language_model": _part_of(base)})
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.task: dict[str, Any] = {}  # saved with every adapter, for whoever loads it
        self.attachment: Attachment = attach(base, anatomy=self.anatomy)

    def forward(self, input_ids: Tensor, *, token_map: TokenMap | None = None, **kwargs: Any) -> Any:
        """The frozen model's output on edited activations. Without a token map every token is text; kwargs are the model's own."""
        with self.attachment.bind(token_map or self.text_map(input_ids, kwargs.get("attention_mask"))):
            return self.base(input_ids=input_ids, **kwargs)

    def generate(self, input_ids: Tensor, *, token_map: TokenMap | None = None, **kwargs: Any) -> Tensor:
        """int64 [B * returned, T']: transformers' own generation on edited activations; kwargs are its own."""
        with self.attachment.bind(token_map or self.text_map(input_ids, kwargs.get("attention_mask"))):
            return self.base.generate(input_ids=input_ids, **kwargs)  # type: ignore[operator, no-any-return]

    def train(self, mode: bool = True) -> AdaptedModel:
        """The adapters' mode alone: the frozen part has no dropout, whatever is trained around it."""
        super().train(mode)
        self.base.eval()
        return self

    def add_adapter(self, name: str, methods: Mapping[str, Method]) -> Adapter:
        """Add a new adapter and make it the active one. Raises ConfigError where the name is taken."""
        if not name.isidentifier() or name in self.adapters:
            raise ConfigError(f"the adapter's name is {name!r}: give an identifier that is not one of {list(self.adapters)}")
        adapter = Adapter(methods, self.anatomy)
        self._attach([*self.adapters.values(), adapter])
        self.adapters[name] = adapter.to(next(self.base.parameters()).device)
        self.active = name
        return adapter

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one: it serves every row that names no other."""
        self._index(name)
        self.active = name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen model alone, inside the block: bit for bit."""
        active, self.active = self.active, None
        try:
            yield
        finally:
            self.active = active

    def active_adapter(self) -> Adapter:
        """The adapter in use. Raises ConfigError where there is none."""
        if self.active is None:
            raise ConfigError("no adapter is active: call add_adapter or set_adapter first")
        return self.adapters[self.active]  # type: ignore[return-value]

    def rows(self, n_rows: int, names: Sequence[str | None] | None = None) -> Tensor:
        """int64 [B]: which adapter serves each row; the active one where no names are given, none for None."""
        if names is not None and len(names) != n_rows:
            raise ConfigError(f"{len(names)} adapter names were given for {n_rows} rows: give one for each row")
        chosen = [self.active] * n_rows if names is None else names
        device = next(self.base.parameters()).device
        return torch.tensor([BASE_ROW if name is None else self._index(name) for name in chosen], dtype=torch.int64, device=device)

    def text_map(self, input_ids: Tensor, attention_mask: Tensor | None) -> TokenMap:
        """The token map of plain text: every token is text, padding is nobody's."""
        domain = torch.full_like(input_ids, TEXT)
        if attention_mask is not None:
            domain = domain.masked_fill(attention_mask == 0, PAD)
        return TokenMap(domain, self.rows(len(input_ids)), present=frozenset({TEXT}))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the active adapter's folder: config, weights, model card."""
        adapter = self.active_adapter()
        save_adapter(Path(folder), adapter, AdapterConfig(adapter.methods, self.parts, self.task))

    def load_adapter(self, folder: str | Path, name: str) -> Adapter:
        """Add an adapter from its folder or hub name. Raises CheckpointError where it was trained on other frozen parts."""
        path = _local(folder)
        config = read_config(path)
        config.check_base(self.parts, str(folder))
        before = self.active
        adapter = self.add_adapter(name, config.methods)
        try:
            load_weights(path, adapter)
        except BaseException:
            del self.adapters[name]
            self.active = before
            self._attach(list(self.adapters.values()))
            raise
        self.task = dict(config.task)
        return adapter

    @staticmethod
    def read_config(folder: str | Path) -> AdapterConfig:
        """What an adapter folder or hub name says of itself, before anything is loaded."""
        return read_config(_local(folder))

    @classmethod
    def from_pretrained(cls, base: nn.Module, folder: str | Path) -> AdaptedModel:
        """A frozen model with the adapter of a folder or hub name on it."""
        model = cls(base)
        model.load_adapter(folder, DEFAULT)
        return model

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the active adapter's folder; the address of the commit comes back."""
        import tempfile

        from huggingface_hub import HfApi  # ships with transformers

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload adapter"))

    def print_trainable_parameters(self) -> None:
        """Print how many parameters the active adapter trains, and their share of all."""
        print(self.trainable_summary())

    def trainable_summary(self) -> str:
        """One line: trained parameters, all parameters, share, and how they divide over the methods."""
        counts = self.active_adapter().n_parameters()
        trained, frozen = sum(counts.values()), sum(parameter.numel() for parameter in self.base.parameters())
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        return f"trained: {trained:,} || all: {trained + frozen:,} || trained share: {100 * trained / (trained + frozen):.4f} % ({parts})"

    def _index(self, name: str) -> int:
        if name not in self.adapters:
            raise ConfigError(f"there is no adapter {name!r}: this model has {', '.join(self.adapters) or 'none'}")
        return list(self.adapters).index(name)

    def _attach(self, adapters: Sequence[nn.Module]) -> None:
        """Attach all adapters anew: index i in a token map is the i-th name."""
        self.attachment.detach()
        self.attachment = attach(self.base, *(adapter for adapter in adapters if isinstance(adapter, Adapter)), anatomy=self.anatomy)


def _part_of(model: nn.Module) -> FrozenPart:
    config = getattr(model, "config", None)
    return FrozenPart(getattr(config, "name_or_path", "") or type(model).__name__, fingerprint(model))


def _local(folder: str | Path) -> Path:
    if Path(folder).is_dir() or isinstance(folder, Path):
        return Path(folder)
    from huggingface_hub import snapshot_download  # ships with transformers
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{folder} is neither a folder nor an adapter on the hub ({type(error).__name__}): check the name") from None
