"""One call of a frozen model on plain ids: what its tokens are, and its arguments with the slots of every row's adapter in them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.attachment.existing import NO_LABEL, domains, is_encoder_decoder, padding_mask, placeholder_id, positions
from adalink.edit import SLOT_PLACES, Slots
from adalink.errors import ConfigError
from adalink.tokens import ANSWER, IMAGE, PAD, PERCEPT, TEXT, TokenMap, uploaded

__all__ = ["PER_TOKEN", "Call", "Reserved", "Route", "Rows", "given_ids", "n_choices", "slots_inside"]


# ----------------------------------------
# Slots of each row's own adapter, put into a batch of plain ids: rows served by other adapters have others, or none.


class Reserved:
    """Where slots and tokens of a batch are once every row has the slots of its own adapter.

    Slots come right before a row's first real token, after its padding; before its first word, after its images; or after its prompt, before its
    answer. Rows with fewer slots are filled up on the right to be read (each then has the positions that it has alone), on the left to
    generate (where the next token must follow the last one).

        mask [0 1 1], 1 slot S;  mask [1 1 1], 2 slots      left:  [. . S a b]  [S S a b c]
                                                            right: [. S a b .]  [S S a b c]
    """

    def __init__(self, mask: Tensor, slots: Sequence[Sequence[Slots]], side: Literal["left", "right"], domain: Tensor | None = None) -> None:
        """`mask`: int64 [B, T], 1 where a token is real; `slots`: what the adapter of each row reserves; `domain`: int64 [B, T], None: all is prompt."""
        kinds = [[slot for slot in row for _ in range(slot.count)] for row in slots]
        if any(slot.domain in (IMAGE, PERCEPT) for row in kinds for slot in row):
            raise ConfigError(
                "an adapter with a bridge or with percepts needs images, and plain ids bring none: use a model composed with a vision tower, "
                "or pass a token_map"
            )
        n_slots = max((len(row) for row in kinds), default=0)
        device = mask.device
        self.n_tokens, self.n_slots = mask.shape[1], n_slots
        self.domains = uploaded([[slot.domain for slot in row] + [PAD] * (n_slots - len(row)) for row in kinds], device)
        self.count = uploaded([[len(row)] for row in kinds], device)
        starts = _starts(mask, domain)
        # [B, S]: the column that each slot comes before. No slot, the filler, comes after everything.
        after = len(SLOT_PLACES)
        which = uploaded([[SLOT_PLACES.index(slot.place) for slot in row] + [after] * (n_slots - len(row)) for row in kinds], device)
        before = nn.functional.pad(starts, (0, 1), value=self.n_tokens).gather(1, which) if n_slots else which
        own, filled = torch.arange(self.n_tokens, device=device), n_slots - self.count if side == "left" else 0
        self.place = own + filled + (before[:, :, None] <= own).sum(1)
        is_slot = torch.arange(n_slots, device=device) < self.count
        whole = self.n_tokens + n_slots
        at = torch.where(is_slot, before + filled + torch.arange(n_slots, device=device), whole)  # the filler beyond the row, where it is cut off
        empty = torch.full((len(mask), whole + 1), -1, device=device)
        self.ordinal = empty.scatter(1, at, torch.arange(n_slots, device=device).expand_as(at))[:, :whole]
        column = empty.scatter(1, self.place, own.expand_as(self.place))[:, :whole]
        self.is_slot, self.is_token, self.column = self.ordinal >= 0, column >= 0, column.clamp(min=0)
        self.first, self.before = starts[:, :1], before
        # Of the last token of a prompt that slots come after, the last of them says what follows it.
        self.next_place = self.place + torch.where(starts[:, -1:] == own + 1, (which == after - 1).sum(1, keepdim=True), 0)

    def widened(self, value: Tensor, slot: int | Tensor, padding: int) -> Tensor:
        """[B, T] -> [B, T + S]: `slot` (one value, or [B, T + S]) at the slots, `padding` where a row was filled up."""
        moved = torch.take_along_dim(value, self.column, 1)
        filler = torch.where(self.is_slot, torch.as_tensor(slot, dtype=value.dtype, device=value.device), padding)
        return torch.where(self.is_token, moved, filler.to(value.dtype))

    def widened_domains(self, domain: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T + S]: the slots have their own domains."""
        if not self.n_slots:
            return domain
        return self.widened(domain, torch.take_along_dim(self.domains, self.ordinal.clamp(min=0), 1), PAD)

    def widened_positions(self, position: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T + S]: a slot takes the position of the token that it comes before, and what follows moves on."""
        if not self.n_slots:
            return position
        own = torch.arange(self.n_tokens, device=position.device)
        n_before = (self.before[:, :, None] <= own).sum(1)
        # After the last token a slot takes the next position; before the first there is none to go on from.
        is_first = self.before <= self.first
        start = torch.take_along_dim(position, torch.where(is_first, self.first.clamp(max=self.n_tokens - 1), self.before.clamp(max=self.n_tokens) - 1), 1)
        slots = start + torch.where(is_first, 0, 1) + torch.arange(self.n_slots, device=position.device)
        return self.widened(position + n_before, torch.take_along_dim(slots, self.ordinal.clamp(min=0), 1), 0)

    def own(self, value: Tensor, *, following: bool = False) -> Tensor:
        """[B, T + S, ...] -> [B, T, ...]: what stands at the row's own tokens; with beams B is a multiple of the rows.

        following: at the last token of a prompt that slots come after, what stands at the last of these.
        """
        place = (self.next_place if following else self.place).to(value.device)
        place = place.repeat_interleave(len(value) // len(place), 0)
        return torch.take_along_dim(value, place.view(*place.shape, *[1] * (value.ndim - 2)), 1)


def _starts(mask: Tensor, domain: Tensor | None) -> Tensor:
    """int64 [B, 3], in the order of SLOT_PLACES: the first real token, the first after the images, and the first of the answer (or of the end)."""
    n_tokens, own = mask.shape[1], torch.arange(mask.shape[1], device=mask.device)
    first = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    end = n_tokens - (mask.flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    if domain is None:
        return torch.cat([first, first, torch.maximum(first, end)], 1)
    after_images = torch.where(domain == IMAGE, own + 1, 0).amax(1, keepdim=True)
    answer = torch.where(domain == ANSWER, own, n_tokens).amin(1, keepdim=True)
    end = torch.maximum(first, torch.minimum(answer, end))
    return torch.cat([first, torch.minimum(torch.maximum(first, after_images), end), end], 1)


# ----------------------------------------
# Slots that are put into the rows on the way into the stack, and taken out on the way out of it, so that what stands above never meets them.
#
# A head that pools the first token (BERT), averages all (ModernBERT) or looks for the last (GPT-2), its labels and its loss are then as
# they are without an adapter.


# Values that a model takes for each token: what a slot has, and what fills a row up.
PER_TOKEN = {"attention_mask": (1, 0), "token_type_ids": (0, 0), "mm_token_type_ids": (0, 0)}
_current: ContextVar[Reserved | None] = ContextVar("reserved", default=None)


@contextlib.contextmanager
def slots_inside(model: nn.Module, anatomy: Anatomy, reserved: Reserved, arguments: Mapping[str, Tensor]) -> Iterator[None]:
    """For the calls of this thread inside the block: the stack reads the widened `arguments` (input_ids, attention_mask, ...) and gives own tokens.

    An encoder gives them where its layers end, before anything pools them; a decoder where the stack ends.
    """
    stack = model.get_submodule(anatomy.stack)
    beside = anatomy.layers[0].rpartition(".")[0].rpartition(".")[0]
    ends = [stack.get_submodule(beside), stack] if anatomy.attention == "bidirectional" and beside else [stack]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _current.get() is not reserved:  # another thread's call
            return None
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return (), {**dict(zip(names, args, strict=False)), **kwargs, **_widened(reserved, kwargs, arguments)}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _own(reserved, output) if _current.get() is reserved else output

    token = _current.set(reserved)
    handles = [stack.register_forward_pre_hook(enter, prepend=True, with_kwargs=True), *(end.register_forward_hook(leave) for end in ends)]
    try:
        yield
    finally:
        _current.reset(token)
        for handle in handles:
            handle.remove()


def _widened(reserved: Reserved, kwargs: Mapping[str, Any], arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the stack is given for each token, with the slots in it."""
    changed = dict(arguments)
    for name, (slot, padding) in PER_TOKEN.items():
        if name not in changed and isinstance(kwargs.get(name), Tensor):
            changed[name] = reserved.widened(kwargs[name], slot, padding)
    if "position_ids" not in changed and isinstance(kwargs.get("position_ids"), Tensor):
        changed["position_ids"] = reserved.widened_positions(kwargs["position_ids"])
    return changed


def _own(reserved: Reserved, output: Any) -> Any:
    """Every [B, T + S, D] in an output without its slots."""
    if isinstance(output, Tensor):
        return reserved.own(output) if output.ndim == 3 and output.shape[1] == reserved.n_tokens + reserved.n_slots else output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name, value in output.items():
            output[name] = _own(reserved, value)
        return output
    return tuple(_own(reserved, value) for value in output) if type(output) is tuple else output


NOT_WITH_SLOTS = ("inputs_embeds", "past_key_values", "cache_position", "logits_to_keep")


class Route(str):
    """The name of the adapter that serves a row, which is a name like any other, and why.

    weights   adapter -> its weight; one of 1.0 where one adapter serves, none where the frozen model does
    cosine    to the nearest example that a router knows
    margin    how far the best adapter is ahead of the next (`adalink.lifecycle.route`)
    """

    __slots__ = ("cosine", "margin", "weights")
    weights: Mapping[str, float]
    cosine: float
    margin: float

    def __new__(cls, name: str, weights: Mapping[str, float], *, cosine: float = 1.0, margin: float = 1.0) -> Self:
        made = super().__new__(cls, name)
        made.weights, made.cosine, made.margin = dict(weights), cosine, margin
        return made


@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows: int64 [B] for the edits, the same for the host, those that serve a row, and the slots that each reserves.

    weights   as in TokenMap
    """

    row: Tensor
    indices: tuple[int, ...]
    serving: frozenset[int]
    slots: tuple[tuple[Slots, ...], ...]
    weights: Tensor | None = None

    @property
    def has_slots(self) -> bool:
        """Whether any row needs positions of its adapter's own."""
        return any(slot.count for slots in self.slots for slot in slots)


@dataclass(frozen=True)
class Call:
    """A token map, and the arguments that fit it.

    reserved      None where no row has slots, and arguments and results are the caller's own
    writes_apart  an encoder-decoder model: labels, logits and generated ids are not for the tokens that the edits see
    inside        what the stack is given in place of the caller's own, where the slots never leave the stack; None where the whole model has them
    predicts      whether a token's logits say what follows it: those of a prompt's last token are then those of the last slot after it
    """

    token_map: TokenMap
    arguments: Mapping[str, Any]
    reserved: Reserved | None = None
    writes_apart: bool = False
    inside: Mapping[str, Tensor] | None = None
    predicts: bool = False

    @staticmethod
    def make(
        model: nn.Module, anatomy: Anatomy, arguments: Mapping[str, Any], rows: Rows, image_ids: Sequence[int], side: Literal["left", "right"]
    ) -> Call:
        """The call of a model on `arguments`, with input_ids int64 [B, T], or [B, C, T] where each of B has C choices: then rows are B * C.

        `side` is where rows with fewer slots are filled up: right to be read, left to be continued. Raises ConfigError for arguments
        that do not determine the domain of each token, or that slots cannot be put into.
        """
        _check_continued(arguments)
        ids, has_words, writes_apart = _flat(given_ids(arguments, image_ids)), _has_words(model), is_encoder_decoder(model)
        is_written = has_words and not writes_apart and (anatomy.attention == "causal" or hasattr(model, "generate"))  # elsewhere a label only marks
        flat = {name: _flat(value) for name, value in arguments.items()}
        domain, present = domains(model, ids, flat if is_written else {**flat, "labels": None}, image_ids)
        plain = TokenMap(domain, rows.row, present=present, serving=rows.serving, indices=rows.indices, weights=rows.weights)
        if not rows.has_slots:
            return Call(plain, arguments)
        _check_one_reader(model, arguments, has_words, writes_apart)
        inside = not (writes_apart or has_words or image_ids)
        _check_slots_fit(arguments, arguments.get("input_ids", ids), writes_apart or inside)
        mask = flat.get("attention_mask")
        if mask is None:
            mask = padding_mask(model, ids, arguments.get("pad_token_id")) if side == "left" else torch.ones_like(ids)
        reserved = Reserved(mask, rows.slots, "right" if writes_apart else side, domain)
        placeholder = placeholder_id(model, image_ids)
        changed = {"input_ids": reserved.widened(ids, placeholder, placeholder), "attention_mask": reserved.widened(mask, 1, 0)}
        for name, (slot, padding) in {**PER_TOKEN, **({} if writes_apart or inside else {"labels": (NO_LABEL, NO_LABEL)})}.items():
            if name not in changed and arguments.get(name) is not None:
                changed[name] = reserved.widened(flat[name], slot, padding)
        if arguments.get("position_ids") is not None:
            changed["position_ids"] = reserved.widened_positions(flat["position_ids"])
        elif side == "right" and not writes_apart and (has_words or anatomy.attention == "causal"):
            found = positions(model, changed["input_ids"], changed["attention_mask"])
            changed |= {} if found is None else {"position_ids": found}
        here = {slot.domain for slots in rows.slots for slot in slots}
        token_map = dataclasses.replace(plain, domain=reserved.widened_domains(plain.domain), present=plain.present | here)
        if inside:
            return Call(token_map, arguments, reserved, inside=changed)
        for name in ("max_length", "min_length"):  # of transformers' generation, which counts the prompt
            if arguments.get(name) is not None and not writes_apart:
                changed[name] = arguments[name] + reserved.n_slots
        return Call(token_map, {**arguments, **changed}, reserved, writes_apart, predicts=anatomy.attention == "causal")

    @staticmethod
    def of_writer(domain: Tensor, arguments: Mapping[str, Any], rows: Rows) -> Call:
        """The call of a model that reads an image alone, with the domains of what its decoder writes. Raises ConfigError for slots."""
        if rows.has_slots:
            raise ConfigError(
                "an adapter of this batch puts slots into its rows, and this model's rows are what it writes itself: use an adapter without slots"
            )
        return Call(TokenMap(domain, rows.row, present=frozenset({TEXT, ANSWER}), serving=rows.serving, indices=rows.indices, weights=rows.weights), arguments)

    @contextlib.contextmanager
    def around(self, model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
        """Where the model runs: with the slots inside its stack, if that is where they are."""
        if self.inside is None or self.reserved is None:
            yield
        else:
            with slots_inside(model, anatomy, self.reserved, self.inside):
                yield

    def own_output(self, output: Any) -> Any:
        """The model's output with the logits (of a bare model: the last hidden states) of the caller's own tokens, [B, T, ...].

        What else it holds is for all positions. What a model pools from its first token is taken from a slot, and is left out.
        """
        if self.reserved is None or self.writes_apart or self.inside is not None:
            return output
        for name in ("logits", "last_hidden_state"):
            value = getattr(output, name, None)
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == self.reserved.n_tokens + self.reserved.n_slots:
                setattr(output, name, self.reserved.own(value, following=self.predicts and name == "logits"))
        if getattr(output, "pooler_output", None) is not None:
            output.pooler_output = None
        return output

    def own_ids(self, generated: Any) -> Any:
        """What transformers' generation gave, with the caller's own prompt before it: no slots."""
        if self.reserved is None or self.writes_apart:
            return generated
        if not isinstance(generated, Tensor):  # return_dict_in_generate
            generated.sequences = self.own_ids(generated.sequences)
            return generated
        prompt = self.reserved.own(generated[:, : self.reserved.n_tokens + self.reserved.n_slots])
        return torch.cat([prompt, generated[:, self.reserved.n_tokens + self.reserved.n_slots :]], 1)


def given_ids(arguments: Mapping[str, Any], image_ids: Sequence[int]) -> Tensor:
    """int64 [B, T]: `input_ids`; of a model without images, `inputs_embeds` [B, T, D] are enough. Raises ConfigError."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids
    if isinstance(embeds, Tensor) and not image_ids:
        return embeds.new_zeros(embeds.shape[:2], dtype=torch.int64)
    raise ConfigError(
        "the domains of this model's tokens are unknown without input_ids"
        + (" (embeddings do not mark which of them are an image's)" if image_ids else "")
        + ": pass input_ids, or a token_map with the domain of each token"
    )


def n_choices(arguments: Mapping[str, Any]) -> int:
    """C of input_ids [B, C, T]; 1 of others."""
    ids = arguments.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 3 else 1


def _flat(value: Any) -> Any:
    """[B, C, T] -> [B * C, T], as models with several choices make it."""
    return value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim == 3 and not value.is_floating_point() else value


def _check_one_reader(model: nn.Module, arguments: Mapping[str, Any], has_words: bool, writes_apart: bool) -> None:
    """Raise ConfigError for an encoder-decoder model whose decoder, or whose head, reads input_ids, where there would be slots."""
    is_bare = getattr(model, "base_model", model) is model
    if writes_apart and not has_words and not (is_bare and arguments.get("decoder_input_ids") is not None):
        raise ConfigError(
            f"{type(model).__name__} reads its input ids in its decoder too, and an adapter of this batch puts slots into its encoder's rows alone: "
            "use an adapter without slots (AdaLink, LoRA, Bottleneck, ...)"
        )


def _has_words(model: nn.Module) -> bool:
    """Whether a head gives a score to each word of the vocabulary; others classify, or there is none."""
    read = getattr(model, "get_output_embeddings", None)
    return hasattr(model, "generate") or (callable(read) and read() is not None)


def _check_continued(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for several tokens after a cache: are they a prompt's second part, or an answer's?"""
    cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
    if cache is not None and isinstance(ids, Tensor) and ids.shape[1] > 1 and int(cache.get_seq_length()) > 0:
        raise ConfigError(
            f"{ids.shape[1]} tokens were given after {int(cache.get_seq_length())} cached ones, and nothing says what they are: "
            "pass one token at a time (a generated one), or a token_map of the whole prompt"
        )


def _check_slots_fit(arguments: Mapping[str, Any], ids: Tensor, has_own_labels: bool) -> None:
    """Raise ConfigError for an argument that says something of each token, and that slots cannot be put into."""
    wrong = [name for name in NOT_WITH_SLOTS if arguments.get(name) is not None] + ["return_dict=False"] * (arguments.get("return_dict") is False)
    for name, value in arguments.items():
        is_known = name in ("input_ids", "position_ids", "labels", *PER_TOKEN)
        if isinstance(value, Tensor) and value.ndim > 1 and name not in wrong:
            is_apart = has_own_labels and (name.startswith("decoder_") or name == "labels")
            if not is_apart and (value.shape != ids.shape if is_known else value.shape[:2] == ids.shape[:2]):
                wrong.append(name)
    if wrong:
        raise ConfigError(
            f"an adapter of this batch puts slots into its rows, and {', '.join(wrong)} cannot be made to fit them: leave that out, "
            "or pass input_ids that hold the slots, with a token_map that says where"
        )
