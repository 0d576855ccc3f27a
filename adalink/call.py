"""One call of a frozen model on plain ids: what its tokens are, and its arguments with the slots of every row's adapter in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.edit import Slots
from adalink.errors import ConfigError
from adalink.existing import NO_LABEL, domains, is_encoder_decoder, padding_mask, placeholder_id, positions
from adalink.reserve import Reserved
from adalink.tokens import ANSWER, IMAGE, TEXT, TokenMap

__all__ = ["Call", "Rows", "given_ids"]

# Values that a model takes for each token: what a slot has, and what fills a row up.
PER_TOKEN = {"attention_mask": (1, 0), "labels": (NO_LABEL, NO_LABEL), "token_type_ids": (0, 0), "mm_token_type_ids": (0, 0)}
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
    """A token map, and the arguments that fit it."""

    token_map: TokenMap
    arguments: Mapping[str, Any]
    reserved: Reserved | None = None  # None where no row has slots, and arguments and results are the caller's own
    writes_apart: bool = False  # an encoder-decoder model: labels, logits and generated ids are not for the tokens that the edits see

    @staticmethod
    def make(
        model: nn.Module, ids: Tensor, arguments: Mapping[str, Any], rows: Rows, image_ids: Sequence[int], side: Literal["left", "right"]
    ) -> Call:
        """The call of a model on `arguments`, among them the tokens `ids`, int64 [B, T].

        `side` is where rows with fewer slots are filled up: right to be read, left to be continued. Raises ConfigError for arguments
        that do not tell what the tokens are, or that slots cannot be put into.
        """
        _check_continued(arguments)
        writes_apart = is_encoder_decoder(model)
        mask = arguments.get("attention_mask")
        labels = arguments.get("labels")
        is_answer = labels if labels is not None and not writes_apart and labels.shape == ids.shape else None
        domain = domains(ids, mask if mask is not None and mask.ndim == 2 and mask.shape == ids.shape else None, is_answer, image_ids)
        present = frozenset({TEXT}) | ({ANSWER} if is_answer is not None else set()) | ({IMAGE} if image_ids else set())
        plain = TokenMap(domain, rows.row, present=present, serving=rows.serving)
        if not rows.has_slots:
            return Call(plain, arguments)
        _check_slots_fit(arguments, ids, writes_apart)
        if mask is None:
            mask = padding_mask(model, ids, arguments.get("pad_token_id")) if side == "left" else torch.ones_like(ids)
        reserved, placeholder = Reserved(mask, rows.slots, "right" if writes_apart else side), placeholder_id(model, image_ids)
        changed = {"input_ids": reserved.widened(ids, placeholder, placeholder), "attention_mask": reserved.widened(mask, 1, 0)}
        for name, (slot, padding) in PER_TOKEN.items():
            if name not in changed and arguments.get(name) is not None and not (writes_apart and name == "labels"):
                changed[name] = reserved.widened(arguments[name], slot, padding)
        if arguments.get("position_ids") is not None:
            changed["position_ids"] = reserved.widened_positions(arguments["position_ids"])
        elif side == "right" and not writes_apart and (found := positions(model, changed["input_ids"], changed["attention_mask"])) is not None:
            changed["position_ids"] = found
        for name in ("max_length", "min_length"):  # of transformers' generation, which counts the prompt
            if arguments.get(name) is not None and not writes_apart:
                changed[name] = arguments[name] + reserved.n_slots
        here = {slot.domain for slots in rows.slots for slot in slots}
        token_map = dataclasses.replace(plain, domain=reserved.widened_domains(domain), present=present | here)
        return Call(token_map, {**arguments, **changed}, reserved, writes_apart)

    def own_output(self, output: Any) -> Any:
        """The model's output with the logits (of a bare model: the last hidden states) of the caller's own tokens, [B, T, ...].

        What else it holds is for all positions. What a model pools from its first token is taken from a slot, and is left out.
        Raises ConfigError where that is all it gives.
        """
        if self.reserved is None or self.writes_apart:
            return output
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 2:
            raise ConfigError(
                f"this model gives one result for each row, {tuple(logits.shape)}, from its first token, which is now a slot of an adapter: "
                "use an adapter without slots, or the bare model and its last hidden states"
            )
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


def _check_continued(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for several tokens after a cache: are they a prompt's second part, or an answer's?"""
    cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
    if cache is not None and isinstance(ids, Tensor) and ids.shape[1] > 1 and int(cache.get_seq_length()) > 0:
        raise ConfigError(
            f"{ids.shape[1]} tokens were given after {int(cache.get_seq_length())} cached ones, and nothing says what they are: "
            "pass one token at a time (a generated one), or a token_map of the whole prompt"
        )


def _check_slots_fit(arguments: Mapping[str, Any], ids: Tensor, writes_apart: bool) -> None:
    """Raise ConfigError for an argument that says something of each token, and that slots cannot be put into."""
    wrong = [name for name in NOT_WITH_SLOTS if arguments.get(name) is not None] + ["return_dict=False"] * (arguments.get("return_dict") is False)
    for name, value in arguments.items():
        is_known = name in ("input_ids", "position_ids", *PER_TOKEN)
        if isinstance(value, Tensor) and value.ndim > 1 and name not in wrong:
            is_per_token = value.shape[:2] == ids.shape and not (writes_apart and (name.startswith("decoder_") or name == "labels"))
            if (is_per_token and not is_known) or (is_known and value.shape != ids.shape and not (writes_apart and name == "labels")):
                wrong.append(name)
    if wrong:
        raise ConfigError(
            f"an adapter of this batch puts slots into its rows, and {', '.join(wrong)} cannot be made to fit them: leave that out, "
            "or pass input_ids that hold the slots, with a token_map that says where"
        )
