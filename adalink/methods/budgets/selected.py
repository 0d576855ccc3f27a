"""TAPS, task adaptive parameter sharing (arXiv 2203.16708): training chooses which layers a method adapts; the rest of the model stays as it was.

    h' = edit(h) where s >= threshold, else h          the gradient of s is <dh', edit(h) - h>, open or closed: straight through
    loss = task + weight * mean |s|                    the second term from step `warmup` on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adalink.anatomy import Anatomy
from adalink.edit import Adapter, Edit, Joint, Method, Placement, Slots, Written, joins
from adalink.errors import AttachError, ConfigError
from adalink.methods.budgets.schedule import Schedule, Scheduled, place_of
from adalink.methods.unipelt import NOT_EDITS, Writes
from adalink.tokens import Tokens

__all__ = ["Gates", "Score", "Selected", "SelectedEdit"]


class _StraightThrough(torch.autograd.Function):
    """`value` where the score reaches the threshold, else `base`, bit for bit. The score's gradient is that of a factor on value - base."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, value: Tensor, score: Tensor, threshold: float) -> Tensor:
        is_open = score >= threshold
        ctx.save_for_backward(base, value, is_open)
        return torch.where(is_open, value, base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (base, value, is_open) = grads, ctx.saved_tensors
        nothing = torch.zeros_like(grad)
        return torch.where(is_open, nothing, grad), torch.where(is_open, grad, nothing), (grad * (value - base)).sum().reshape(1), None


class Score(nn.Module):
    """float [1]: what opens and closes the edits of a layer."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))


class SelectedEdit(nn.Module):
    """The wrapped edit where its score reaches the threshold, and nothing elsewhere. Closed, it runs in training alone, so that it may open again.

    role: of the wrapped edit.
    """

    def __init__(self, edit: Edit, score: Score, threshold: float, role: str) -> None:
        super().__init__()
        self.edit, self.threshold, self.role = edit, threshold, role
        self.scores = (score,)  # not a child: the edits of a layer share it

    @property
    def is_open(self) -> bool:
        """Whether the score reaches the threshold; waits for the device."""
        return bool(self.scores[0].value >= self.threshold)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        if self.training or torch.compiler.is_compiling():
            value = self.edit(h, tokens, x)
            chosen: Tensor = _StraightThrough.apply(h.to(value.dtype), value, self.scores[0].value, self.threshold)  # type: ignore[no-untyped-call]
            return chosen
        return self.edit(h, tokens, x) if self.is_open else h

    def joins(self, other: object) -> bool:
        """As the wrapped edits do."""
        return isinstance(other, SelectedEdit) and joins(self.edit, other.edit)

    def joint(self, edits: Sequence[SelectedEdit], h: Tensor, tokens: Tokens, x: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """The open ones at once, as they are without gates; in training one after the other. See `adalink.edit.Joint`."""
        if self.training or torch.compiler.is_compiling():
            for edit, share in zip(edits, shares, strict=True):
                h = torch.where(share > 0, edit(h.to(x.dtype), tokens, x).to(h.dtype), h)
            return h
        chosen = [(edit.edit, share) for edit, share in zip(edits, shares, strict=True) if edit.is_open]
        if not chosen:
            return h
        first = chosen[0][0]
        assert isinstance(first, Joint)
        return first.joint([edit for edit, _ in chosen], h, tokens, x, [share for _, share in chosen])


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A method of which training leaves out the layers that pay least: each has a score, which a penalty pulls towards 0, and is closed below a threshold.

    The scores have a rate of their own and are moved by plain gradient descent, after each step of `adalink train`: an optimizer that scales gradients
    would give the penalty another meaning. A closed layer's weights get no gradient, and its score still moves, so that it may open again.
    A folder has the open places alone, and loads without scores.
    """

    inner: Method
    weight: float = 0.02  # of the penalty: half closed on the embedded scenes; 0.1 to 1 were published, for networks of which whole layers are trained
    per: Literal["layer", "placement", "group"] = "layer"  # one score for each layer, each edit, or each layer and set of token domains
    threshold: float = 0.1  # a score below it closes, as published
    score: float = 0.15  # every score at the start, as published
    warmup: int = 0  # optimizer steps before the penalty begins; two epochs were published
    step: Literal["gradient", "proximal"] = "gradient"  # proximal: the penalty never moves a score past 0; gradient: as published, where a large one does
    rate: float = 0.5  # of the scores, whatever the others' is and how it falls
    may_be_empty: bool = False  # end without an error where every gate has closed: the folder has then nothing of the method
    scores: Mapping[str, float] | None = None  # of a saved adapter: its open places with their scores; the other places have no edit

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if not dataclasses.is_dataclass(self.inner) or not hasattr(self.inner, "place"):
            raise ConfigError(f"Selected wraps a method, got {self.inner!r}: give for instance LoRA(rank=8)")
        if isinstance(self.inner, Scheduled):
            raise ConfigError(f"Selected wraps {type(self.inner).__name__}, which has a schedule of its own: give a method without one, such as LoRA")
        if not 0 < self.threshold <= self.score:
            why = "no gate would ever close" if self.threshold <= 0 else "nothing would train at the start"
            raise ConfigError(f"Selected's threshold is {self.threshold} and its score {self.score}: {why}, so give a positive threshold and a score above it")
        if not self.weight >= 0 or not self.rate > 0 or not self.warmup >= 0:
            raise ConfigError(
                f"Selected's weight is {self.weight}, rate {self.rate} and warmup {self.warmup}: give a positive rate, and 0 or more for the others"
            )
        if self.per not in ("layer", "placement", "group") or self.step not in ("gradient", "proximal"):
            raise ConfigError(f"Selected's per is {self.per!r} and its step {self.step!r}: give layer, placement or group, and gradient or proximal")

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """The wrapped method's."""
        return self.inner.slots(anatomy)

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """The wrapped method's, each edit with its score; of a saved adapter the open ones, as they are.

        Raises ConfigError for a method that fills slots of its own, AttachError where there is nothing to choose.
        """
        placed, own = self.inner.place(anatomy), {slot.domain for slot in self.inner.slots(anatomy)}
        filling = [one for one in placed if own.issuperset(one.domains)]
        if any(one.port.side == "embedding" or any(isinstance(part, Writes) for part in one.edit.modules()) for one in filling):
            raise ConfigError(
                f"Selected wraps {type(self.inner).__name__}, whose slots stay in the row when it is closed: wrap methods that edit tokens which are there"
            )
        if not any(one.port.side not in NOT_EDITS for one in placed):
            raise AttachError(f"{type(self.inner).__name__} edits no hidden state of this model, so there is nothing to choose: attach it without Selected")
        if self.scores is not None:
            return [one for one in placed if one.port.side in NOT_EDITS or self._key(one, anatomy) in self.scores] if self.scores else []
        scores: dict[str, Score] = {}
        wrapped: dict[tuple[int, str], SelectedEdit] = {}
        return [one if one.port.side in NOT_EDITS else self._selected(one, anatomy, scores, wrapped) for one in placed]

    def _selected(self, placement: Placement, anatomy: Anatomy, scores: dict[str, Score], wrapped: dict[tuple[int, str], SelectedEdit]) -> Placement:
        key, edit, role = self._key(placement, anatomy), placement.edit, placement.role
        score = scores.setdefault(key, Score(self.score))
        if any(other == id(edit) for other, _ in wrapped) and (id(edit), key) not in wrapped:  # one edit in several layers (a tap of eP-ALM)
            role = f"{role}.in{key}"
        made = wrapped.setdefault((id(edit), key), SelectedEdit(edit, score, self.threshold, placement.role))
        return dataclasses.replace(placement, role=role, edit=made, shared={**placement.shared, f"scores.{key}": score})

    def _key(self, placement: Placement, anatomy: Anatomy) -> str:
        """Which score is a placement's: `3`, `3.image` for a group, `all.3.q_proj` for a placement; `other` for what is in no layer."""
        if self.per == "placement":
            return placement.group or placement.role
        return place_of(placement, anatomy, by_domain=self.per == "group")

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """What moves the scores; nothing for a saved adapter, or where the method is not trained."""
        scores = scores_of(name, adapter)
        is_trained = any(isinstance(score.value, nn.Parameter) for score in scores.values())  # else `Adapter.fix` made them buffers
        return Gates(self, scores) if is_trained else Schedule()

    def written(self, name: str, adapter: Adapter) -> Written:
        """The open edits, under the names that they have without gates."""
        stored = {key: tensor.detach() for key, tensor in adapter.tensors().items() if key.startswith(f"{name}.")}
        if self.scores is not None:
            return Written(self, stored)
        scores = {key: float(score.value.detach()) for key, score in scores_of(name, adapter).items()}
        method = dataclasses.replace(self, scores={key: value for key, value in scores.items() if value >= self.threshold})
        found: dict[str, Tensor] = {}
        for role, module in (pair for one in _placed(name, adapter) for pair in _modules(one, name)):
            found |= {f"{role}.{part}": tensor.detach() for part, tensor in [*module.named_parameters(), *module.named_buffers()]}
        with torch.device("meta"):
            wanted = Adapter({name: method}, adapter.anatomy).tensors()
        return Written(method, {key: found[key] for key in wanted})


def _placed(name: str, adapter: Adapter) -> list[Placement]:
    return [one for one in adapter.placements if one.role.startswith(f"{name}.")]


def _modules(placement: Placement, name: str) -> list[tuple[str, nn.Module]]:
    """What a placement's tensors are of, by the roles that they have without gates."""
    edit = placement.edit
    own = (f"{name}.{edit.role}", edit.edit) if isinstance(edit, SelectedEdit) else (placement.role, edit)
    return [own, *placement.shared.items()]  # type: ignore[list-item]  # an edit is a module


def scores_of(name: str, adapter: Adapter) -> dict[str, Score]:
    """Which place -> its score, of the adapter's method of this name."""
    start = f"{name}.scores."
    return {role.removeprefix(start): part for one in _placed(name, adapter) for role, part in one.shared.items() if isinstance(part, Score)}


class Gates(Schedule):
    """Moves the scores after each step, and ends with what is open."""

    def __init__(self, method: Selected, scores: Mapping[str, Score]) -> None:
        self.method, self.scores = method, dict(scores)
        self.grads: dict[str, Tensor | None] = {}

    def begin(self, n_steps: int, seed: int) -> None:
        """Raises ConfigError where the penalty would never begin."""
        if self.method.warmup >= n_steps:
            raise ConfigError(f"Selected's warmup is {self.method.warmup} steps, and the run has {n_steps}: give fewer, or the penalty never begins")

    def loss(self, step: int) -> Tensor | None:
        """The penalty; nothing before it begins, and where a proximal step takes its place."""
        if step < self.method.warmup or self.method.step == "proximal":
            return None
        return self.method.weight * torch.stack([score.value.abs().sum() for score in self.scores.values()]).mean()

    def after_backward(self, step: int) -> None:
        """The optimizer sees no gradient of a score, and neither does its clipping."""
        for key, score in self.scores.items():
            self.grads[key], score.value.grad = score.value.grad, None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """A score without a gradient (its tokens were in no row) stands."""
        shrunk = self.method.rate * self.method.weight / len(self.scores) if self.method.step == "proximal" and step >= self.method.warmup else 0.0
        for key, score in self.scores.items():
            if (grad := self.grads.pop(key, None)) is not None:
                score.value.sub_(grad, alpha=self.method.rate)
                if shrunk:
                    score.value.copy_(nn.functional.softshrink(score.value, shrunk))

    def report(self) -> Mapping[str, float]:
        """How many gates are open; of those with token domains of their own, for each of these."""
        counts = {"open": 0.0}
        for key, score in self.scores.items():
            names = ("open", f"open for {key.partition('.')[2]}") if self.method.per == "group" else ("open",)
            counts |= {name: counts.get(name, 0.0) + float(score.value.detach() >= self.method.threshold) for name in names}
        return counts

    def end(self) -> None:
        """Raises ConfigError where every gate is closed."""
        if not self.method.may_be_empty and not self.report()["open"]:
            raise ConfigError(
                f"all {len(self.scores)} gates of Selected are closed at the end, and nothing of {type(self.method.inner).__name__} is left to save: "
                "give a smaller weight or rate, or may_be_empty: true"
            )
