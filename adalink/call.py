"""One call of a frozen model on plain ids: what its tokens are, and its arguments with the slots of every row's adapter in them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Slots
from adalink.errors import ConfigError
from adalink.existing import NO_LABEL, domains, is_encoder_decoder, padding_mask, placeholder_id, positions
from adalink.reserve import Reserved
from adalink.stack_slots import PER_TOKEN, slots_inside
from adalink.tokens import ANSWER, TEXT, TokenMap

__all__ = ["Call", "Rows", "given_ids", "n_choices"]

NOT_WITH_SLOTS = ("inputs_embeds", "past_key_values", "cache_position", "logits_to_keep")


@dataclass(frozen=True)
class Rows:
    """The adapters of a batch's rows: int64 [B] for the edits, and the slots that each row's adapter reserves."""

    row: Tensor
    slots: tuple[tuple[Slots, ...], ...]
    serving: frozenset[int]

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
    """

    token_map: TokenMap
    arguments: Mapping[str, Any]
    reserved: Reserved | None = None
    writes_apart: bool = False
    inside: Mapping[str, Tensor] | None = None

    @staticmethod
    def make(
        model: nn.Module, anatomy: Anatomy, arguments: Mapping[str, Any], rows: Rows, image_ids: Sequence[int], side: Literal["left", "right"]
    ) -> Call:
        """The call of a model on `arguments`, with input_ids int64 [B, T], or [B, C, T] where each of B has C choices: then rows are B * C.

        `side` is where rows with fewer slots are filled up: right to be read, left to be continued. Raises ConfigError for arguments
        that do not tell what the tokens are, or that slots cannot be put into.
        """
        _check_continued(arguments)
        ids, has_words, writes_apart = _flat(given_ids(arguments, image_ids)), _has_words(model), is_encoder_decoder(model)
        is_written = has_words and not writes_apart and (anatomy.attention == "causal" or hasattr(model, "generate"))  # elsewhere a label only marks
        flat = {name: _flat(value) for name, value in arguments.items()}
        domain, present = domains(model, ids, flat if is_written else {**flat, "labels": None}, image_ids)
        plain = TokenMap(domain, rows.row, present=present, serving=rows.serving)
        if not rows.has_slots:
            return Call(plain, arguments)
        _check_one_reader(model, arguments, has_words, writes_apart)
        inside = not (writes_apart or has_words or image_ids)
        _check_slots_fit(arguments, arguments.get("input_ids", ids), writes_apart or inside)
        mask = flat.get("attention_mask")
        if mask is None:
            mask = padding_mask(model, ids, arguments.get("pad_token_id")) if side == "left" else torch.ones_like(ids)
        reserved, placeholder = Reserved(mask, rows.slots, "right" if writes_apart else side), placeholder_id(model, image_ids)
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
        return Call(token_map, {**arguments, **changed}, reserved, writes_apart)

    @staticmethod
    def of_writer(domain: Tensor, arguments: Mapping[str, Any], rows: Rows) -> Call:
        """The call of a model that reads an image alone, with the domains of what its decoder writes. Raises ConfigError for slots."""
        if rows.has_slots:
            raise ConfigError(
                "an adapter of this batch puts slots into its rows, and this model's rows are what it writes itself: use an adapter without slots"
            )
        return Call(TokenMap(domain, rows.row, present=frozenset({TEXT, ANSWER}), serving=rows.serving), arguments)

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
                setattr(output, name, self.reserved.own(value))
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
    """int64 [B, T]: `input_ids`; of a model that knows no pictures, `inputs_embeds` [B, T, D] tell as much. Raises ConfigError."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids
    if isinstance(embeds, Tensor) and not image_ids:
        return embeds.new_zeros(embeds.shape[:2], dtype=torch.int64)
    raise ConfigError(
        "this model's tokens cannot be told apart without input_ids"
        + (" (embeddings do not say which of them are a picture's)" if image_ids else "")
        + ": pass input_ids, or a token_map that says what the tokens are"
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
