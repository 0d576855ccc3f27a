"""What an existing model is given beside the ids of a call: the vectors of its image tokens, positions in several dimensions, kinds of tokens.

A call of the model may hold a part of the batch's tokens (a prompt that is read in pieces, a generated token after a cache). What is given
is cut to the call's tokens by where its cache ends, as the edits' tokens are, so that training, prefill and decoding need not know of it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adalink import AdaptedModel
from adalink.errors import ConfigError
from adalink.tokens import IMAGE

__all__ = ["HostForm", "HostInputs", "VectorForm", "give_inputs"]


@dataclass(frozen=True, kw_only=True)
class VectorForm:
    """How a model's `get_image_features` hands its vectors on.

    output  its class
    field   which of its fields the model's call reads: `last_hidden_state` where `pooler_output` is empty (Llama 4 projects it in the call)
    nested  whether that field is a list with a tensor for each image; else it is one tensor
    each    how many vectors each entry of that tensor has, where it has three dimensions; 0 where it has two
    width   D of a vector; deep features come after it, as many again for each layer that takes them
    n_deep  how many layers take deep features (Qwen3-VL)
    """

    output: Any
    field: str
    nested: bool
    each: int
    width: int
    n_deep: int

    @property
    def whole_width(self) -> int:
        """W: of a vector with its deep features."""
        return self.width * (1 + self.n_deep)

    @staticmethod
    def of(output: Any) -> VectorForm:
        """Read from what the model gave for some images. Raises ConfigError where that holds no vectors for image tokens (Granite 4 Vision)."""
        field = next((name for name in ("pooler_output", "last_hidden_state") if getattr(output, name, None) is not None), None)
        if field is None:
            raise ConfigError(
                f"the image's features of this model, a {type(output).__name__}, have neither pooler_output nor last_hidden_state, so no vector belongs to an "
                "image token: adapt it with adalink.get_adalink_model and a loop of your own"
            )
        pooled = getattr(output, field)
        nested = isinstance(pooled, (list, tuple))
        first = pooled[0] if nested else pooled
        deep = getattr(output, "deepstack_features", None)
        each = 0 if nested or first.ndim == 2 else int(first.shape[-2])
        return VectorForm(output=type(output), field=field, nested=nested, each=each, width=int(first.shape[-1]), n_deep=0 if deep is None else len(deep))

    def vectors(self, output: Any) -> Tensor:
        """float [n, W]: all vectors in order, deep features beside each."""
        parts = [getattr(output, self.field), *(getattr(output, "deepstack_features", None) or ())]
        return torch.cat([_flat(part) for part in parts], -1)

    def given(self, vectors: Tensor) -> Any:
        """What the model takes in the place of its own output; vectors: float [n, W]."""
        parts = vectors.split(self.width, -1)
        formed = [[part] if self.nested else self._shaped(part) for part in parts]
        needed = {one.name: None for one in fields(self.output) if one.default is MISSING and one.default_factory is MISSING}  # of the tower alone
        return self.output(**{**needed, self.field: formed[0]}, **({"deepstack_features": formed[1:]} if self.n_deep else {}))

    def _shaped(self, part: Tensor) -> Tensor:
        if not self.each:
            return part
        n = self.each if len(part) % self.each == 0 else len(part)  # a piece of a prompt may end inside an image
        return part.reshape(-1, n, self.width) if len(part) else part[None]


def _flat(part: Any) -> Tensor:
    whole = torch.cat([_flat(one) for one in part]) if isinstance(part, (list, tuple)) else part
    return whole.reshape(-1, whole.shape[-1])


@dataclass(frozen=True, kw_only=True)
class HostInputs:
    """What belongs to the tokens of a batch's rows; see `adalink.TokenMap.host`.

    vectors   float [V, W]      of all images of the batch; None once prompts are over
    vector    int64 [B, T]      which of them a token takes, -1 for none
    rope      int64 [3, B, T]   positions in time, height and width; None where the model counts tokens
    shift     int64 [B]         what is added to a later token's own count, where images take fewer positions than tokens
    kind      int64 [B, T]      the processor's token type ids, for a model whose attention masks ask for them
    """

    vectors: Tensor | None = None
    vector: Tensor | None = None
    kind: Tensor | None = None
    rope: Tensor | None = None
    shift: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether a gradient reaches the images' vectors."""
        return self.vectors is not None and self.vectors.requires_grad

    def cut(self, rows: Tensor, length: int) -> HostInputs:
        """Of some rows the first `length` tokens."""
        return replace(
            self,
            vector=None if self.vector is None else self.vector[rows, :length],
            kind=None if self.kind is None else self.kind[rows, :length],
            rope=None if self.rope is None else self.rope[:, rows, :length],
            shift=None if self.shift is None else self.shift[rows],
        )

    def after(self, rows: Tensor | None = None) -> HostInputs:
        """Of some rows (all, where none are named) what tokens after the prompt need."""
        return HostInputs(shift=self.shift if self.shift is None or rows is None else self.shift[rows])

    def beside(self, other: HostInputs | None) -> HostInputs:
        """The rows of two batches whose prompts are over."""
        if self.shift is None or other is None or other.shift is None:
            return HostInputs()
        return HostInputs(shift=torch.cat([self.shift, other.shift]))

    def positions(self, start: int, end: int, mask: Tensor | None, rows: int) -> Tensor | None:
        """int64 [3, rows, end - start]: of the call's tokens; None where the model counts itself. mask: int64 [rows, end], 1 for tokens."""
        if self.shift is None:
            return None
        prompt = 0 if self.rope is None else self.rope.shape[2]
        shift = self.shift.repeat_interleave(rows // len(self.shift), 0)
        counted = torch.arange(end, device=shift.device).expand(rows, end) if mask is None else mask[:, :end].long().cumsum(1) - 1
        later = (counted[:, prompt:] + shift[:, None]).clamp(min=0).expand(3, -1, -1)
        if self.rope is None:
            return later[:, :, start:]
        known = self.rope.repeat_interleave(rows // self.rope.shape[1], 1)
        return torch.cat([known, later], 2)[:, :, start:end]

    def taken(self, start: int, end: int, rows: int) -> Tensor | None:
        """float [n, W]: the vectors of the call's image tokens, row by row; None where there are none."""
        if self.vectors is None or self.vector is None or start >= self.vector.shape[1]:
            return None
        index = self.vector[:, start:end].repeat_interleave(rows // len(self.vector), 0)
        found = self.vectors[index[index >= 0]]
        return found if len(found) else None


@dataclass(frozen=True, kw_only=True)
class HostForm:
    """How a model is given what belongs to its tokens.

    vectors       see VectorForm
    kind          the name of its argument for token types; empty where it has none
    written_kind  the type of tokens that it writes
    needs_images  whether it runs only where it is given an image's output; it then gets an empty one where there is no image (BLIP-2)
    """

    vectors: VectorForm
    kind: str = ""
    written_kind: int = 0
    needs_images: bool = False


def give_inputs(adapted: AdaptedModel, form: HostForm) -> None:
    """From now on a bound call of the base gets what its token map's `host` holds for its tokens."""
    adapted.base.register_forward_pre_hook(partial(_give, adapted, form), with_kwargs=True)


def _give(
    adapted: AdaptedModel, form: HostForm, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    token_map = adapted.attachment.map
    if token_map is None or not (isinstance(token_map.host, HostInputs) or form.needs_images):
        return None
    host = token_map.host if isinstance(token_map.host, HostInputs) else HostInputs()
    ids, cache, mask = kwargs["input_ids"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
    rows, length = ids.shape
    start = int(cache.get_seq_length()) if cache is not None else 0
    given: dict[str, Any] = {}
    taken = host.taken(start, start + length, rows) if IMAGE in token_map.present else None
    if taken is None and form.needs_images:
        taken = torch.zeros(0, form.vectors.whole_width, dtype=next(base.parameters()).dtype, device=ids.device)
    if form.needs_images:
        given["pixel_values"] = None
        if mask is None:  # it would count the call's tokens alone, and not those of the cache
            given["attention_mask"] = torch.ones(rows, start + length, dtype=torch.int64, device=ids.device)
    if taken is not None:
        given["mm_encoder_outputs"] = {"image": form.vectors.given(taken)}
    places = host.positions(start, start + length, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None, rows)
    if places is not None:
        given["position_ids"] = places
    if form.kind and host.kind is not None and start < host.kind.shape[1]:
        # Of the tokens in the cache too: masks are made over all keys.
        kind, n_written = host.kind[:, : start + length], max(start + length - host.kind.shape[1], 0)
        given[form.kind] = nn.functional.pad(kind, (0, n_written), value=form.written_kind).repeat_interleave(rows // len(kind), 0)
    return args, {**kwargs, **given}
