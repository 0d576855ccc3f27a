"""One file of fixtures/adalink, or one made in the same form: the model, its images and the adapters that the file holds.

A file may be of text alone or of text and images. Images are vectors that a projector of the file brings to the model's width, or that have
it already; they stand before the text, or in place of tokens that the file marks. Everything is read from the tensors' names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from double import InDouble, rounded_frequencies
from fixture_file import FixtureFile
from hosts import host
from torch import Tensor, nn

from adalink import ANSWER, IMAGE, PAD, TEXT, AdaLink, Adapter, Anatomy, Bridge, InputSpec, Method, TokenMap

OF_THE_MODEL = ("transformer.", "model.", "lm_head.", "shared.", "encoder.", "decoder.")
LINEAR = re.compile(r"\.((?:\d+\.)?(?:weight|bias))$")
EDIT = re.compile(r"^(?:adalink\.)?(?:(.+)\.)?((?:down|up)\.(?:weight|bias))$")
MODALITIES = ("image", "text")


@dataclass(frozen=True)
class Case(FixtureFile):
    """The model, its images and its adapters."""

    def runs(self) -> list[tuple[str, str]]:
        """(variant, scope) of every result with a loss."""
        return runs_in(self.tensors)

    def model(self) -> Any:
        weights = {name: value for name, value in self.under("w.").items() if name.startswith(OF_THE_MODEL)}
        model = host(self.spec["config"], weights)
        if self.rounds:
            rounded_frequencies(model)
        return model

    @cached_property
    def rounds(self) -> bool:
        """Whether rotary frequencies are rounded to float32, as some files were made: found out by `fit`."""
        return False

    def fit(self, difference: Callable[[], Tensor]) -> None:
        """Take exact frequencies or rounded ones, whichever make the difference from the file the smaller."""
        off = []
        for rounds in (False, True):
            self.__dict__["rounds"] = rounds
            with InDouble(), torch.no_grad():
                off.append(difference().abs().max())
        self.__dict__["rounds"] = bool(off[1] < off[0])

    @cached_property
    def images(self) -> Tensor | None:
        """[B, N, Dv]; None where the file is of text alone."""
        stated = re.compile("im|vis|pic|patch|feat")
        vectors = {name: value for name, value in self.under("in.").items() if value.ndim == 3 and value.is_floating_point()}
        found = {name: value for name, value in vectors.items() if stated.search(name) or "embed" not in name}  # others are those of the text
        width = next((value.shape[1] for name, value in self.projector.items() if value.ndim == 2), None)
        return max(found.items(), key=lambda item: (item[1].shape[2] == width, stated.search(item[0]) is not None))[1] if found else None

    @cached_property
    def projector(self) -> dict[str, Tensor]:
        """Official name -> tensor: the linears that are neither the model's nor an adapter's, under whatever name."""
        others = ("in.", "out.", "adalink.", *(f"{variant}." for variant in self.spec["variants"]))
        named = {name: value for name, value in self.tensors.items() if LINEAR.search(name) and not name.startswith(others)}
        return {name: value for name, value in named.items() if not name.removeprefix("w.").startswith(OF_THE_MODEL)}

    @property
    def is_bridged(self) -> bool:
        """Whether the projector is one linear, which is a bridge here."""
        return len([value for value in self.projector.values() if value.ndim == 2]) == 1

    def projected(self) -> Tensor:
        """[B, N, D]: what the projector makes of the images, in plain operations."""
        assert self.images is not None
        h, leaves = self.images, {LINEAR.search(name)[1]: value for name, value in self.projector.items()}  # type: ignore[index]
        steps = sorted({leaf.rpartition(".")[0] for leaf in leaves})
        for i, step in enumerate(steps):
            at = f"{step}." if step else ""
            h = nn.functional.linear(torch.nn.functional.gelu(h) if i else h, leaves[f"{at}weight"], leaves.get(f"{at}bias"))
        return h

    @property
    def length(self) -> int:
        """L: of the whole sequence, which is longer than the ids where images do not take the place of tokens."""
        return next(value.shape[1] for name, value in self.tensors.items() if name.endswith((".inputs_embeds", "base.logits")))

    def whole(self, name: str, at_pictures: int) -> Tensor:
        """One of the inputs [B, T] over the whole sequence [B, L]."""
        value = self.tensors[f"in.{name}"]
        if value.shape[1] == self.length:
            return value
        return value.new_full((len(value), self.length), at_pictures).masked_scatter(~self.is_image, value)

    @cached_property
    def is_image(self) -> Tensor:
        """bool [B, L]: as the file marks it, or by the token that stands for images; else they are before the text."""
        ids = self.tensors["in.input_ids"]
        if self.images is None:
            return torch.zeros(len(ids), self.length, dtype=torch.bool)
        marks = [value for name, value in self.under("in.").items() if value.shape == (len(ids), self.length) and re.search("im|vis|modal", name)]
        token = [value for name, value in self.spec["config"].items() if "image" in name and ("id" in name.split("_") or "index" in name.split("_"))]
        if marks or ids.shape[1] < self.length:
            return marks[0].bool() if marks else (torch.arange(self.length) < self.length - ids.shape[1]).expand(len(ids), -1)
        assert token, "the file does not say which tokens are images"
        return ids == token[0]

    def domain(self) -> Tensor:
        is_prompt = self.whole("prompt_mask", 1).bool()
        return torch.where(self.is_image, IMAGE, torch.where(is_prompt, TEXT, ANSWER)).masked_fill(self.whole("attention_mask", 1) == 0, PAD)

    def token_map(self, row: Tensor) -> TokenMap:
        return TokenMap(self.domain(), row, {} if self.images is None else {"image": self.images})

    def tasks(self) -> list[str]:
        """What adapters' names have beside their modality: "" first."""
        names = {EDIT.match(name)[1] for name in self.under("adalink.") if EDIT.match(name)}  # type: ignore[index]
        return sorted({_note(name)[1] for name in names})

    def adapter(self, model: nn.Module, task: str, variant: str, scope: str, modalities: tuple[str, ...]) -> Adapter:
        """One AdaLink for each modality, whose ranks may differ, and the projector as a bridge where it is one linear."""
        settings, methods, state = self.spec["variants"][variant], dict[str, Method](), dict[str, Tensor]()
        if self.is_bridged:
            bias = any(name.endswith("bias") for name in self.projector)
            methods["bridge"] = Bridge(kind="linear", norm="none", bias=bias)
            state |= {f"bridge.image.layers.1.{name.rpartition('.')[2]}": value for name, value in self.projector.items()}
        named = {name: EDIT.match(name).groups() for name in self.under("adalink.")}  # type: ignore[union-attr]
        served = {modality: task if (modality, task) in {_note(prefix) for prefix, _ in named.values()} else "" for modality in modalities}
        for name, value in self.under("adalink.").items():
            (modality, own), leaf = _note(named[name][0]), named[name][1]
            if own == served.get(modality) and (settings["bias"] or not leaf.endswith("bias")):
                state[f"adalink_{modality}.{modality}.{leaf}"] = value
        for modality in modalities:
            rank = len(state[f"adalink_{modality}.{modality}.down.weight"])
            methods[f"adalink_{modality}"] = AdaLink(
                rank=rank, modalities=(modality,), activation=settings["activation"], bias=settings["bias"], scope="prompt" if scope == "prompt" else "all"  # type: ignore[arg-type]
            )
        inputs = {} if self.images is None else {"image": InputSpec(*self.images.shape[1:])}
        adapter = Adapter(methods, Anatomy.read(model, inputs)).double()
        adapter.load_state_dict(state)
        return adapter

    def trained(self, variant: str, scope: str) -> tuple[str, ...]:
        """The modalities that have gradients, which are those that the run edits."""
        edits = [match[1] for name in self.under(f"{variant}.{scope}.grad.") if (match := EDIT.match(name))]
        return tuple(modality for modality in MODALITIES if modality in {_note(name)[0] for name in edits})

    def own(self, name: str) -> str:
        """Our name of a tensor with a gradient."""
        if match := EDIT.match(name):
            modality = _note(match[1])[0]
            return f"adalink_{modality}.{modality}.{match[2]}"
        return f"bridge.image.layers.1.{name.rpartition('.')[2]}"

    def loss(self, logits: Tensor) -> Tensor:
        """The mean over labelled tokens; a decoder that reads an encoder has labels of its own, others are shifted by one."""
        if logits.shape[1] != self.domain().shape[1]:
            return nn.functional.cross_entropy(logits.flatten(0, 1), self.tensors["in.labels"].flatten(), ignore_index=-100)
        labels = self.whole("labels", -100)[:, 1:]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)

    def embeddings(self, model: Any) -> Tensor:
        """[B, L, D]: of the frozen model, with the projected images in their places."""
        embedded = model.get_input_embeddings()(self.whole("input_ids", 0))
        return embedded if self.images is None else embedded.masked_scatter(self.is_image[..., None], self.projected())

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """Beside the ids or the embeddings."""
        given = {"attention_mask": self.whole("attention_mask", 1)}
        if "in.position_ids" in self.tensors:
            given["position_ids"] = self.tensors["in.position_ids"]
        if model.config.is_encoder_decoder:
            labels = self.tensors["in.labels"]
            given["decoder_input_ids"] = self.tensors.get("in.decoder_input_ids", nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0), value=0))
        return given


def runs_in(names: Iterable[str]) -> list[tuple[str, str]]:
    """(variant, scope) of every result with a loss, of results with these names."""
    return [(name.split(".")[0], name.split(".")[1]) for name in sorted(names) if re.fullmatch(r"[^.]+\.[^.]+\.loss", name)]


def _note(name: str | None) -> tuple[str, str]:
    """(modality, task) of an adapter's name: `text_task2` is text and task2; a name that says no modality is of text."""
    parts = re.split(r"[._]", name or "text")
    modality = next((modality for modality in MODALITIES if modality in parts), "text")
    return modality, "_".join(part for part in parts if part != modality)
